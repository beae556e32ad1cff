"""Self-distillation with no labels (Caron et al. 2021, arXiv 2104.14294).

B images, S student views, T = 2 teacher views (the first two of the student's), K prototypes.
"""

import torch
from torch import Tensor

from fastssl import functional as F
from fastssl.kernels.common.checks import check_int, check_tensor
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

NUM_TEACHER_VIEWS = 2


class DINOLoss(CenteredLoss):
    """Cross-entropy between centered, sharpened teacher outputs and student outputs of other views.

    Mean over the crossed pairs of views and over images, here with centering "softmax"::

        q[t] = softmax((teacher[t] - center) / teacher_temp)
        p[s] = softmax(student[s] / student_temp)
        loss = mean over t != s of  -sum_k q[t] log p[s]
        center = center_momentum * center + (1 - center_momentum) * mean(teacher)

    Arguments, in the official order:
        out_dim: K (also output_dim, num_prototypes).
        ncrops: S, the views of the student, of which the first two are the teacher's.
        warmup_teacher_temp, teacher_temp: teacher temperature at epoch 0 and from
            `warmup_teacher_temp_epochs` on, linear between; for a forward that names an epoch.
        nepochs: length of the schedule (also num_epochs); later epochs keep the last temperature.
        student_temp, center_momentum: as in the formula.
        centering, sinkhorn_iterations, update_center, group: see `CenteredLoss`.

    The loss is the mean over the local images, whose gradients DDP and FSDP2 average.
    """

    @aliases(output_dim="out_dim", num_prototypes="out_dim", num_epochs="nepochs")
    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 0,
        nepochs: int = 1,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        *,
        centering: str = "softmax",
        sinkhorn_iterations: int = 3,
        update_center: bool = True,
        group: Group = None,
    ) -> None:
        check_int("out_dim", out_dim, 1)
        check_int("ncrops", ncrops, NUM_TEACHER_VIEWS)
        check_int("nepochs", nepochs, 1)
        check_int("warmup_teacher_temp_epochs", warmup_teacher_temp_epochs, 0, nepochs)
        check_positive(
            warmup_teacher_temp=warmup_teacher_temp,
            teacher_temp=teacher_temp,
            student_temp=student_temp,
        )
        super().__init__(
            (1, out_dim), center_momentum, update_center, group, centering, sinkhorn_iterations
        )
        self.out_dim = out_dim
        self.ncrops = ncrops
        self.student_temp = student_temp
        warmup = torch.linspace(
            warmup_teacher_temp,
            teacher_temp,
            warmup_teacher_temp_epochs,
            dtype=torch.float64,
            device="cpu",
        )
        constant = [teacher_temp] * (nepochs - warmup_teacher_temp_epochs)
        self.teacher_temp_schedule = [*warmup.tolist(), *constant]
        # On the device, where a new epoch is a new value and no new graph.
        schedule = torch.tensor(self.teacher_temp_schedule, dtype=torch.float32)
        self.register_buffer("_teacher_temps", schedule, persistent=False)

    def teacher_temp(self, epoch: int) -> float:
        check_int("epoch", epoch, 0)
        return self.teacher_temp_schedule[min(epoch, len(self.teacher_temp_schedule) - 1)]

    def forward(
        self,
        student_output: Tensor,  # [S * B, K], views one after the other
        teacher_output: Tensor,  # [T * B, K]
        epoch: int | None = None,
        *,
        teacher_temp: float | Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, Stats]:
        """The loss; with return_stats also {"teacher_entropy" in nats, "loss_over_log_k"}.

        teacher_temp, a float or a tensor without dimensions, takes the place of the epoch's. Of
        the tensor a new value is no new graph under torch.compile.
        """
        self._check("output", student_output, teacher_output, self.out_dim)
        teacher_temp = self._temperature(epoch, teacher_temp)
        loss, mean, entropy = F.dino_cross_entropy(
            student_output.unflatten(0, (self.ncrops, -1)),
            teacher_output.unflatten(0, (NUM_TEACHER_VIEWS, -1)),
            **self._targets(teacher_output, teacher_temp),
            **self._options(teacher_temp),
        )
        return self._finish(loss, mean, entropy, teacher_output.shape[0], return_stats)

    def linear(
        self,
        student: HeadOutput,  # features [S * B, D]
        teacher: HeadOutput,  # features [T * B, E]
        epoch: int | None = None,
        *,
        teacher_temp: float | Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, Stats]:
        """The same from features and prototypes, without the logits ever being in memory.

        To be called inside the forward of the student's head, which owns the prototypes::

            teacher = teacher_head(teacher_features, return_prototypes=True)
            loss = student_head(
                student_features, loss=lambda student: dino_loss.linear(student, teacher, epoch)
            )

        With centering "sinkhorn_knopp" the teacher's logits [T * B, K] are made for the assignment.
        """
        self._check("features", student.features, teacher.features, None)
        if student.normalize_prototypes != teacher.normalize_prototypes:
            raise ValueError("student and teacher must agree on normalize_prototypes")
        teacher_temp = self._temperature(epoch, teacher_temp)
        logits = teacher.logits() if self.centering == "sinkhorn_knopp" else None
        loss, mean, entropy = F.linear_dino_cross_entropy(
            student.features.unflatten(0, (self.ncrops, -1)),
            student.prototypes,
            teacher.features.unflatten(0, (NUM_TEACHER_VIEWS, -1)),
            teacher.prototypes,
            normalize_prototypes=student.normalize_prototypes,
            student_lengths=student.lengths,
            teacher_lengths=teacher.lengths,
            **self._targets(logits, teacher_temp),
            **self._options(teacher_temp),
        )
        return self._finish(loss, mean, entropy, teacher.features.shape[0], return_stats)

    def _temperature(
        self, epoch: int | None, teacher_temp: float | Tensor | None
    ) -> float | Tensor:
        if teacher_temp is not None:
            return teacher_temp
        if epoch is None:
            raise ValueError("epoch must be given where teacher_temp is not, got None")
        check_int("epoch", epoch, 0)
        return self._teacher_temps[min(epoch, len(self.teacher_temp_schedule) - 1)]

    def _options(self, teacher_temp: float | Tensor) -> dict[str, object]:
        return {
            "student_temp": self.student_temp,
            "teacher_temp": teacher_temp,
            "return_teacher_mean": True,
            "return_teacher_entropy": True,
        }

    def _finish(
        self, loss: Tensor, mean: Tensor, entropy: Tensor, rows: int, return_stats: bool
    ) -> Tensor | tuple[Tensor, Stats]:
        self._collect(mean, rows)
        if not return_stats:
            return loss
        return loss, cross_entropy_stats(loss, self.out_dim, teacher_entropy=entropy)

    def _check(self, kind: str, student: Tensor, teacher: Tensor, width: int | None) -> None:
        student_name, teacher_name = f"student_{kind}", f"teacher_{kind}"
        check_tensor(student_name, student, dim=2)
        check_tensor(teacher_name, teacher, dim=2, device=student.device)
        for name, value, views in (
            (student_name, student, self.ncrops),
            (teacher_name, teacher, NUM_TEACHER_VIEWS),
        ):
            fits = width is None or value.shape[1] == width
            if not fits or value.shape[0] % views or not value.shape[0]:
                columns = "D" if width is None else width
                raise ValueError(
                    f"{name} must have shape [{views} * B, {columns}], got {list(value.shape)}"
                )
        batch = student.shape[0] // self.ncrops
        if teacher.shape[0] != NUM_TEACHER_VIEWS * batch:
            raise ValueError(
                f"{teacher_name} must have {NUM_TEACHER_VIEWS} * {batch} rows beside a "
                f"{student_name} of {self.ncrops} * {batch}, got {teacher.shape[0]} "
                "(are the two swapped?)"
            )
        check_not_swapped(student_name, student, teacher_name, teacher)
