"""What the training loop needs of a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from fastssl.data import Batch


class Method(nn.Module):
    """A model with its objective. One optimizer step of the loop is

    method.before_step(values)        # scheduled quantities of this step
    loss = method(batch)["loss"]      # once per micro-batch, with backward
    optimizer.step()
    method.after_step()               # once, whatever the number of micro-batches
    """

    model: nn.Module  # what `load_pretrained` fills and a run's weights.pth holds
    # Names in the configuration's `schedules`, beyond lr and weight_decay, that it asks for.
    schedules: ClassVar[tuple[str, ...]] = ()

    def before_step(self, values: Mapping[str, float]) -> None:
        """Take this step's value of each of `schedules`."""

    def after_step(self) -> None:
        """Advance what moves once per optimizer step: a teacher, a centre, a queue."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """{"loss": scalar, and detached scalars to be logged}."""
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D], for evaluation on frozen features."""
        raise NotImplementedError

    def reconstruct(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor] | None:
        """(masked, predicted, true) images [B, C, H, W] for a picture; None: nothing to show."""
        return None
