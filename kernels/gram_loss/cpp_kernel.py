"""gram_loss on a CPU: scratch memory and calls of csrc/cpu/gram_loss.cpp."""

import torch
from torch import Tensor

from fastssl.kernels.common import contrastive_cpp

# Rows and columns of a tile of similarities at most: two of them are 128 KB.
BLOCK = 128


def loss_and_gradient(
    student: Tensor,  # [B, N, D]
    teacher: Tensor,  # [B, N, E]
    apply_norm: bool,
    clamp_student: bool,
    clamp_teacher: bool,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The loss [] and its gradient [B, N, D] of the student, empty unless wanted; float32."""
    images, patches, _ = student.shape
    count = images * patches**2
    rows = contrastive_cpp.prepare(student.flatten(0, 1), apply_norm)
    unit = rows.values.view(student.shape)
    unit_teacher = contrastive_cpp.prepare(teacher.flatten(0, 1), apply_norm).values
    # Blocks of about equal size, so that most tiles are off the diagonal.
    block = -(-patches // -(-patches // BLOCK))
    tasks = min(images, torch.get_num_threads())
    scratch = unit.new_empty((tasks, 2 * block**2))
    parts = unit.new_empty((images,), dtype=torch.float64)
    gradient = torch.empty_like(unit) if wants_gradient else None
    torch.ops.fastssl_csrc.gram_loss(
        *(unit, unit_teacher.view(teacher.shape), block, clamp_student, clamp_teacher),
        *(4 / count, scratch, parts, gradient),
    )
    loss = (parts.sum() / count).float()
    if gradient is None:
        return loss, unit.new_empty((0,))
    if apply_norm:
        contrastive_cpp.project(gradient.flatten(0, 1), rows, gradient.flatten(0, 1))
    return loss, gradient
