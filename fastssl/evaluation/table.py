"""The result of `judge` for people and for files."""

from __future__ import annotations

import math
from typing import Any

# What is no percentage.
_PLAIN = ("rankme", "alignment", "uniformity", "std")


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [
        f"encoder  {result['encoder']}",
        f"data     {result['data']}: {len(result['classes'])} classes, {result['train']} images to "
        f"learn from, {result['test']} to be judged on, at {result['image_size']}",
        "",
    ]
    for name, value in result["measures"].items():
        lines += [f"{label:<34}{text}" for label, text in _rows(name, value, result["features"])]
    if skipped := result["skipped"]:
        lines += ["", broken_files(skipped)]
    return printable("\n".join(lines))


def broken_files(skipped: dict[str, str]) -> str:
    """The first ten of {path: reason} for people."""
    lines = [f"{len(skipped)} broken files were skipped:"]
    lines += [f"  {path}: {reason}" for path, reason in list(skipped.items())[:10]]
    lines += ["  ..."] if len(skipped) > 10 else []
    return printable("\n".join(lines))


def printable(text: str) -> str:
    """With escapes for what is no UTF-8, as the name of a file may be."""
    return text.encode("utf-8", "backslashreplace").decode()


def _rows(name: str, value: Any, num_features: int) -> list[tuple[str, str]]:
    if name in _PLAIN:
        return [(name, f"{value:8.4f}" + (f" of {num_features}" if name == "rankme" else ""))]
    if name == "knn":
        return [(f"knn, k = {k}", f"{accuracy:8.2f} %") for k, accuracy in value.items()]
    if name in ("probe", "attentive"):
        return [(name, f"{value['accuracy']:8.2f} % (learning rate {value['best_lr']:g})")]
    if name == "low-shot":
        return [
            (f"low-shot, {labels}, {kind}", f"{spread['mean']:8.2f} % ± {spread['std']:.2f}")
            for labels, kinds in value.items()
            for kind, spread in kinds.items()
        ]
    return [(name, f"{value:8.2f} %")]


def for_json(value: Any) -> Any:
    """With null for what is no number, as the deviation of one value."""
    if isinstance(value, dict):
        return {str(key): for_json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [for_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
