"""The steps of view_cross_entropy.py in CUDA C++ (csrc/cuda/dino_cross_entropy.cu), with the
signatures of the C++ ops. A chunk of prototypes is a cell here: what one block works on.

S student views, T teacher views, B images, K prototypes.
"""

import torch
from torch import Tensor

from fastssl.kernels.common import libraries
from fastssl.kernels.common.cuda_device import BLOCKS_PER_PROCESSOR, device_facts

WARPS = 8
# A block's columns, the largest that fits.
CELL_WIDTHS = (2048, 1024, 512, 256)
# Shared memory of a block that lets two of them run on a processor of any architecture.
CELL_BYTES = 48 << 10
# More than this only sm_80, sm_90 and sm_100 have for one block.
MAX_CELL_BYTES = 96 << 10


def shared_bytes(
    num_student: int, num_teacher: int, itemsize: int, width: int, wants_sums: bool, cluster: int
) -> int:
    """Shared memory of a block that holds `width` prototypes: Memory in view_cross_entropy.cuh.

    cluster is 0 in two passes.
    """
    rows = 2 * num_student + 3 * num_teacher + num_student * num_teacher
    counts = (
        4 * num_teacher * width,
        itemsize * num_student * width,
        4 * width * wants_sums,
        8 * (num_student + 2 * num_teacher + WARPS),
        4 * rows * WARPS,
        4 * rows,
        4 * rows * cluster,
        8 * num_student * (cluster > 0),
        8 * num_teacher * (cluster > 0),
    )
    return sum(-(-count // 16) * 16 for count in counts)


def cell_width(num_student: int, num_teacher: int, itemsize: int) -> int | None:
    """Prototypes of a block; None if no width fits."""
    sizes = (num_student, num_teacher, itemsize)
    fitting = [w for w in CELL_WIDTHS if shared_bytes(*sizes, w, True, 0) <= CELL_BYTES]
    if fitting:
        return fitting[0]
    last = CELL_WIDTHS[-1]
    return last if shared_bytes(*sizes, last, True, 0) <= MAX_CELL_BYTES else None


def cannot_run(num_student: int, num_teacher: int, itemsize: int) -> str | None:
    if cell_width(num_student, num_teacher, itemsize) is None:
        return f"{num_student} x {num_teacher} views do not fit into shared memory"
    return None


def num_cells(student: Tensor, num_teacher: int) -> int:
    num_student, _, num_prototypes = student.shape
    return -(-num_prototypes // cell_width(num_student, num_teacher, student.itemsize))


def num_slices(student: Tensor, cells: int) -> int:
    blocks = BLOCKS_PER_PROCESSOR * device_facts(student.device).processors
    return max(1, min(student.shape[1], blocks // cells))


def _loaded() -> None:
    reason = libraries.why_no_cuda_library()
    if reason is not None:
        raise RuntimeError(f"backend 'cuda' cannot run: {reason}")


def fill_parts(
    student: Tensor,
    teacher: Tensor,
    student_temp: float,
    teacher_temp: float,
    temps: Tensor | None,
    center: Tensor | None,
    log_u: Tensor | None,
    student_scale: Tensor | None,
    teacher_scale: Tensor | None,
    num_rows: Tensor | None,
    first_cell: int,
    slices: int,
    parts: Tensor,
    teacher_sums: Tensor | None,
) -> None:
    _loaded()
    if teacher_sums is None:
        # Nothing is summed over images: a block for each.
        slices = max(1, student.shape[1])
    width = cell_width(student.shape[0], teacher.shape[0], student.itemsize)
    torch.ops.fastssl_cuda.dino_cross_entropy_parts(
        *(student, teacher, student_temp, teacher_temp, temps, center, log_u, student_scale),
        *(teacher_scale, num_rows, width, first_cell, slices, parts, teacher_sums),
    )


def collapse(
    num_student: int, num_teacher: int, num_rows: Tensor | None, columns: int, parts: Tensor
) -> None:
    torch.ops.fastssl_cuda.dino_cross_entropy_collapse(
        num_student, num_teacher, num_rows, columns, parts
    )


def combine(parts: Tensor, *arguments: object) -> None:
    torch.ops.fastssl_cuda.dino_cross_entropy_combine(parts, *arguments)


def gradient(
    dloss: Tensor,
    student: Tensor,
    teacher: Tensor,
    student_temp: float,
    teacher_temp: float,
    temps: Tensor | None,
    center: Tensor | None,
    log_u: Tensor | None,
    student_scale: Tensor | None,
    teacher_scale: Tensor | None,
    num_rows: Tensor | None,
    row_weights: Tensor | None,
    skip_same_view: bool,
    student_stats: Tensor,
    teacher_stats: Tensor,
    norm: Tensor,
    dstudent: Tensor,
) -> None:
    _loaded()
    width = cell_width(student.shape[0], teacher.shape[0], student.itemsize)
    torch.ops.fastssl_cuda.dino_cross_entropy_gradient(
        *(dloss, student, teacher, student_temp, teacher_temp, temps, center, log_u),
        *(student_scale, teacher_scale, num_rows, row_weights, skip_same_view, width),
        *(student_stats, teacher_stats, norm, dstudent),
    )
