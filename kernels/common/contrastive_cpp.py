"""The passes of contrastive losses on a CPU: scratch memory and calls of csrc/cpu/contrastive.cpp
and contrastive_pairs.cpp. N rows, C columns, D dimensions.
"""

import torch
from torch import Tensor

from fastssl.kernels.common.contrastive import Rows, State, merge_slices

# A tile of scores, of which every thread has one: 256 KB.
TILE_ROWS, TILE_COLUMNS = 128, 512
# Steps of a stream that threads share out. Never a function of their number.
STEPS = 16
# With scores of at most this (in units of log 2) the exponentials, sums of 2^30 of them and their
# inverses are float32 numbers as they are.
BOUND = 60.0


def prepare(features: Tensor, normalize: bool) -> Rows:
    if not normalize and features.dtype == torch.float32:
        return Rows(features, None, True)
    values = torch.empty_like(features, dtype=torch.float32)
    inverse = values.new_empty(features.shape[0]) if normalize else None
    torch.ops.fastssl_csrc.contrastive_normalize(features, values, inverse)
    return Rows(values, inverse, True)


def prepare_pair(z0: Tensor, z1: Tensor) -> Rows:
    """Both views, one after the other, as unit vectors."""
    num_images, dim = z0.shape
    values = z0.new_empty((2 * num_images, dim), dtype=torch.float32)
    inverse = values.new_empty(2 * num_images)
    for part, view in enumerate((z0, z1)):
        here = slice(part * num_images, (part + 1) * num_images)
        torch.ops.fastssl_csrc.contrastive_normalize(view, values[here], inverse[here])
    return Rows(values, inverse, True)


def stream(rows: Rows, columns: Rows, factor: Tensor, state: State) -> None:
    """More keys for the softmax of every row."""
    (num_rows, dim), num_columns = rows.values.shape, columns.values.shape[0]
    if num_columns == 0:
        return
    height, width = min(TILE_ROWS, num_rows), min(TILE_COLUMNS, num_columns)
    blocks = -(-num_rows // height)
    slices = min(-(-STEPS // blocks), -(-num_columns // width))
    size = height * width
    if columns.values.dtype != torch.float32:
        size += width * dim
    scratch = state.top.new_empty((torch.get_num_threads(), size))
    into = state.slices(slices)
    torch.ops.fastssl_csrc.contrastive_stream(
        *(rows.values, columns.values, float(factor), height, width, scratch),
        *(into.top, into.total, into.weighted),
    )
    if slices > 1:
        merge_slices(state, into)


def stream_per_row(rows: Rows, negatives: Tensor, factor: Tensor, state: State) -> None:
    """More keys, negatives [N, M, D], each for one row."""
    torch.ops.fastssl_csrc.contrastive_stream_per_row(
        rows.values, negatives, float(factor), state.top, state.total, state.weighted
    )


def key_gradient(rows: Rows, columns: Rows, factor: Tensor, log2_total: Tensor) -> Tensor:
    """sum_i 2^(score[i, j] - log2_total[i]) row[i] for each column j, [C, D]."""
    num_rows, num_columns = len(rows.values), len(columns.values)
    height, width = min(TILE_ROWS, num_rows), min(TILE_COLUMNS, num_columns)
    scratch = log2_total.new_empty((torch.get_num_threads(), height * width))
    gradient = torch.empty_like(columns.values)
    torch.ops.fastssl_csrc.contrastive_key_gradient(
        *(rows.values, columns.values, float(factor), log2_total),
        *(height, width, scratch, gradient),
    )
    return gradient


def project(gradient: Tensor, rows: Rows, out: Tensor) -> None:
    """From the gradient of unit vectors to that of the features."""
    torch.ops.fastssl_csrc.contrastive_project(
        gradient, rows.values, rows.inverse, None, 0.0, 1.0, None, out
    )


def inner_products(a: Rows, b: Rows) -> Tensor:
    products = a.values.new_empty(len(a.values))
    torch.ops.fastssl_csrc.contrastive_inner_products(a.values, b.values, products)
    return products


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
    products = gradient.new_empty(len(gradient))
    torch.ops.fastssl_csrc.contrastive_project(
        *(gradient, here.values, here.inverse, there.values),
        *(float(weight), float(scale), products, out),
    )
    along += products.sum()


def _pair_scratch(rows: Rows) -> tuple[int, Tensor]:
    """Rows per block, and a tile per thread."""
    half = len(rows.values) // 2
    size = min(TILE_COLUMNS, half)
    return size, rows.values.new_empty((torch.get_num_threads(), min(TILE_ROWS, half) * size))


def stream_pairs(rows: Rows, columns: Rows, first: int, factor: Tensor, state: State) -> None:
    """The softmax of every row over all columns but its own, number first + row; columns from
    `first` on are the rows."""
    bounded = float(factor) <= BOUND
    if bounded:
        state.top.zero_()
    torch.ops.fastssl_csrc.contrastive_stream_pairs(
        *(rows.values, columns.values, first, float(factor), bounded, *_pair_scratch(rows)),
        *(state.top, state.total),
    )


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
    bounded = float(factor) <= BOUND
    if bounded:
        weights = weights * (-totals).exp2()
    torch.ops.fastssl_csrc.contrastive_pair_gradient(
        *(rows.values, columns.values, first, float(factor), bounded, *_pair_scratch(rows)),
        *(totals, weights, *gradients),
    )
