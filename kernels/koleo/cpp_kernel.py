"""koleo on a CPU: scratch memory and calls of csrc/cpu/koleo.cpp."""

import torch
from torch import Tensor

# As in koleo.cpp: rows and columns of a tile of products.
BLOCK = 256


def normalize(x: Tensor, min_length: float) -> tuple[Tensor, Tensor]:
    """x / norm [N, D] and norm [N], the length of the row, at least min_length; float32."""
    unit, norm = torch.empty_like(x, dtype=torch.float32), x.new_empty(len(x), dtype=torch.float32)
    torch.ops.fastssl_csrc.koleo_normalize(x, min_length, unit, norm)
    return unit, norm


def nearest(x: Tensor, unit: Tensor, norm: Tensor, first: int, count: int) -> Tensor:  # [count]
    """For rows first.. of `unit` the other row of the largest product, the lowest of equal ones."""
    total = len(unit)
    # As many as threads, whatever there is to do: a single task would be no parallel loop, and
    # outside of one torch's products use all threads and sum in another order.
    tasks = torch.get_num_threads()
    scratch = unit.new_empty((tasks, min(BLOCK, count) * min(BLOCK, total)))
    top = unit.new_empty((tasks, count))
    index = torch.empty_like(top, dtype=torch.int32)
    found = unit.new_empty(count, dtype=torch.int64)
    torch.ops.fastssl_csrc.koleo_nearest(unit, first, scratch, top, index, found)
    return found


def distances(unit: Tensor, first: int, nearest: Tensor) -> Tensor:  # [n] float32
    out = unit.new_empty(len(nearest))
    torch.ops.fastssl_csrc.koleo_distances(unit, first, nearest, out)
    return out


def gradient(
    unit: Tensor,  # [C, D]
    first: int,
    norm: Tensor,  # [n]
    min_length: float,
    nearest: Tensor,  # [C]
    weights: Tensor,  # [C]
    order: Tensor,  # [C]
    offsets: Tensor,  # [n + 1]
    dtype: torch.dtype,
) -> Tensor:  # [n, D]
    """Of rows first.., each drawn to its neighbour and to order[offsets[i]:offsets[i + 1]], whose
    neighbour it is."""
    dx = unit.new_empty((len(norm), unit.shape[1]), dtype=dtype)
    torch.ops.fastssl_csrc.koleo_backward(
        unit, first, norm, min_length, nearest, weights, order, offsets, dx
    )
    return dx
