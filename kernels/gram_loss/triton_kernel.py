"""gram_loss in Triton; same functions as cpp_kernel.py. I images; N rows, M columns of similarities
in each; D and E features of student and teacher.

Features come as they are, in their own dtype; their inverse lengths multiply the products. One
kernel makes tiles of differences and their sums of squares, another multiplies them with the
columns; between them lies a panel of differences of limited size. Rows see every column, so their
gradient needs nothing from other rows, and is added to panel after panel.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.contrastive import Rows
from fastssl.kernels.common.contrastive_triton import prepare
from fastssl.kernels.common.libraries import triton_interprets
from fastssl.kernels.common.triton_utils import AotCase, cdiv, next_power_of_2

__all__ = ["aot_cases", "compare", "prepare"]


@dataclass(frozen=True)
class Config:
    """Tiles of BLOCK_R rows times BLOCK_C columns, in steps of BLOCK_K features; the gradient
    BLOCK_D features at a time, in steps of BLOCK_K columns, which divides BLOCK_C. For images of
    up to `limit` rows."""

    limit: float
    BLOCK_R: int
    BLOCK_C: int
    BLOCK_K: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


# By bytes per element, the larger of both. Rows are padded to whole blocks: 196 to 256.
CONFIGS = {
    2: (Config(256, 64, 64, 64, 128, 4, 3), Config(float("inf"), 128, 64, 64, 128, 8, 3)),
    4: (Config(float("inf"), 64, 64, 16, 64, 8, 3),),
}
# Columns of a panel, a multiple of every BLOCK_C, and blocks of rows: 16 Mi differences or fewer.
PANEL, PANEL_BLOCKS = 1024, 128


@triton.jit
def _load(ptr, index, size, k, K: tl.constexpr, BLOCK_K: tl.constexpr, UPCASTS: tl.constexpr):
    pointers = ptr + index.to(tl.int64)[:, None] * K + k[None, :]
    inside = (index < size)[:, None]
    if K % BLOCK_K != 0:
        inside = inside & (k < K)[None, :]
    tile = tl.load(pointers, mask=inside, other=0.0)
    return tile.to(tl.float32) if UPCASTS else tile


@triton.jit
def _load_scale(ptr, index, size, HAS_SCALE: tl.constexpr):
    scale = tl.full(index.shape, 1.0, tl.float32)
    if HAS_SCALE:
        scale = tl.load(ptr + index, mask=index < size, other=0.0)
    return scale


@triton.jit
def _similarities(
    rows_ptr,  # [N, K]
    row_scale,  # [BLOCK_R]
    r,
    N,
    columns_ptr,  # [M, K]
    column_scale,  # [BLOCK_C]
    c,
    M,
    K: tl.constexpr,
    UPCASTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    products = tl.zeros((r.shape[0], c.shape[0]), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        rows = _load(rows_ptr, r, N, k, K, BLOCK_K, UPCASTS)
        columns = _load(columns_ptr, c, M, k, K, BLOCK_K, UPCASTS)
        products = tl.dot(rows, tl.trans(columns), products, input_precision=PRECISION)
    return products * row_scale[:, None] * column_scale[None, :]


@triton.jit
def _gram_loss_tiles_kernel(
    student_ptr,  # [I, N, D]
    student_scale_ptr,  # [I, N] float32, unused unless HAS_SCALE
    teacher_ptr,  # [I, N, E]
    teacher_scale_ptr,  # [I, N] float32, unused unless HAS_SCALE
    other_student_ptr,  # [I, M, D]
    other_student_scale_ptr,  # [I, M] float32, unused unless HAS_SCALE
    other_teacher_ptr,  # [I, M, E]
    other_teacher_scale_ptr,  # [I, M] float32, unused unless HAS_SCALE
    panel_ptr,  # [blocks of rows, BLOCK_R, PANEL], unused unless WANTS_GRADIENT
    parts_ptr,  # [blocks of rows of all images, blocks of columns] float32
    N,
    M,
    first_block,  # of rows
    first,  # column
    width,  # columns, of the panel
    D: tl.constexpr,
    E: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    CLAMPS_STUDENT: tl.constexpr,
    CLAMPS_TEACHER: tl.constexpr,
    WANTS_GRADIENT: tl.constexpr,
    UPCASTS: tl.constexpr,
    TEACHER_UPCASTS: tl.constexpr,
    PRECISION: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_blocks = tl.cdiv(width, BLOCK_C)
    block = tl.program_id(0) // column_blocks
    start = (tl.program_id(0) % column_blocks) * BLOCK_C
    unit = first_block + block
    image = (unit // tl.cdiv(N, BLOCK_R)).to(tl.int64)
    r = (unit % tl.cdiv(N, BLOCK_R)) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = first + start + tl.arange(0, BLOCK_C)
    column_scale = _load_scale(other_student_scale_ptr + image * M, c, M, HAS_SCALE)
    ours = _similarities(
        student_ptr + image * N * D,
        _load_scale(student_scale_ptr + image * N, r, N, HAS_SCALE),
        r,
        N,
        other_student_ptr + image * M * D,
        column_scale,
        c,
        M,
        D,
        UPCASTS,
        PRECISION,
        BLOCK_K,
    )
    theirs = _similarities(
        teacher_ptr + image * N * E,
        _load_scale(teacher_scale_ptr + image * N, r, N, HAS_SCALE),
        r,
        N,
        other_teacher_ptr + image * M * E,
        _load_scale(other_teacher_scale_ptr + image * M, c, M, HAS_SCALE),
        c,
        M,
        E,
        TEACHER_UPCASTS,
        TEACHER_PRECISION,
        BLOCK_K,
    )
    # Comparisons that keep a NaN.
    if CLAMPS_TEACHER:
        theirs = tl.where(theirs < 0, 0.0, theirs)
    difference = ours - theirs
    if CLAMPS_STUDENT:
        difference = tl.where(ours < 0, -theirs, difference)
    # In one go: Triton 3.6 cannot lay out a sum over rows after one over columns on sm_100.
    total = tl.sum(difference * difference)
    to = unit.to(tl.int64) * tl.cdiv(M, BLOCK_C) + (first + start) // BLOCK_C
    tl.store(parts_ptr + to, total)
    if WANTS_GRADIENT:
        difference *= column_scale[None, :]
        if CLAMPS_STUDENT:
            difference = tl.where(ours < 0, 0.0, difference)
        rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
        places = rows[:, None] * PANEL + start + tl.arange(0, BLOCK_C)[None, :]
        tl.store(panel_ptr + places, difference.to(panel_ptr.dtype.element_ty))


@triton.jit
def _gram_loss_gradient_kernel(
    panel_ptr,  # [blocks of rows, BLOCK_R, PANEL]
    columns_ptr,  # [I, M, D]
    gradient_ptr,  # [I, N, D] float32
    N,
    M,
    first_block,  # of rows
    first,  # column
    width,  # columns, of the panel
    scale,
    D: tl.constexpr,
    ADDS: tl.constexpr,  # to the gradient of panels before
    UPCASTS: tl.constexpr,
    WIDENS: tl.constexpr,
    PRECISION: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    feature_blocks = tl.cdiv(D, BLOCK_D)
    block = tl.program_id(0) // feature_blocks
    d = (tl.program_id(0) % feature_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    unit = first_block + block
    image = (unit // tl.cdiv(N, BLOCK_R)).to(tl.int64)
    r = (unit % tl.cdiv(N, BLOCK_R)) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows_ptr = panel_ptr + (block * BLOCK_R + tl.arange(0, BLOCK_R))[:, None] * PANEL
    sums = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, width, BLOCK_K):
        places = start + tl.arange(0, BLOCK_K)
        panel = tl.load(rows_ptr + places[None, :])
        columns = _load(
            columns_ptr + image * M * D, first + places, M, d, D, BLOCK_D, UPCASTS or WIDENS
        )
        if UPCASTS:
            panel = panel.to(tl.float32)
        sums = tl.dot(panel, columns, sums, input_precision=PRECISION)
    inside = (r < N)[:, None] & (d < D)[None, :]
    at = gradient_ptr + image * N * D + r.to(tl.int64)[:, None] * D + d[None, :]
    sums *= scale
    if ADDS:
        sums += tl.load(at, mask=inside, other=0.0)
    tl.store(at, sums, mask=inside)


@triton.jit
def _gram_loss_project_kernel(
    gradient_ptr,  # [I N, D] float32, from that of unit vectors to that of the features
    features_ptr,  # [I N, D]
    scale_ptr,  # [I N] float32
    D,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    scale = tl.load(scale_ptr + row)
    gradient = tl.load(gradient_ptr + row * D + d, mask=d < D, other=0.0)
    unit = tl.load(features_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32) * scale
    gradient = (gradient - tl.sum(gradient * unit, axis=0) * unit) * scale
    tl.store(gradient_ptr + row * D + d, gradient, mask=d < D)


def _choose(element_size: int, patches: int) -> Config:
    return next(config for config in CONFIGS[element_size] if patches <= config.limit)


def _pick(config: Config, names: str) -> dict[str, int]:
    """Its compile-time sizes called names, and how to launch them."""
    return {name: getattr(config, name) for name in (*names.split(), "num_warps", "num_stages")}


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _upcasts(dtype: torch.dtype) -> bool:
    # Triton's interpreter takes the bits of bfloat16 for integers in products.
    return dtype == torch.bfloat16 and triton_interprets()


def _tile_options(student: torch.dtype, teacher: torch.dtype, config: Config) -> dict[str, object]:
    return {
        "UPCASTS": _upcasts(student),
        "TEACHER_UPCASTS": _upcasts(teacher),
        "PRECISION": _precision(student),
        "TEACHER_PRECISION": _precision(teacher),
        "PANEL": PANEL,
        **_pick(config, "BLOCK_R BLOCK_C BLOCK_K"),
    }


def _gradient_options(student: torch.dtype, config: Config) -> dict[str, object]:
    return {
        "UPCASTS": _upcasts(student),
        # Differences may be beyond the range of float16.
        "WIDENS": student == torch.float16,
        "PRECISION": _precision(student),
        "PANEL": PANEL,
        **_pick(config, "BLOCK_R BLOCK_K BLOCK_D"),
    }


def _row_options(width: int) -> dict[str, int]:
    block = next_power_of_2(width)
    return {"BLOCK_D": block, "num_warps": min(16, max(1, block // 256))}


def _panel_dtype(student: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if student == torch.bfloat16 else torch.float32


def compare(
    images: int,
    rows: tuple[Rows, Rows],  # student's [I N, D] and teacher's [I N, E]
    others: tuple[Rows, Rows] | None,  # [I M, D] and [I M, E]; None: the rows themselves
    clamp_student: bool,
    clamp_teacher: bool,
    scale: float,
    gradient: Tensor | None,  # [I N, D] float32, written where given
) -> Tensor:  # [] float64
    """The sum of squared differences of an image's similarities of rows and others; `gradient` is
    scale times the differences' product with the others, as a gradient of the rows' features."""
    student, teacher = rows[0].values, rows[1].values
    columns = rows if others is None else others
    patches, count, width = len(student) // images, len(columns[0].values) // images, len(student.T)
    config = _choose(max(student.element_size(), teacher.element_size()), patches)
    blocks = images * cdiv(patches, config.BLOCK_R)
    parts = student.new_empty((blocks, cdiv(count, config.BLOCK_C)), dtype=torch.float32)
    panel = parts
    if gradient is not None:
        held = min(blocks, PANEL_BLOCKS) * config.BLOCK_R
        panel = student.new_empty((held, PANEL), dtype=_panel_dtype(student.dtype))
    pointers = []
    for features in (*rows, *columns):
        pointers += [features.values, parts if features.inverse is None else features.inverse]
    tile_options = _tile_options(student.dtype, teacher.dtype, config)
    gradient_options = _gradient_options(student.dtype, config)
    for block in range(0, blocks, PANEL_BLOCKS):
        held = min(PANEL_BLOCKS, blocks - block)
        for first in range(0, count, PANEL):
            part = (block, first, min(PANEL, count - first))
            _gram_loss_tiles_kernel[(held * cdiv(part[2], config.BLOCK_C),)](
                *(*pointers, panel, parts, patches, count, *part),
                D=width,
                E=teacher.shape[1],
                HAS_SCALE=rows[0].inverse is not None,
                CLAMPS_STUDENT=clamp_student,
                CLAMPS_TEACHER=clamp_teacher,
                WANTS_GRADIENT=gradient is not None,
                **tile_options,
            )
            if gradient is not None:
                _gram_loss_gradient_kernel[(held * cdiv(width, config.BLOCK_D),)](
                    *(panel, columns[0].values, gradient, patches, count, *part, scale),
                    D=width,
                    ADDS=first > 0,
                    **gradient_options,
                )
    if gradient is not None and rows[0].inverse is not None:
        _gram_loss_project_kernel[(len(student),)](
            gradient, student, rows[0].inverse, width, **_row_options(width)
        )
    return parts.sum(dtype=torch.float64)


_SIZES = ("N", "M", "first_block", "first", "width")
_FEATURES = ("student_ptr", "teacher_ptr", "other_student_ptr", "other_teacher_ptr")


def aot_cases() -> list[AotCase]:
    """Every configuration at 384 dimensions of the student and 1024 of the teacher."""
    cases = []
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

    def add(kernel: object, variant: str, types: dict[str, str], options: dict) -> None:
        types |= dict.fromkeys(("D", *_SIZES), "i32")
        launch = {key: options.pop(key) for key in ("num_warps", "num_stages") if key in options}
        names = [name for name in kernel.arg_names if name not in options]
        signature = {name: types.get(name, "*fp32") for name in names}
        cases.append(AotCase(kernel, signature, options, **launch, variant=variant))

    for name, dtype in dtypes.items():
        panel = {"panel_ptr": "*bf16" if _panel_dtype(dtype) == torch.bfloat16 else "*fp32"}
        for config in CONFIGS[dtype.itemsize]:
            variant = f"{name}_{config.BLOCK_R}"
            features = dict.fromkeys(_FEATURES, f"*{name}") | panel
            flags = dict.fromkeys(("HAS_SCALE", "CLAMPS_STUDENT", "CLAMPS_TEACHER"), True)
            flags |= {"D": 384, "E": 1024, **_tile_options(dtype, dtype, config)}
            for wants, end in ((True, ""), (False, "_loss")):
                options = {"WANTS_GRADIENT": wants, **flags}
                add(_gram_loss_tiles_kernel, variant + end, dict(features), options)
            columns = {"columns_ptr": f"*{name}", "scale": "fp32", **panel}
            options = {"D": 384, "ADDS": True, **_gradient_options(dtype, config)}
            add(_gram_loss_gradient_kernel, variant, columns, options)
    for width in (384, 4096):
        types = {"features_ptr": "*bf16"}
        add(_gram_loss_project_kernel, str(width), types, _row_options(width))
    return cases
