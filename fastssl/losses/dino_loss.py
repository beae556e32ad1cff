"""Self-distillation with no labels (Caron et al. 2021, arXiv 2104.14294).

B images, S student views, T = 2 teacher views (the first two of the student's), K prototypes.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.kernels.common.checks import check_int, check_tensor

NUM_TEACHER_VIEWS = 2


class DINOLoss(nn.Module):
    """Cross-entropy between centered, sharpened teacher outputs and student outputs of other views.

    Mean over the crossed pairs of views and over images::

        q[t] = softmax((teacher[t] - center) / teacher_temp)
        p[s] = softmax(student[s] / student_temp)
        loss = mean over t != s of  -sum_k q[t] log p[s]
        center = center_momentum * center + (1 - center_momentum) * mean(teacher)

    Arguments, in the official order:
        out_dim: K.
        ncrops: S, the views of the student, of which the first two are the teacher's.
        warmup_teacher_temp, teacher_temp: teacher temperature at epoch 0 and from
            `warmup_teacher_temp_epochs` on, linear between.
        nepochs: length of the schedule; later epochs keep the last temperature.
        student_temp, center_momentum: as in the formula.
        update_center: True moves the center in every forward, as the official code does. False for
            gradient accumulation: forward only collects, and `step()`, called once per optimizer
            step, moves the center by the mean over everything collected since.

    The center is averaged over all ranks of the default process group when there is one, so that W
    processes hold the center of one process on the whole batch; the loss is the mean over the local
    images, whose gradients DDP and FSDP average.
    """

    center: Tensor  # [1, K], the only entry of the state dict

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        *,
        update_center: bool = True,
    ) -> None:
        super().__init__()
        check_int("out_dim", out_dim, 1)
        check_int("ncrops", ncrops, NUM_TEACHER_VIEWS)
        check_int("nepochs", nepochs, 1)
        check_int("warmup_teacher_temp_epochs", warmup_teacher_temp_epochs, 0, nepochs)
        temperatures = {
            "warmup_teacher_temp": warmup_teacher_temp,
            "teacher_temp": teacher_temp,
            "student_temp": student_temp,
        }
        for name, value in temperatures.items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 <= center_momentum <= 1:
            raise ValueError(f"center_momentum must be in [0, 1], got {center_momentum}")
        self.out_dim = out_dim
        self.ncrops = ncrops
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.update_center = update_center
        warmup = torch.linspace(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, dtype=torch.float64
        )
        constant = [teacher_temp] * (nepochs - warmup_teacher_temp_epochs)
        self.teacher_temp_schedule = [*warmup.tolist(), *constant]
        self.register_buffer("center", torch.zeros(1, out_dim))
        # Sum over the collected teacher rows, and in the last place their number.
        self.register_buffer("_collected", torch.zeros(out_dim + 1), persistent=False)

    def teacher_temp(self, epoch: int) -> float:
        check_int("epoch", epoch, 0)
        return self.teacher_temp_schedule[min(epoch, len(self.teacher_temp_schedule) - 1)]

    def forward(
        self,
        student_output: Tensor,  # [S * B, K], views one after the other
        teacher_output: Tensor,  # [T * B, K]
        epoch: int,
    ) -> Tensor:
        self._check(student_output, teacher_output)
        student = student_output.float().unflatten(0, (self.ncrops, -1)) / self.student_temp
        teacher_output = teacher_output.detach().float()
        teacher = (teacher_output - self.center) / self.teacher_temp(epoch)
        probabilities = teacher.softmax(dim=-1).unflatten(0, (NUM_TEACHER_VIEWS, -1))
        log_probabilities = F.log_softmax(student, dim=-1)
        # [T, S]: one cross-entropy per pair of views, of which equal views do not count.
        pairs = -torch.einsum("tbk,sbk->ts", probabilities, log_probabilities) / student.shape[1]
        same_view = torch.eye(NUM_TEACHER_VIEWS, self.ncrops, dtype=torch.bool, device=pairs.device)
        loss = pairs.masked_fill(same_view, 0.0).sum() / (pairs.numel() - NUM_TEACHER_VIEWS)
        self._collect(teacher_output)
        if self.update_center:
            self.step()
        return loss

    @torch.no_grad()
    def step(self) -> None:
        """Move the center by the mean of all teacher rows collected on all ranks, and forget them.

        Without collected rows the center stays. Every rank must call it.
        """
        total = self._collected.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        count = total[-1]
        mean = total[:-1] / count.clamp(min=1)
        moved = torch.lerp(mean, self.center[0], self.center_momentum)
        self.center.copy_(torch.where(count > 0, moved, self.center[0]))
        self._collected.zero_()

    @torch.no_grad()
    def _collect(self, teacher_output: Tensor) -> None:
        self._collected[:-1] += teacher_output.sum(dim=0)
        self._collected[-1] += teacher_output.shape[0]

    def _check(self, student_output: Tensor, teacher_output: Tensor) -> None:
        check_tensor("student_output", student_output, dim=2)
        check_tensor("teacher_output", teacher_output, dim=2, device=student_output.device)
        for name, value, views in (
            ("student_output", student_output, self.ncrops),
            ("teacher_output", teacher_output, NUM_TEACHER_VIEWS),
        ):
            if value.shape[1] != self.out_dim or value.shape[0] % views or not value.shape[0]:
                raise ValueError(
                    f"{name} must have shape [{views} * B, {self.out_dim}], got {list(value.shape)}"
                )
        batch = student_output.shape[0] // self.ncrops
        if teacher_output.shape[0] != NUM_TEACHER_VIEWS * batch:
            raise ValueError(
                f"teacher_output must have {NUM_TEACHER_VIEWS} * {batch} rows beside a "
                f"student_output of {self.ncrops} * {batch}, got {teacher_output.shape[0]} "
                "(are the two swapped?)"
            )
