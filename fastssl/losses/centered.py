"""The running mean of the teacher's logits that DINO and iBOT subtract from them."""

import torch
from torch import Tensor, nn

from fastssl import functional as F
from fastssl.kernels.common import collectives
from fastssl.kernels.common.checks import check_int
from fastssl.kernels.common.collectives import Group
from fastssl.losses.common import check_fraction, resolved

CENTERINGS = ("softmax", "sinkhorn_knopp")


class CenteredLoss(nn.Module):
    """A loss whose teacher is kept from collapse by centering.

    centering: "softmax" subtracts the `center`; "sinkhorn_knopp" takes the assignment of
    `sinkhorn_iterations` over the teacher's rows of all ranks, and leaves the center alone.

    The `center` is moved once per forward or once per `step()`.

    update_center True moves the center in every forward, as the official codes do. False is for
    gradient accumulation: forward only collects, and `step()`, called once per optimizer step,
    moves the center by the mean over everything collected since.

    The mean is taken over the rows of all ranks of `group` (None: the default group, if there is
    one), each row counting the same: W processes hold the center of one process on the whole batch.
    """

    center: Tensor  # the only entry of the state dict

    def __init__(
        self,
        shape: tuple[int, ...],
        center_momentum: float,
        update_center: bool,
        group: Group,
        centering: str = "softmax",
        sinkhorn_iterations: int = 3,
    ) -> None:
        super().__init__()
        check_fraction(center_momentum=center_momentum)
        check_int("sinkhorn_iterations", sinkhorn_iterations, 1)
        if centering not in CENTERINGS:
            raise ValueError(f"centering must be one of {', '.join(CENTERINGS)}, got {centering!r}")
        self.centering = centering
        self.sinkhorn_iterations = sinkhorn_iterations
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

    def discard(self) -> None:
        """Forget what was collected, as after a step that was not made."""
        self._collected = None

    def _targets(
        self,
        logits: Tensor | None,  # [rows, K], for "sinkhorn_knopp"
        teacher_temp: float | Tensor,
        num_rows: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What makes targets of the teacher's logits, as arguments of the cross-entropies."""
        if self.centering == "softmax":
            return {"center": self.center.clone()}  # it moves before backward
        if isinstance(teacher_temp, Tensor):
            # Sinkhorn's temperature is a number, for which the host would wait.
            logits, teacher_temp = logits.detach() / teacher_temp, 1.0
        log_u, _ = F.sinkhorn_knopp(
            logits,
            temperature=teacher_temp,
            num_iters=self.sinkhorn_iterations,
            group=self.group,
            materialize=False,
            num_rows=num_rows,
        )
        return {"log_u": log_u}

    @torch.no_grad()
    def _collect(self, teacher_mean: Tensor, count: int | Tensor) -> None:
        """Add `count` teacher rows of this mean, [K]; then `step()` if every forward steps."""
        if self.centering != "softmax":
            return
        total = torch.cat([teacher_mean, torch.ones_like(teacher_mean[:1])]) * count
        total = total.to(self.center.dtype)
        self._collected = total if self._collected is None else self._collected + total
        if self.update_center:
            self.step()
