"""The steps of view_cross_entropy.py in Triton, with the signatures of the C++ ops.

S student views, T teacher views, B images, K prototypes, C chunks of prototypes; scores are logits
over temperature in units of log 2. The rows of `parts` [B, width, C] are described in
csrc/cpu/view_cross_entropy.h.
"""

from dataclasses import dataclass

from torch import Tensor

from fastssl.kernels.common import triton_view_kernels as kernels
from fastssl.kernels.common.triton_utils import AotCase, cdiv, device_properties, next_power_of_2


@dataclass(frozen=True)
class Config:
    """A program works on one chunk of BLOCK_K prototypes."""

    BLOCK_K: int = 1024
    num_warps: int = 4
    # Images that are added up at a time.
    BLOCK_B: int = 1024
    # Programs for every processor, where the images are cut into slices.
    PROGRAMS: int = 8


CONFIG = Config()


def block_k(num_prototypes: int) -> int:
    return min(CONFIG.BLOCK_K, max(16, next_power_of_2(num_prototypes)))


def num_slices(student: Tensor, chunks: int) -> int:
    """As many as give every processor its programs."""
    processors = device_properties(student.device).num_processors
    return max(1, min(student.shape[1], CONFIG.PROGRAMS * processors // chunks))


def _log_u_stride(log_u: Tensor | None) -> int:
    return 0 if log_u is None or log_u.shape[0] == 1 else log_u.stride(0)


def _or(tensor: Tensor | None, placeholder: Tensor) -> Tensor:
    return placeholder if tensor is None else tensor


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
    first_chunk: int,
    slices: int,
    parts: Tensor,
    teacher_sums: Tensor | None,
) -> None:
    num_student, batch, num_prototypes = student.shape
    num_teacher = teacher.shape[0]
    block = block_k(num_prototypes)
    chunks = cdiv(num_prototypes, block)
    kernels.view_cross_entropy_parts_kernel[(slices * chunks,)](
        student,
        teacher,
        _or(temps, parts),
        _or(center, parts),
        _or(log_u, parts),
        _or(student_scale, parts),
        _or(teacher_scale, parts),
        _or(num_rows, parts),
        parts,
        _or(teacher_sums, parts),
        num_student,
        num_teacher,
        batch,
        num_prototypes,
        parts.shape[2],
        chunks,
        first_chunk,
        cdiv(batch, slices),
        _log_u_stride(log_u),
        student_temp,
        teacher_temp,
        BLOCK_K=block,
        HAS_TEMPS=temps is not None,
        HAS_CENTER=center is not None,
        HAS_LOG_U=log_u is not None,
        HAS_SCALE=student_scale is not None,
        HAS_NUM_ROWS=num_rows is not None,
        WANTS_SUMS=teacher_sums is not None,
        ONE_TEACHER=num_teacher == 1,
        num_warps=CONFIG.num_warps,
    )


def collapse(
    num_student: int,
    num_teacher: int,
    num_rows: Tensor | None,
    columns: int,
    parts: Tensor,
) -> None:
    batch = parts.shape[0]
    if batch == 0:
        return
    kernels.view_cross_entropy_collapse_kernel[(batch,)](
        parts,
        _or(num_rows, parts),
        num_student,
        num_teacher,
        batch,
        parts.shape[2],
        columns,
        HAS_NUM_ROWS=num_rows is not None,
        BLOCK_C=next_power_of_2(parts.shape[2]),
        num_warps=1,
    )


def combine(
    parts: Tensor,
    log_v: Tensor | None,
    row_weights: Tensor | None,
    num_rows: Tensor | None,
    skip_same_view: bool,
    mean: bool,
    per_image: Tensor,
    student_stats: Tensor,
    teacher_stats: Tensor,
    loss: Tensor,
    entropy: Tensor,
    norm: Tensor,
) -> None:
    num_student, batch, _ = student_stats.shape
    num_teacher, chunks = teacher_stats.shape[0], parts.shape[2]
    if batch > 0:
        kernels.view_cross_entropy_combine_kernel[(batch,)](
            parts,
            _or(log_v, parts),
            _or(num_rows, parts),
            per_image,
            student_stats,
            teacher_stats,
            num_student,
            batch,
            chunks,
            T=num_teacher,
            BLOCK_T=next_power_of_2(num_teacher),
            BLOCK_C=next_power_of_2(chunks),
            SKIP=skip_same_view,
            HAS_LOG_V=log_v is not None,
            HAS_NUM_ROWS=num_rows is not None,
            num_warps=CONFIG.num_warps,
        )
    num_pairs = num_student * num_teacher - skip_same_view * min(num_student, num_teacher)
    kernels.view_cross_entropy_total_kernel[(1,)](
        per_image,
        _or(row_weights, per_image),
        _or(num_rows, per_image),
        loss,
        entropy,
        norm,
        batch,
        num_pairs,
        num_teacher,
        MEAN=mean,
        HAS_WEIGHTS=row_weights is not None,
        HAS_NUM_ROWS=num_rows is not None,
        BLOCK_B=CONFIG.BLOCK_B,
        num_warps=CONFIG.num_warps,
    )


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
    num_student, batch, num_prototypes = student.shape
    num_teacher = teacher.shape[0]
    block = block_k(num_prototypes)
    chunks = cdiv(num_prototypes, block)
    if batch == 0:
        return
    kernels.view_cross_entropy_gradient_kernel[(batch * chunks,)](
        dloss,
        student,
        teacher,
        _or(temps, norm),
        _or(center, norm),
        _or(log_u, norm),
        _or(student_scale, norm),
        _or(teacher_scale, norm),
        _or(num_rows, norm),
        _or(row_weights, norm),
        student_stats,
        teacher_stats,
        norm,
        dstudent,
        num_student,
        num_teacher,
        batch,
        num_prototypes,
        chunks,
        _log_u_stride(log_u),
        student_temp,
        teacher_temp,
        BLOCK_K=block,
        HAS_TEMPS=temps is not None,
        SKIP=skip_same_view,
        HAS_CENTER=center is not None,
        HAS_LOG_U=log_u is not None,
        HAS_SCALE=student_scale is not None,
        HAS_NUM_ROWS=num_rows is not None,
        HAS_WEIGHTS=row_weights is not None,
        num_warps=CONFIG.num_warps,
    )


_INPUTS = {"student_ptr": "*bf16", "teacher_ptr": "*bf16", "num_rows_ptr": "*i64"}
_INPUTS |= dict.fromkeys(("temps_ptr", "center_ptr", "log_u_ptr"), "*fp32")
_INPUTS |= dict.fromkeys(("student_scale_ptr", "teacher_scale_ptr"), "*fp32")
_STATS = dict.fromkeys(("student_stats_ptr", "teacher_stats_ptr"), "*fp32")
_SIZES = dict.fromkeys(("S", "T", "B", "K", "C", "chunks", "log_u_stride"), "i32")
_TEMPERATURES = dict.fromkeys(("student_temp", "teacher_temp"), "fp32")


def pass_cases(num_prototypes: int, scaled: bool) -> list[AotCase]:
    """The two passes over bf16 logits: `views`, 10 x 2 crops with a center, and `masked`, masked
    tokens with Sinkhorn's vectors. `scaled`: with a length for every prototype."""
    cases = []
    for masked in (False, True):
        variant = ("scaled_" if scaled else "") + ("masked" if masked else "views")
        terms = {"HAS_TEMPS": masked, "HAS_CENTER": not masked, "HAS_LOG_U": masked}
        terms |= {"HAS_SCALE": scaled, "HAS_NUM_ROWS": masked, "BLOCK_K": block_k(num_prototypes)}
        parts = {"parts_ptr": "*fp32", "sums_ptr": "*fp32", "first_chunk": "i32"}
        parts |= {"images_per_slice": "i32"}
        gradient = dict.fromkeys(("dloss_ptr", "weights_ptr", "norm_ptr"), "*fp32")
        cases += [
            AotCase(
                kernels.view_cross_entropy_parts_kernel,
                _INPUTS | parts | _SIZES | _TEMPERATURES,
                terms | {"WANTS_SUMS": True, "ONE_TEACHER": masked},
                CONFIG.num_warps,
                variant=variant,
            ),
            AotCase(
                kernels.view_cross_entropy_gradient_kernel,
                _INPUTS | _STATS | gradient | {"dstudent_ptr": "*bf16"} | _SIZES | _TEMPERATURES,
                terms | {"SKIP": not masked, "HAS_WEIGHTS": masked},
                CONFIG.num_warps,
                variant=variant,
            ),
        ]
    return cases


def combine_cases(chunks: int) -> list[AotCase]:
    """What comes after the first pass, for the same two uses."""
    cases = []
    for num_teacher, masked in ((2, False), (1, True)):
        variant = "masked" if masked else "views"
        cases += [
            AotCase(
                kernels.view_cross_entropy_combine_kernel,
                {"parts_ptr": "*fp32", "log_v_ptr": "*fp32", "num_rows_ptr": "*i64"}
                | {"images_ptr": "*fp32"}
                | _STATS
                | _SIZES,
                {"T": num_teacher, "BLOCK_T": next_power_of_2(num_teacher)}
                | {"BLOCK_C": next_power_of_2(chunks), "SKIP": not masked}
                | {"HAS_LOG_V": masked, "HAS_NUM_ROWS": masked},
                CONFIG.num_warps,
                variant=variant,
            ),
            AotCase(
                kernels.view_cross_entropy_total_kernel,
                {"images_ptr": "*fp32", "weights_ptr": "*fp32", "num_rows_ptr": "*i64"}
                | dict.fromkeys(("loss_ptr", "entropy_ptr", "norm_ptr"), "*fp32")
                | dict.fromkeys(("B", "num_pairs", "num_teacher"), "i32"),
                {"MEAN": not masked, "HAS_WEIGHTS": masked, "HAS_NUM_ROWS": masked}
                | {"BLOCK_B": CONFIG.BLOCK_B},
                CONFIG.num_warps,
                variant=variant,
            ),
        ]
    return cases


def collapse_cases(columns: int) -> list[AotCase]:
    return [
        AotCase(
            kernels.view_cross_entropy_collapse_kernel,
            {"parts_ptr": "*fp32", "num_rows_ptr": "*i64", "columns": "i32"} | _SIZES,
            {"HAS_NUM_ROWS": True, "BLOCK_C": next_power_of_2(columns)},
            num_warps=1,
        )
    ]
