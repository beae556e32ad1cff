"""What dino_cross_entropy and linear_dino_cross_entropy share: their steps, on cpp, Triton or cuda.

1. `fill_parts`: one pass over a block of prototypes; per image and chunk of prototypes, maxima,
   sums of exponentials and products of every pair of views go to `parts`.
2. `collapse`: the chunks seen so far become one, where there is no room for all.
3. `combine`: from the parts of all chunks to the loss and each view's (max, factor).
4. `gradient`: one more pass over a block of prototypes.

S student views, T teacher views, B images, K prototypes, C chunks. csrc/cpu/view_cross_entropy.h
describes the layout of `parts`; scores are logits over temperature in units of log 2.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

# Prototypes per chunk of the C++ kernel, and the teacher views that its tiles have room for.
CPP_CHUNK = 1024
CPP_MAX_TEACHER_VIEWS = 16
# Enough independent pieces of work for the processors of a large machine.
CPP_PIECES = 64


@dataclass(frozen=True)
class Terms:
    """What turns logits into the loss, in the order of the ops' arguments; tensors are contiguous
    rows, float32 but for num_rows (int64)."""

    temps: Tensor | None  # [2], in place of the two numbers
    center: Tensor | None  # [K]
    log_u: Tensor | None  # [1, K] or [T, K]
    log_v: Tensor | None  # [T, B]
    row_weights: Tensor | None  # [B]
    num_rows: Tensor | None  # []
    student_temp: float
    teacher_temp: float
    skip_same_view: bool
    mean: bool
    student_scale: Tensor | None = None  # [K], times the student's logits
    teacher_scale: Tensor | None = None  # [K]

    def arguments(self) -> tuple:
        return (
            *(self.temps, self.center, self.log_u, self.log_v, self.row_weights, self.num_rows),
            *(self.student_temp, self.teacher_temp, self.skip_same_view, self.mean),
        )


def cannot_run_cpp(teacher: Tensor) -> str | None:
    if teacher.shape[0] > CPP_MAX_TEACHER_VIEWS:
        return f"the C++ kernel holds {CPP_MAX_TEACHER_VIEWS} teacher views, not {teacher.shape[0]}"
    return None


def gpu_kernels(backend: str) -> ModuleType:
    if backend == "cuda":
        from fastssl.kernels.common import cuda_view_cross_entropy as kernels
    else:
        from fastssl.kernels.common import triton_view_cross_entropy as kernels
    return kernels


def num_chunks(backend: str, student: Tensor, num_teacher: int) -> int:
    num_prototypes = student.shape[2]
    if backend == "cpp":
        return -(-num_prototypes // CPP_CHUNK)
    if backend == "cuda":
        return gpu_kernels(backend).num_cells(student, num_teacher)
    return -(-num_prototypes // gpu_kernels(backend).block_k(num_prototypes))


def num_slices(backend: str, student: Tensor, chunks: int) -> int:
    """Slices of the batch, each of which sums the teacher's logits by itself: a function of shapes
    (and of the GPU), never of the number of threads."""
    if backend == "cpp":
        return max(1, min(student.shape[1], -(-CPP_PIECES // chunks)))
    return gpu_kernels(backend).num_slices(student, chunks)


def empty_parts(student: Tensor, num_teacher: int, chunks: int) -> Tensor:  # [B, width, C]
    num_student, batch = student.shape[:2]
    width = 2 * num_student + 3 * num_teacher + num_student * num_teacher
    return student.new_empty((batch, width, chunks), dtype=torch.float32)


def fill_parts(
    backend: str,
    student: Tensor,  # [S, B, K], a block of prototypes
    teacher: Tensor,  # [T, B, K]
    terms: Terms,  # of that block
    first_chunk: int,
    parts: Tensor,  # [B, width, C], columns first_chunk and on are filled
    teacher_sums: Tensor | None,  # [num_slices, K], filled where wanted
) -> None:
    chunks = num_chunks(backend, student, teacher.shape[0])
    slices = num_slices(backend, student, chunks)
    if backend == "cpp":
        run = torch.ops.fastssl_csrc.dino_cross_entropy_parts
    else:
        run = gpu_kernels(backend).fill_parts
    run(
        student,
        teacher,
        terms.student_temp,
        terms.teacher_temp,
        terms.temps,
        terms.center,
        terms.log_u,
        terms.student_scale,
        terms.teacher_scale,
        terms.num_rows,
        first_chunk,
        slices,
        parts,
        teacher_sums,
    )


def collapse(
    backend: str,
    num_student: int,
    num_teacher: int,
    num_rows: Tensor | None,
    columns: int,
    parts: Tensor,
) -> None:
    """Merge the first `columns` columns of `parts` into the first one."""
    if columns == 1:
        return
    if backend == "cpp":
        run = torch.ops.fastssl_csrc.dino_cross_entropy_collapse
    else:
        run = gpu_kernels(backend).collapse
    run(num_student, num_teacher, num_rows, columns, parts)


@dataclass(frozen=True)
class Results:
    loss: Tensor  # []
    entropy: Tensor  # [], mean over teacher rows
    norm: Tensor  # [], the factor between the weighted sum and the loss
    student_stats: Tensor  # [S, B, 2], (max, factor) with probability = factor * 2^(score - max)
    teacher_stats: Tensor  # [T, B, 2]


def empty_results(student: Tensor, num_teacher: int) -> Results:
    num_student, batch = student.shape[:2]
    shapes = ((), (), (), (num_student, batch, 2), (num_teacher, batch, 2))
    return Results(*(student.new_empty(shape, dtype=torch.float32) for shape in shapes))


def combine(backend: str, parts: Tensor, terms: Terms, results: Results) -> None:
    """Fill `results`; overwrites `parts`."""
    per_image = parts.new_empty((parts.shape[0], 2))
    if backend == "cpp":
        run = torch.ops.fastssl_csrc.dino_cross_entropy_combine
    else:
        run = gpu_kernels(backend).combine
    run(
        parts,
        terms.log_v,
        terms.row_weights,
        terms.num_rows,
        terms.skip_same_view,
        terms.mean,
        per_image,
        results.student_stats,
        results.teacher_stats,
        results.loss,
        results.entropy,
        results.norm,
    )


def gradient(
    backend: str,
    dloss: Tensor,  # []
    student: Tensor,  # [S, B, K], a block of prototypes
    teacher: Tensor,  # [T, B, K]
    terms: Terms,
    student_stats: Tensor,
    teacher_stats: Tensor,
    norm: Tensor,
    dstudent: Tensor,  # [S, B, K], may be student itself
) -> None:
    if backend == "cpp":
        run = torch.ops.fastssl_csrc.dino_cross_entropy_gradient
    else:
        run = gpu_kernels(backend).gradient
    run(
        dloss,
        student,
        teacher,
        terms.student_temp,
        terms.teacher_temp,
        terms.temps,
        terms.center,
        terms.log_u,
        terms.student_scale,
        terms.teacher_scale,
        terms.num_rows,
        terms.row_weights,
        terms.skip_same_view,
        student_stats,
        teacher_stats,
        norm,
        dstudent,
    )


def teacher_mean(
    sums: Tensor,  # [slices, K]
    num_teacher: int,
    batch: int,
    num_rows: Tensor | None,
) -> Tensor:  # [K]
    """Mean of the teacher's logits over its views and the rows in use; 0 without rows."""
    total = sums.sum(dim=0)
    if num_rows is None:
        return total / max(1, num_teacher * batch)
    return total / (num_teacher * num_rows.clamp(0, batch)).clamp(min=1)
