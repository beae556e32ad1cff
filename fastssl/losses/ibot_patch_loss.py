"""Self-distillation on masked patches (iBOT: Zhou et al. 2021, arXiv 2111.07832; DINOv2: Oquab et
al. 2023, arXiv 2304.07193).

M rows of masked tokens, all images together, of a fixed capacity; K prototypes.
"""

import torch
from torch import Tensor

from fastssl import functional as F
from fastssl.kernels.common import collectives
from fastssl.kernels.common.checks import check_int, check_shape, check_tensor
from fastssl.kernels.common.collectives import Group
from fastssl.losses.centered import CenteredLoss
from fastssl.losses.common import (
    Stats,
    aliases,
    check_not_swapped,
    check_positive,
    cross_entropy_stats,
)
from fastssl.nn.dino_head import HeadOutput


class iBOTPatchLoss(CenteredLoss):
    """Cross-entropy of the student's masked tokens against the teacher's at the same places.

    With q the student's softmax at student_temp and p the teacher's at teacher_temp, centered or
    assigned by Sinkhorn-Knopp::

        row[m] = -sum_k p[m, k] log q[m, k]
        loss = sum_m masks_weight[m] row[m] / num_images             # DINOv2, with num_images
        loss = sum_m masks_weight[m] row[m] / sum_m masks_weight[m]  # without, as the iBOT paper

    DINOv2 weighs a row by 1 / (masked tokens of its image); weights are 1 if None.

    Arguments, in the official order:
        patch_out_dim: K (also out_dim, output_dim).
        student_temp, center_momentum: as in `DINOLoss`.
        teacher_temp: that of a forward which does not name one.
        centering, sinkhorn_iterations, update_center, group: see `CenteredLoss`.

    Several processes: with num_images, equally many on every rank, the mean over ranks that DDP
    and FSDP2 take is the loss of the whole batch. Without, the sum of weights is that of all
    ranks, divided by their number, and the mean over ranks is that of the whole batch as well,
    however the masked tokens are distributed.
    """

    @aliases(out_dim="patch_out_dim", output_dim="patch_out_dim")
    def __init__(
        self,
        patch_out_dim: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        *,
        teacher_temp: float = 0.04,
        centering: str = "softmax",
        sinkhorn_iterations: int = 3,
        update_center: bool = True,
        group: Group = None,
    ) -> None:
        check_int("patch_out_dim", patch_out_dim, 1)
        check_positive(student_temp=student_temp, teacher_temp=teacher_temp)
        super().__init__(
            (1, 1, patch_out_dim),
            center_momentum,
            update_center,
            group,
            centering,
            sinkhorn_iterations,
        )
        self.patch_out_dim = patch_out_dim
        self.student_temp = student_temp
        self.teacher_temp = teacher_temp

    def forward(
        self,
        student_patch_tokens: Tensor,  # [M, K]
        teacher_patch_tokens: Tensor,  # [M, K], of the same tokens
        *,
        teacher_temp: float | Tensor | None = None,
        n_masked_patches: Tensor | None = None,  # [] int
        masks_weight: Tensor | None = None,  # [M]
        num_images: int | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, Stats]:
        """The loss; with return_stats also {"teacher_entropy" in nats, "loss_over_log_k"}.

        Of the M rows only the first n_masked_patches count, an integer tensor on the tokens'
        device (None: all), whatever the others hold: shapes stay fixed and the host never waits.
        teacher_temp is a float, or a tensor without dimensions of which a new value is no new graph
        under torch.compile. loss_over_log_k is taken of the weighted mean over rows.
        """
        self._check(student_patch_tokens, teacher_patch_tokens, self.patch_out_dim)
        student, teacher = student_patch_tokens[None], teacher_patch_tokens[None]
        teacher_temp = self.teacher_temp if teacher_temp is None else teacher_temp
        targets = self._targets(teacher_patch_tokens, teacher_temp, n_masked_patches)
        options = self._options(teacher_temp, n_masked_patches, masks_weight)
        loss, mean, entropy = F.dino_cross_entropy(student, teacher, **targets, **options)
        rows = _Rows(student_patch_tokens, n_masked_patches, masks_weight)
        return self._finish(loss, mean, entropy, rows, num_images, return_stats)

    def linear(
        self,
        student: HeadOutput,  # features [M, D]
        teacher: HeadOutput,  # features [M, E]
        *,
        teacher_temp: float | Tensor | None = None,
        n_masked_patches: Tensor | None = None,  # [] int
        masks_weight: Tensor | None = None,  # [M]
        num_images: int | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, Stats]:
        """The same from features and prototypes, without the student's logits in memory.

        To be called inside the forward of the student's head: see `DINOLoss.linear`. With
        centering "sinkhorn_knopp" the teacher's logits [M, K] are made for the assignment.
        """
        self._check(student.features, teacher.features, None)
        if student.normalize_prototypes != teacher.normalize_prototypes:
            raise ValueError("student and teacher must agree on normalize_prototypes")
        teacher_temp = self.teacher_temp if teacher_temp is None else teacher_temp
        logits = teacher.logits() if self.centering == "sinkhorn_knopp" else None
        targets = self._targets(logits, teacher_temp, n_masked_patches)
        loss, mean, entropy = F.linear_dino_cross_entropy(
            student.features[None],
            student.prototypes,
            teacher.features[None],
            teacher.prototypes,
            normalize_prototypes=student.normalize_prototypes,
            student_lengths=student.lengths,
            teacher_lengths=teacher.lengths,
            **targets,
            **self._options(teacher_temp, n_masked_patches, masks_weight),
        )
        rows = _Rows(student.features, n_masked_patches, masks_weight)
        return self._finish(loss, mean, entropy, rows, num_images, return_stats)

    def _options(
        self, teacher_temp: float | Tensor, num_rows: Tensor | None, weights: Tensor | None
    ) -> dict[str, object]:
        return {
            "student_temp": self.student_temp,
            "teacher_temp": teacher_temp,
            "row_weights": weights,
            "num_rows": num_rows,
            "skip_same_view": False,
            "reduction": "sum",
            "return_teacher_mean": True,
            "return_teacher_entropy": True,
        }

    def _finish(
        self,
        total: Tensor,
        mean: Tensor,
        entropy: Tensor,
        rows: "_Rows",
        num_images: int | None,
        return_stats: bool,
    ) -> Tensor | tuple[Tensor, Stats]:
        self._collect(mean, rows.count)
        if num_images is None:
            size = collectives.world_size(self.group)
            weight = collectives.all_reduce_sum(rows.weight, self.group) / size
            # All weights 0, as where nothing is masked: the sum is 0, too.
            loss = total / torch.where(weight == 0, 1.0, weight)
        else:
            check_int("num_images", num_images, 1)
            loss = total / num_images
        if not return_stats:
            return loss
        local = torch.where(rows.weight == 0, 1.0, rows.weight)
        stats = cross_entropy_stats(total / local, self.patch_out_dim, teacher_entropy=entropy)
        return loss, stats

    def _check(self, student: Tensor, teacher: Tensor, width: int | None) -> None:
        names = ("student_patch_tokens", "teacher_patch_tokens")
        legend = "[M, D]" if width is None else "[M, patch_out_dim]"
        check_tensor(names[0], student, dim=2)
        check_shape(names[0], student, (None, width), legend)
        check_tensor(names[1], teacher, dim=2, device=student.device)
        check_shape(names[1], teacher, (student.shape[0], width), legend)
        check_not_swapped(names[0], student, names[1], teacher)


class _Rows:
    """How many rows count, and with what weight in all; both stay on the device."""

    def __init__(self, tokens: Tensor, num_rows: Tensor | None, weights: Tensor | None) -> None:
        capacity, device = tokens.shape[0], tokens.device
        if num_rows is None:
            self.count = torch.full((), float(capacity), device=device)
        else:
            self.count = num_rows.reshape(()).clamp(0, capacity).float()
        if weights is None:
            self.weight = self.count
        elif num_rows is None:
            self.weight = weights.detach().float().sum()
        else:
            used = torch.arange(capacity, device=device) < self.count
            self.weight = torch.where(used, weights.detach().float(), 0.0).sum()
