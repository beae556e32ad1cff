"""What a run leaves for people: the reconstructions as a picture, and one page that tells it all.

The page is a single file without scripts or links, so that it can be mailed.
"""

from __future__ import annotations

import base64
import json
import math
import os
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median

from PIL import Image, ImageDraw
from torch import Tensor

from fastssl.data.index import write_whole
from fastssl.data.transforms import denormalize
from fastssl.training import curves

# Longer lists of broken files are cut in the page; skipped.json keeps them all.
_MAX_SKIPPED = 200
_COLUMNS = ("masked", "predicted", "true")
_GAP, _HEADER = 4, 16
# Largest share of a run's time that refreshes of its page may take.
_SHARE = 0.01

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse } td, th { padding: .2rem .9rem; border-bottom: 1px solid #ccc }
td { text-align: right } th { text-align: left } svg, img { max-width: 100%; height: auto }
pre { background: #f4f4f4; padding: 1rem; overflow-x: auto }
"""


def save_reconstructions(
    path: str | os.PathLike[str],
    masked: Tensor,
    predicted: Tensor,
    true: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    max_rows: int = 8,
) -> None:
    """Write a PNG with a row per image: masked, predicted, true.

    Args:
        path: the file to write.
        masked, predicted, true: float [B, 3, H, W], normalised by mean and std.
        max_rows: images shown, the first ones of the batch.
    """
    if not masked.shape == predicted.shape == true.shape or masked.dim() != 4:
        shapes = [list(x.shape) for x in (masked, predicted, true)]
        raise ValueError(f"masked, predicted and true must be one shape [B, 3, H, W], got {shapes}")
    columns = [denormalize(x[:max_rows].cpu(), mean, std) for x in (masked, predicted, true)]
    height, width = true.shape[-2:]
    # Small crops are enlarged so that a person sees something.
    zoom = max(1, round(128 / height))
    cell_w, cell_h = width * zoom + _GAP, height * zoom + _GAP
    rows = len(columns[0])
    sheet = Image.new("RGB", (3 * cell_w + _GAP, rows * cell_h + _GAP + _HEADER), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (title, images) in enumerate(zip(_COLUMNS, columns, strict=True)):
        left = _GAP + column * cell_w
        draw.text((left, 2), title, fill="black")
        for row, pixels in enumerate(images):
            tile = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
            tile = tile.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            sheet.paste(tile, (left, _HEADER + _GAP + row * cell_h))
    sheet.save(path, format="PNG")


def write_report(
    run_dir: str | os.PathLike[str], *, reload_every: float = 0.0, ended: str = ""
) -> Path:
    """Write report.html into a run's folder, from what is there, and return its path.

    Reads metrics.jsonl (lines of kind "train" and "eval"), config.yaml, reconstructions.png and
    skipped.json ({path: reason}); each may be missing.

    reload_every: of a run that goes on, seconds after which a browser loads the page again; 0: not.
    ended: why the run ended before its last step.
    """
    run_dir = Path(run_dir)
    train, evals = read_metrics(run_dir / "metrics.jsonl")
    parts = [f"<h1>{escape(run_dir.resolve().name)}</h1>"]
    if reload_every:
        parts.append("<p>The run goes on, and this page loads itself again.</p>")
    if ended:
        parts.append(f"<p><strong>The run ended early:</strong> {escape(ended)}</p>")
    parts += [_accuracy_table(evals), _training_table(train)]
    drawn = curves.draw(train, evals)
    if drawn:
        parts.append(f"<h2>Curves</h2>{drawn}")
    picture = run_dir / "reconstructions.png"
    if picture.is_file():
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append("<h2>Reconstructions</h2>")
        parts.append(f'<img alt="masked, predicted, true" src="data:image/png;base64,{data}">')
    if (run_dir / "skipped.json").is_file():
        parts.append(_skipped_table(read_skipped(run_dir)))
    config = run_dir / "config.yaml"
    if config.is_file():
        text = escape(config.read_text(encoding="utf-8"))
        parts.append(f"<h2>Configuration</h2><pre>{text}</pre>")
    title = escape(run_dir.resolve().name)
    reload = f'<meta http-equiv="refresh" content="{reload_every:.0f}">' if reload_every else ""
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{reload}'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    target = run_dir / "report.html"
    # Whoever looks meanwhile sees the old page or the new one, whole.
    write_whole(target, lambda stream: stream.write(page.encode()))
    return target


def read_skipped(run_dir: Path) -> dict[str, str]:
    """{path: reason} of a run's broken files; {} where the list is missing or damaged."""
    try:
        return dict(json.loads((run_dir / "skipped.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


class LiveReport:
    """report.html while the run goes on: written again every so many seconds, at the earliest, and
    not before a hundred times what the last writing took has passed."""

    def __init__(self, run_dir: Path, every: float) -> None:
        self._run_dir, self._every = run_dir, every
        self._due = time.monotonic() + every

    def refresh(self) -> bool:
        """Whether it was time, and the page was written; never where `every` is 0."""
        start = time.monotonic()
        if not self._every or start < self._due:
            return False
        # Should this one fail, the next is not tried at once.
        self._due = start + self._every
        write_report(self._run_dir, reload_every=max(self._every, 1.0))
        end = time.monotonic()
        self._due = max(self._due, end + (end - start) / _SHARE)
        return True


def read_metrics(path: Path) -> tuple[list[dict], list[dict]]:
    """The train and the eval lines of metrics.jsonl, each by increasing step.

    Of two lines of one step the later counts: a resumed run repeats the steps after its
    checkpoint. A line cut short by a crash is left out.
    """
    lines: dict[str, dict[int, dict]] = {"train": {}, "eval": {}}
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = {k: math.nan if v is None else v for k, v in json.loads(text).items()}
                lines[line["kind"]][int(line["step"])] = line
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
    train, evals = ([steps[s] for s in sorted(steps)] for steps in lines.values())
    return train, evals


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(row: Sequence[str]) -> str:
        first, *rest = (escape(cell) for cell in row)
        return f"<tr><th>{first}</th>" + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"

    return "<table>" + "".join(cells(row) for row in [head, *rows] if row) + "</table>"


def _accuracy_table(evals: list[dict]) -> str:
    if not evals:
        return "<p>No evaluation was made.</p>"
    before, after = evals[0], evals[-1]
    rows = []
    for key, name in (("knn", "k-NN, %"), ("linear", "linear probe, %"), ("rankme", "RankMe")):
        if key in before and key in after:
            change = after[key] - before[key]
            rows.append((name, f"{before[key]:.1f}", f"{after[key]:.1f}", f"{change:+.1f}"))
    head = ("frozen features", f"step {before['step']}", f"step {after['step']}", "change")
    return "<h2>Before and after</h2>" + _table(head, rows)


def _training_table(train: list[dict]) -> str:
    if not train:
        return "<p>No training step was logged.</p>"
    rows = [("steps", str(train[-1]["step"]))]
    for key, name, summary, form in (
        ("loss", "loss, last", lambda values: values[-1], "{:.4f}"),
        ("images_per_second", "images/s, median", median, "{:.1f}"),
        ("images_per_second_per_device", "images/s of one device, median", median, "{:.1f}"),
        ("data_wait", "time waiting for data, median", median, "{:.1%}"),
        ("mfu", "MFU, median", median, "{:.1%}"),
        ("peak_memory_mb", "peak memory, MB", max, "{:.0f}"),
        ("skipped_steps", "steps skipped, not finite", max, "{:.0f}"),
    ):
        values = [line[key] for line in train if key in line]
        if values:
            rows.append((name, form.format(summary(values))))
    return "<h2>Training</h2>" + _table((), rows)


def _skipped_table(skipped: dict[str, str]) -> str:
    shown = list(skipped.items())[:_MAX_SKIPPED]
    more = f"<p>The first {len(shown)} are shown.</p>" if len(shown) < len(skipped) else ""
    table = _table(("file", "reason"), shown) if shown else ""
    return f"<h2>Skipped files: {len(skipped)}</h2>{table}{more}"
