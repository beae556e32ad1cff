"""Argument checks of the losses on Gram and covariance matrices."""

import math

from torch import Tensor

from fastssl.kernels.common.checks import check_shape, check_tensor


def check_batch(name: str, value: object, **kwargs: object) -> None:
    """[N, D] with at least one sample and one feature."""
    check_tensor(name, value, dim=2, **kwargs)
    if 0 in value.shape:
        raise ValueError(
            f"{name} must have at least one row and one column, got {list(value.shape)}"
        )


def check_pair(z0: object, z1: object) -> None:
    """Two views of one batch: equal shapes, dtypes and devices."""
    check_batch("z0", z0)
    check_tensor("z1", z1, dim=2, device=z0.device)
    check_shape("z1", z1, tuple(z0.shape), "[N, D] as z0")
    if z1.dtype != z0.dtype:
        raise TypeError(f"z1 must have z0's dtype {z0.dtype}, got {z1.dtype}")


def check_number(name: str, value: object, *, positive: bool = False) -> None:
    """Refuse what is not a finite number >= 0 (> 0)."""
    if isinstance(value, (Tensor, bool)) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not 0 <= value < math.inf or (positive and value == 0):
        sign = "positive" if positive else "at least 0"
        raise ValueError(f"{name} must be {sign} and finite, got {value}")
