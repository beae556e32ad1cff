"""What the training loop needs of a method, and what a method is built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from fastssl.data import Batch
from fastssl.data.views import View
from fastssl.optim.schedules import Schedule


@dataclass(frozen=True)
class Setting:
    """What a method finds when it is built, beside its own arguments.

    encoder: [B, C, H, W] -> [B, D] when called; the method owns it.
    views: the kinds of views of a batch, in their order.
    num_samples: a batch's `index` is below it.
    steps_per_epoch: optimizer steps.
    seed: of every random number that is keyed by sample.
    """

    encoder: nn.Module
    views: tuple[View, ...] = (View((224, 224)),)
    num_samples: int = 1
    steps_per_epoch: int = 1
    seed: int = 0

    @property
    def num_views(self) -> int:
        return sum(view.number for view in self.views)


class Method(nn.Module):
    """An encoder with its objective: `__init__(self, setting, *, ...)`, whose keywords are the keys
    of `method.args` in a configuration. One optimizer step of the loop is

    method.before_step(values)        # scheduled quantities of this step
    loss = method(batch)["loss"]      # once per micro-batch, with backward
    optimizer.step()
    method.after_step()               # once, whatever the number of micro-batches

    Children that have both a `step()` and a `discard()`, as losses with a center or a queue,
    advance by the first in `after_step` and forget by the second what they collected in a step that
    is skipped.
    """

    # What is judged and what a run's weights.pth holds: the encoder, or a teacher's.
    model: nn.Module
    # What kind of encoder it takes.
    encoder_type: ClassVar[type | tuple[type, ...]] = nn.Module
    # Keywords of the encoder that it needs.
    model_args: ClassVar[Mapping[str, Any]] = {}
    # Kinds of views that it asks for, as keywords of `View` on top of the configuration's `views`.
    views: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    # Scheduled quantities beyond lr and weight_decay, with what they are unless configured.
    schedules: ClassVar[Mapping[str, Schedule]] = {}

    def before_step(self, values: Mapping[str, float]) -> None:
        """Take this step's value of each of `schedules`."""

    def after_step(self) -> None:
        """Advance what moves once per optimizer step: a teacher, a center, a queue."""
        for module in self._advancing():
            module.step()

    def skip_step(self) -> None:
        """In place of `after_step` where the step was not made: nothing advances."""
        for module in self._advancing():
            module.discard()

    def _advancing(self) -> list[nn.Module]:
        return [m for m in self.children() if hasattr(m, "step") and hasattr(m, "discard")]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """{"loss": scalar, and detached scalars to be logged}. A detached "features" [n, D] is
        watched for collapse instead."""
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D], for evaluation on frozen features."""
        return self.model(images)

    def reconstruct(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor] | None:
        """(masked, predicted, true) images [B, C, H, W] for a picture; None: nothing to show."""
        return None
