"""Sizes that follow from an image's and a kernel's, one entry per spatial dimension."""

import math
from collections.abc import Sequence

import torch

from fastssl.kernels.common.checks import check_int


def per_dim(name: str, value: object, num_dims: int, minimum: int) -> tuple[int, ...]:
    """An int for every dimension, or one for each, as a tuple."""
    if not isinstance(value, (tuple, list)):
        value = (value,) * num_dims
    elif len(value) != num_dims:
        raise ValueError(f"{name} must be an int or {num_dims} ints, got {tuple(value)}")
    for entry in value:
        check_int(name, entry, minimum)
    return tuple(value)


def grid_size(
    sizes: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> tuple[int, ...]:
    """The convolution's output size: tokens along each dimension."""
    extents = zip(sizes, kernel_size, stride, padding, strict=True)
    return tuple((size + 2 * p - k) // s + 1 for size, k, s, p in extents)


def unit_grid(
    sizes: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    unit_size: Sequence[int],
) -> tuple[int, ...]:
    """Mask units along each dimension; ValueError where the sizes do not fit."""
    shortest = [max(0, k - 2 * p) for k, p in zip(kernel_size, padding, strict=True)]
    if any(size < least for size, least in zip(sizes, shortest, strict=True)):
        raise ValueError(
            f"images must be at least {_by(shortest)} (kernel_size - 2 * padding), got {_by(sizes)}"
        )
    grid = grid_size(sizes, kernel_size, stride, padding)
    if any(g % u for g, u in zip(grid, unit_size, strict=True)):
        raise ValueError(
            f"the grid of tokens must be divisible by unit_size = {_by(unit_size)}, got "
            f"{_by(grid)} tokens from images of {_by(sizes)}"
        )
    return tuple(g // u for g, u in zip(grid, unit_size, strict=True))


def reads_dropped_units(
    num_kept: int,
    units: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> bool:
    """Whether the window of a kept token can reach a pixel of a unit that is not kept."""
    extents = zip(units, kernel_size, stride, padding, strict=True)
    leaves = any(n > 1 and (k > s or p > 0) for n, k, s, p in extents)
    return leaves and num_kept < math.prod(units)


def check_order(unit_order: object, num_tokens: int) -> None:
    """Refuse what is not a permutation of range(num_tokens), in a tuple or list."""
    if not isinstance(unit_order, (tuple, list)):
        raise TypeError(f"unit_order must be a tuple of ints, got {type(unit_order).__name__}")
    if sorted(unit_order) != list(range(num_tokens)):
        raise ValueError(
            f"unit_order must be a permutation of range({num_tokens}), got {tuple(unit_order)}"
        )


def check_dtype(dtype: object, allowed: Sequence[torch.dtype]) -> None:
    if dtype not in allowed:
        names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"dtype must be {names} or None, got {dtype}")


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
