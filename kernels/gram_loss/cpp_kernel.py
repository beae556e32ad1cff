"""gram_loss on a CPU: scratch memory and calls of csrc/cpu/gram_loss.cpp. I images of N patches."""

import torch
from torch import Tensor

from fastssl.kernels.common.contrastive import Rows
from fastssl.kernels.common.contrastive_cpp import prepare, project

__all__ = ["compare", "prepare"]

# Rows and columns of a tile of similarities at most: two of them are 128 KB.
BLOCK = 128


def compare(
    images: int,
    rows: tuple[Rows, Rows],  # student's [I N, D] and teacher's [I N, E]
    others: tuple[Rows, Rows] | None,  # [I N, D] and [I N, E]; None: the rows themselves
    clamp_student: bool,
    clamp_teacher: bool,
    scale: float,
    gradient: Tensor | None,  # [I N, D] float32, written where given
) -> Tensor:  # [] float64
    """The sum of squared differences of an image's similarities of rows and others; `gradient` is
    scale times the differences' product with the others, as a gradient of the rows' features."""
    student, teacher = (r.values.unflatten(0, (images, -1)) for r in rows)
    columns = (None, None)
    if others is not None:
        columns = tuple(r.values.unflatten(0, (images, -1)) for r in others)
    patches = student.shape[1]
    # Blocks of about equal size, so that most tiles are off the diagonal.
    blocks = -(-patches // BLOCK)
    block = -(-patches // blocks)
    scratch = student.new_empty((torch.get_num_threads(), 2 * block**2))
    parts = student.new_empty((images, -(-patches // block)), dtype=torch.float64)
    torch.ops.fastssl_csrc.gram_loss(
        *(student, teacher, *columns, block, clamp_student, clamp_teacher, scale),
        *(scratch, parts, None if gradient is None else gradient.view(student.shape)),
    )
    if gradient is not None and rows[0].inverse is not None:
        project(gradient, rows[0], gradient)
    return parts.sum()
