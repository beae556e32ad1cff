"""A quantity as a function of the optimizer step: learning rate, weight decay, momentum, ..."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

KINDS = ("cosine", "linear", "constant", "steps")
SCALINGS = ("linear", "sqrt", "none")


def _option(default: float | str | None, text: str, **metadata: object):
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class Schedule:
    """`start` for hold_steps, a straight line to `base` over warmup_steps, then on to `final`.

    `schedule(step, num_steps)` is the value of optimizer step `step` (0 is the first) of
    `num_steps`. `base` is reached at step hold_steps + warmup_steps, `final` would be reached at
    step `num_steps`, the one after the last.

        learning rate (MAE)         base=1.5e-4, start=0, final=0, warmup_steps=12480
        weight decay (DINO)         base=0.04, final=0.4
        teacher momentum (DINO)     base=0.996, final=1
        teacher temperature (DINO)  base=0.07, start=0.04, warmup_steps=37500, kind="constant"
        learning rate (MoCo)        base=0.03, kind="steps", milestones=[600480, 800640]
        frozen last layer (DINO)    base=1, start=0, hold_steps=1250, kind="constant", as a factor
                                    of its learning rate
    """

    base: float = _option(0.0, "value at the end of the warm-up")
    start: float = _option(0.0, "value before the warm-up and at its first step")
    final: float | None = _option(None, "value that the curve ends at; null: base")
    hold_steps: int = _option(0, "steps at `start` before the warm-up")
    warmup_steps: int = _option(0, "steps from `start` to `base`, in a straight line")
    kind: str = _option(
        "cosine", "curve from `base` to `final`; steps: times `gamma` at milestones", choices=KINDS
    )
    milestones: list[int] = field(
        default_factory=list, metadata={"help": "steps at which a schedule of kind steps falls"}
    )
    gamma: float = _option(0.1, "factor of each fall of a schedule of kind steps")

    def __call__(self, step: int, num_steps: int) -> float:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if step < self.hold_steps:
            return self.start
        warm = self.hold_steps + self.warmup_steps
        if step < warm:
            return self.start + (self.base - self.start) * (step - self.hold_steps) / (
                self.warmup_steps
            )
        if self.kind == "steps":
            return self.base * self.gamma ** sum(step >= fall for fall in self.milestones)
        if self.kind == "constant" or self.final is None:
            return self.base
        progress = min((step - warm) / max(num_steps - warm, 1), 1.0)
        if self.kind == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.base + (self.final - self.base) * progress


def scale_lr(
    base_lr: float, global_batch_size: int, *, scaling: str = "linear", reference: int = 256
) -> float:
    """Learning rate for a global batch, from the one for `reference` images.

    "linear": base_lr * G / reference (Goyal et al., 2017, arXiv:1706.02677); "sqrt":
    base_lr * sqrt(G / reference); "none": base_lr.
    """
    if scaling not in SCALINGS:
        raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {scaling!r}")
    ratio = global_batch_size / reference
    return base_lr * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[scaling]
