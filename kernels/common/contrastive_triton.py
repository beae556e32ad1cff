"""The passes of contrastive losses in Triton; same functions as contrastive_cpp.py. N rows, C
columns, D dimensions.

Features come as they are, in their own dtype; their inverse lengths multiply the products.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastssl.kernels.common import contrastive_triton_kernels as kernels
from fastssl.kernels.common.contrastive import (
    SMALLEST_NORM,
    Rows,
    State,
    merge_slices,
    row_products,
)
from fastssl.kernels.common.libraries import triton_interprets
from fastssl.kernels.common.triton_utils import cdiv, device_properties, next_power_of_2


@dataclass(frozen=True)
class Config:
    """Tiles of BLOCK_R rows times BLOCK_C columns; features of up to `limit` dimensions. Float32
    products are three TF32 ones while their parts fit in registers."""

    limit: int
    BLOCK_R: int
    BLOCK_C: int
    num_warps: int
    num_stages: int
    precision: str = "ieee"


# By bytes per element: the largest tiles that need no stack on sm_80, sm_90 and sm_100.
CONFIGS = {
    2: (Config(128, 64, 64, 8, 3), Config(256, 32, 32, 4, 2), Config(512, 32, 32, 8, 2)),
    4: (Config(128, 16, 16, 4, 2, "tf32x3"), Config(512, 16, 16, 8, 2)),
}
# Programs per processor of a stream, which a few rows alone would not give.
WAVES = 2
# Negatives of one row that its program takes at a time.
BLOCK_M = 32


def block_dim(dim: int) -> int:
    return max(16, next_power_of_2(dim))


def _tiles(element_size: int, dim: int) -> tuple[dict[str, object], dict[str, int]]:
    """Compile-time sizes, and how to launch them."""
    chosen = next(c for c in CONFIGS[element_size] if dim <= c.limit)
    sizes = {
        "PRECISION": chosen.precision,
        "BLOCK_R": chosen.BLOCK_R,
        "BLOCK_C": chosen.BLOCK_C,
        "BLOCK_D": block_dim(dim),
    }
    return sizes, {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}


def options(values: Tensor) -> dict[str, object]:
    """What every kernel on tiles of scores is launched with."""
    sizes, launch = _tiles(values.element_size(), values.shape[-1])
    # Triton's interpreter takes the bits of bfloat16 for integers in products.
    upcasts = values.dtype == torch.bfloat16 and triton_interprets()
    return {"IS_HALF": values.dtype == torch.float16, "UPCASTS": upcasts, **sizes, **launch}


def prepare(features: Tensor, normalize: bool) -> Rows:
    if not normalize:
        return Rows(features, None, False)
    norm = torch.linalg.vector_norm(features, dim=1, dtype=torch.float32)
    return Rows(features, norm.clamp_(min=SMALLEST_NORM).reciprocal_(), False)


def prepare_pair(z0: Tensor, z1: Tensor) -> Rows:
    """Both views, one after the other."""
    return prepare(torch.cat([z0, z1]), True)


def _given(value: Tensor | None, other: Tensor) -> Tensor:
    return other if value is None else value


def stream(
    rows: Rows, columns: Rows, factor: Tensor, state: State, skip_from: int | None = None
) -> None:
    """More keys for the softmax of every row, without column skip_from + row if that is given."""
    num_rows, dim = rows.values.shape
    num_columns = columns.values.shape[0]
    if num_columns == 0:
        return
    launch = options(rows.values)
    row_blocks = cdiv(num_rows, launch["BLOCK_R"])
    column_blocks = cdiv(num_columns, launch["BLOCK_C"])
    programs = WAVES * device_properties(rows.values.device).num_processors
    slices = min(column_blocks, cdiv(programs, row_blocks))
    columns_per_slice = cdiv(column_blocks, slices) * launch["BLOCK_C"]
    slices = cdiv(num_columns, columns_per_slice)
    top, total = state.top.new_empty((2, slices, num_rows))
    weighted = None
    if state.weighted is not None:
        weighted = state.weighted.new_empty((slices, num_rows, dim))
    kernels._contrastive_stream_kernel[(row_blocks * slices,)](
        rows.values,
        _given(rows.inverse, top),
        columns.values,
        _given(columns.inverse, top),
        factor,
        top,
        total,
        _given(weighted, top),
        num_rows,
        num_columns,
        dim,
        skip_from or 0,
        columns_per_slice,
        HAS_ROW_SCALE=rows.inverse is not None,
        HAS_COLUMN_SCALE=columns.inverse is not None,
        SKIPS_OWN=skip_from is not None,
        HAS_WEIGHTED=weighted is not None,
        **launch,
    )
    merge_slices(state, State(top, total.double(), weighted))


def stream_per_row(rows: Rows, negatives: Tensor, factor: Tensor, state: State) -> None:
    """More keys, negatives [N, M, D], each for one row."""
    num_rows, num_negatives, dim = negatives.shape
    if num_negatives == 0:
        return
    top, total = state.top.new_empty((2, 1, num_rows))
    weighted = None if state.weighted is None else torch.empty_like(state.weighted)[None]
    kernels._contrastive_per_row_kernel[(num_rows,)](
        rows.values,
        _given(rows.inverse, top),
        negatives,
        factor,
        top,
        total,
        _given(weighted, top),
        num_negatives,
        dim,
        HAS_ROW_SCALE=rows.inverse is not None,
        HAS_WEIGHTED=weighted is not None,
        BLOCK_M=BLOCK_M,
        BLOCK_D=block_dim(dim),
        num_warps=4,
    )
    merge_slices(state, State(top, total.double(), weighted))


def key_gradient(rows: Rows, columns: Rows, factor: Tensor, log2_total: Tensor) -> Tensor:
    """sum_i 2^(score[i, j] - log2_total[i]) row[i] for each column j, [C, D]."""
    # The same kernel with the roles swapped: columns gather, rows bring their totals.
    return _gradient(columns, rows, 0, factor, (None, log2_total), None, False)


def pair_gradient(
    rows: Rows,
    columns: Rows,
    first: int,
    factor: Tensor,
    totals: Tensor,  # [C]
    weights: Tensor,  # [C]
    gradients: tuple[Tensor, Tensor],  # of the first and the second half of the rows
) -> None:
    """gradient[i] = sum_j (w[i] 2^(score[i, j] - total[i]) + w[j] 2^(score[i, j] - total[j]))
    column[j], without j = first + i."""
    own = totals[first : first + len(rows.values)]
    gradient = _gradient(rows, columns, first, factor, (own, totals), weights, True)
    for target, half in zip(gradients, gradient.chunk(2), strict=True):
        target.copy_(half)


def _gradient(
    rows: Rows,
    columns: Rows,
    first: int,
    factor: Tensor,
    totals: tuple[Tensor | None, Tensor],  # of the rows and of the columns
    weights: Tensor | None,  # of the columns
    skips_own: bool,
) -> Tensor:  # [N, D] float32
    num_rows, dim = rows.values.shape
    gradient = torch.empty_like(rows.values, dtype=torch.float32)
    launch = options(rows.values)
    kernels._contrastive_gradient_kernel[(cdiv(num_rows, launch["BLOCK_R"]),)](
        rows.values,
        _given(rows.inverse, gradient),
        columns.values,
        _given(columns.inverse, gradient),
        factor,
        _given(totals[0], gradient),
        totals[1],
        _given(weights, gradient),
        gradient,
        num_rows,
        columns.values.shape[0],
        dim,
        first,
        HAS_ROW_SCALE=rows.inverse is not None,
        HAS_COLUMN_SCALE=columns.inverse is not None,
        IS_PAIR=skips_own,
        **launch,
    )
    return gradient


def project(gradient: Tensor, rows: Rows, out: Tensor) -> None:
    """From the gradient of unit vectors to that of the features."""
    if rows.inverse is not None:
        unit = rows.unit()
        along = row_products(gradient, unit)
        gradient = torch.addcmul(gradient, along[:, None], unit, value=-1)
        gradient.mul_(rows.inverse[:, None])
    out.copy_(gradient)


def inner_products(a: Rows, b: Rows) -> Tensor:
    return row_products(a.unit(), b.unit())


def finish_pair(
    gradient: Tensor,  # [N, D]
    here: Rows,
    there: Rows,
    weight: Tensor,  # []
    scale: Tensor,  # []
    along: Tensor,  # []
    out: Tensor,  # [N, D]
) -> None:
    """out = the features' gradient, from scale * (gradient + weight * there) of unit vectors;
    along += the latter's products with `here`."""
    gradient = torch.addcmul(gradient, weight, there.unit()).mul_(scale)
    along += row_products(gradient, here.unit()).sum()
    project(gradient, here, out)


