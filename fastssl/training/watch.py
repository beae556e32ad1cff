"""What goes wrong in a run, seen while it does: steps that are not finite, features that collapse.

n rows, D features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl import distributed
from fastssl.evaluation import feature_std, rankme
from fastssl.kernels.common import collectives
from fastssl.optim.layerwise import local

# Rows of features that a measure takes, of all ranks together.
_MAX_ROWS = 256
# A quantity has collapsed below this share of what it was when the run began.
_SHARE = 0.1
# A teacher's entropy, as a share of the largest there can be, above which it says nothing.
_UNIFORM = 0.999
_HELPS = {
    "feature_std": "all images get nearly the same features: a smaller learning rate, a longer "
    "warm-up, a larger batch, stronger views, or the method's own guard (center, predictor, "
    "variance weight) usually help",
    "rankme": "the features span few directions: a smaller learning rate or weight decay, a "
    "larger batch, or more prototypes usually help",
    "teacher_entropy_over_log_k": "the teacher finds all prototypes equally good: a lower "
    "teacher_temp, a slower center or a higher teacher_momentum usually help",
}


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is infinite or not a number, again and again."""


class BadSteps:
    """Decides whether a step can be made, and counts those that cannot.

    Batch statistics that the forward of such a step has moved are put back: what is not finite
    would stay in a running mean for ever.
    """

    def __init__(self, module: nn.Module, total: int = 0) -> None:
        self.total, self.in_a_row = total, 0
        self._live = [
            buffer
            for child in module.modules()
            if isinstance(child, _BatchNorm)
            for buffer in child.buffers(recurse=False)
        ]
        self._kept = [buffer.clone() for buffer in self._live]

    def remember(self) -> None:
        """Before the forward of a step."""
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    def refuse(self, loss: Tensor, grad_norm: Tensor) -> bool:
        """Whether the step must not be made; all ranks agree."""
        finite = loss.isfinite() & grad_norm.to(loss.device).isfinite()
        if not distributed.any_rank(not finite):
            self.in_a_row = 0
            return False
        self.total += 1
        self.in_a_row += 1
        if self._live:
            torch._foreach_copy_(self._live, self._kept)
        return True


def all_finite(module: nn.Module) -> bool:
    """Whether this rank's share of the parameters and buffers is finite."""
    tensors = [local(t.detach()) for t in (*module.parameters(), *module.buffers())]
    return all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())


class CollapseWatch:
    """Spread and rank of a run's features, and warnings when they vanish.

    first: the values when the run began, for one that goes on; else those first seen.
    """

    def __init__(self, first: Mapping[str, float] | None = None) -> None:
        self._features: Tensor | None = None
        self._first = dict(first or {})
        self._since: dict[str, int] = {}

    def see(self, features: Tensor) -> None:
        """The features [n, D] of a micro-batch; the last one before `measure` counts."""
        # A copy: a slice would keep alive all that it is a slice of.
        self._features = features[: -(-_MAX_ROWS // collectives.world_size())].detach().clone()

    def measure(self) -> dict[str, float]:
        """feature_std and rankme of what was seen last, of all ranks' rows; {} for nothing, and on
        ranks that write no log."""
        if self._features is None:
            return {}
        rows = torch.cat(distributed.gather(self._features.float().cpu()))
        self._features = None
        if (dist.is_initialized() and dist.get_rank() > 0) or not rows.isfinite().all():
            return {}
        return {"feature_std": feature_std(rows), "rankme": rankme(rows)}

    def warnings(self, step: int, values: Mapping[str, float]) -> list[str]:
        """What has just collapsed among the `values` of step `step`, in sentences."""
        sentences = []
        for name, helps in _HELPS.items():
            if name not in values:
                continue
            first = self._first.setdefault(name, values[name])
            if not self._is_collapsed(name, values[name], first):
                self._since.pop(name, None)
            elif name not in self._since:
                self._since[name] = step
                sentences.append(
                    f"warning: {name} is {values[name]:.4g} since step {step} (it was {first:.4g} "
                    f"at first): {helps}"
                )
        return sentences

    @staticmethod
    def _is_collapsed(name: str, value: float, first: float) -> bool:
        if name == "teacher_entropy_over_log_k":
            return value > _UNIFORM
        # A rank of 1 is a single direction.
        return value < max(_SHARE * first, 1.5 if name == "rankme" else 0.0)
