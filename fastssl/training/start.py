"""What a run that starts from released weights takes of them, and what it has to learn anew."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

from torch import Tensor, nn

from fastssl.methods import Method
from fastssl.models import LoadReport

# Where dino, dinov2 and fastssl's checkpoints keep heads, and what they are called in our networks.
_HEADS = {"head.": "head", "dino_head.": "head", "ibot_head.": "patch_head"}


def start_from(method: Method, encoder: nn.Module, report: LoadReport) -> str:
    """Load the heads that the file holds beside the encoder, where they are the method's own; then
    one sentence on what was loaded, what is new and what of the file is not used."""
    taken = _take_heads(method, report.unused)
    unused = [key for key in report.unexpected if not key.startswith(tuple(taken))]
    parts = [str(replace(report, unexpected=unused))]
    known = {id(parameter) for parameter in encoder.parameters()}
    if taken:
        parts.append(f"heads of the file: {', '.join(prefix[:-1] for prefix in taken)}")
        heads = [getattr(method.student, _HEADS[prefix]) for prefix in taken]
        known |= {id(parameter) for head in heads for parameter in head.parameters()}
    if new := [*_new_modules(method, known)]:
        parts.append(f"new in method {type(method).__name__}, as initialised: {', '.join(new)}")
    return "; ".join(parts)


def _take_heads(method: Method, tensors: Mapping[str, Tensor]) -> list[str]:
    """Fill heads of student and teacher; the prefixes of those that fit."""
    networks = [
        n for n in (getattr(method, "student", None), getattr(method, "teacher", None)) if n
    ]
    taken = []
    for prefix, name in _HEADS.items():
        heads = [head for network in networks if (head := getattr(network, name, None)) is not None]
        state = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        if not (heads and state):
            continue
        # Of another size, or with prototypes of other lengths, it is no head of this method.
        with suppress(RuntimeError, ValueError):
            copy.deepcopy(heads[0]).load_state_dict(state)
            for head in heads:
                head.load_state_dict(state)
            taken.append(prefix)
    return taken


def _new_modules(module: nn.Module, known: set[int], name: str = "") -> Iterator[str]:
    """The largest modules that are trained and hold nothing of what is `known`, by name."""
    trained = [p for p in module.parameters() if p.requires_grad]
    if trained and not any(id(parameter) in known for parameter in trained):
        yield name
    elif trained:
        dot = f"{name}." if name else ""
        for part, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in known:
                yield dot + part
        for part, child in module.named_children():
            yield from _new_modules(child, known, dot + part)