def stream_pairs(rows: Rows, columns: Rows, first: int, factor: Tensor, state: State) -> None:
    """The softmax of every row over all columns but its own, number first + row."""
    stream(rows, columns, factor, state, skip_from=first)


def aot_options(dtype: str, dim: int) -> tuple[dict[str, object], dict[str, int]]:
    """`options` of features that need not exist."""
    sizes, launch = _tiles(4 if dtype == "fp32" else 2, dim)
    return {"IS_HALF": dtype == "fp16", "UPCASTS": False, **sizes}, launch


_FEATURES = ("rows_ptr", "columns_ptr", "negatives_ptr")
_SIZES = ("R", "C", "D", "M", "first", "columns_per_slice")


def _signature(kernel: object) -> Callable[[str], dict[str, str]]:
    def of(dtype: str) -> dict[str, str]:
        names = [name for name in kernel.arg_names if name.endswith("_ptr") or name in _SIZES]
        types = {name: f"*{dtype}" for name in _FEATURES} | dict.fromkeys(_SIZES, "i32")
        return {name: types.get(name, "*fp32") for name in names}

    return of


# Triton types of the runtime arguments, for features of a dtype.
SIGNATURES = {
    "stream": _signature(kernels._contrastive_stream_kernel),
    "per_row": _signature(kernels._contrastive_per_row_kernel),
    "gradient": _signature(kernels._contrastive_gradient_kernel),
}
