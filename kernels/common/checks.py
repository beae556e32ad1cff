"""Argument checks. TypeError for the wrong kind of thing, ValueError for the wrong value; every
message names the argument, what was expected and what came."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(
    name: str,
    value: object,
    *,
    dim: int | tuple[int, ...] | None = None,
    dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
    device: torch.device | None = None,
) -> None:
    """Refuse what is not a tensor of one of `dtypes`, of `dim` dimensions, on `device`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        came = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{name} must be {_names(dtypes)}, got {came}")
    allowed = (dim,) if isinstance(dim, int) else dim
    if allowed is not None and value.dim() not in allowed:
        expected = " or ".join(str(d) for d in allowed)
        raise ValueError(f"{name} must have {expected} dimensions, got shape {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")


def check_shape(name: str, value: Tensor, expected: Sequence[int | None], legend: str) -> None:
    """Refuse a shape other than `expected` (None: any size); `legend` is its text, "[B, N]"."""
    shape = value.shape
    fits = len(shape) == len(expected)
    if fits:
        for s, e in zip(shape, expected, strict=True):
            # A loop, which takes less time than a generator.
            fits = fits and (e is None or s == e)
    if not fits:
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} must have shape {legend} = [{wanted}], got {list(shape)}")


def check_int(name: str, value: object, minimum: int, maximum: int | None = None) -> None:
    """Refuse what is not an int in [minimum, maximum]."""
    # Under torch.compile a size may be a symbolic integer.
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum or (maximum is not None and value > maximum):
        upper = "" if maximum is None else f" and at most {maximum}"
        raise ValueError(f"{name} must be at least {minimum}{upper}, got {value}")
