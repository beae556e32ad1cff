"""The running mean of the teacher's logits that DINO and iBOT subtract from them."""

import torch
from torch import Tensor, nn

from fastssl.kernels.common import collectives
from fastssl.kernels.common.collectives import Group
from fastssl.losses.common import check_fraction, resolved


class CenteredLoss(nn.Module):
    """A loss with a `center`, moved once per forward or once per `step()`.

    update_center True moves the center in every forward, as the official codes do. False is for
    gradient accumulation: forward only collects, and `step()`, called once per optimizer step,
    moves the center by the mean over everything collected since.

    The mean is taken over the rows of all ranks of `group` (None: the default group, if there is
    one), each row counting the same: W processes hold the center of one process on the whole batch.
    """

    center: Tensor  # the only entry of the state dict

    def __init__(
        self, shape: tuple[int, ...], center_momentum: float, update_center: bool, group: Group
    ) -> None:
        super().__init__()
        check_fraction(center_momentum=center_momentum)
        self.center_momentum = center_momentum
        self.update_center = update_center
        self.group = resolved(group)
        self.register_buffer("center", torch.zeros(shape))
        # Sum over the collected teacher rows, and in the last place their number. No buffer: DDP
        # would overwrite it with rank 0's in every forward.
        self._collected: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        """Move the center by the mean of all teacher rows collected on all ranks, and forget them.

        Without collected rows the center stays. Every rank must call it.
        """
        total = self._collected
        if total is None:
            total = self.center.new_zeros(self.center.numel() + 1)
        self._collected = None
        total = collectives.all_reduce_sum(total, self.group)
        count = total[-1]
        mean = (total[:-1] / count.clamp(min=1)).view_as(self.center)
        moved = torch.lerp(mean, self.center, self.center_momentum)
        self.center.copy_(torch.where(count > 0, moved, self.center))

    @torch.no_grad()
    def _collect(self, teacher_mean: Tensor, count: int | Tensor) -> None:
        """Add `count` teacher rows of this mean, [K]; then `step()` if every forward steps."""
        total = torch.cat([teacher_mean, torch.ones_like(teacher_mean[:1])]) * count
        total = total.to(self.center.dtype)
        self._collected = total if self._collected is None else self._collected + total
        if self.update_center:
            self.step()
