"""What info_nce and nt_xent share: checks, the softmax state of a stream of keys, its passes.

Scores are in units of log 2: factor = log2(e) / temperature times the product of two features. N
rows, C columns of scores, D dimensions.
"""

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from fastssl.kernels.common.checks import check_tensor

LOG2E = math.log2(math.e)
LN2 = math.log(2)
# The norm that a shorter vector is taken to have, as in torch.nn.functional.normalize.
SMALLEST_NORM = 1e-12
# Below the score of any pair: no key has been seen.
LOWEST = -torch.finfo(torch.float32).max
# A row of features and of sums stays in one processor's registers.
MAX_TRITON_DIM = 512


@dataclass(frozen=True)
class Rows:
    """Features as a backend multiplies them: `values` [N, D], times `inverse` [N] unless that is
    None. For cpp float32 and already normalised, `inverse` only remembering the lengths."""

    values: Tensor
    inverse: Tensor | None
    is_unit: bool

    def unit(self) -> Tensor:  # [N, D] float32
        if self.is_unit or self.inverse is None:
            return self.values.float()
        return self.values.float() * self.inverse[:, None]

    def part(self, begin: int, end: int) -> "Rows":
        inverse = None if self.inverse is None else self.inverse[begin:end]
        return Rows(self.values[begin:end], inverse, self.is_unit)


@dataclass
class State:
    """Softmax over the keys seen so far: largest score, sum of 2^(score - top), and the sum of
    that times the key where gradients are wanted."""

    top: Tensor  # [N] float32
    total: Tensor  # [N] float64
    weighted: Tensor | None  # [N, D] float32

    def log2_total(self) -> Tensor:  # [N] float32
        return (self.top.double() + self.total.log2()).float()

    def slices(self, count: int) -> "State":
        """States [count, N] of as many parts of the keys: empty ones, or this one for a single."""
        if count == 1:
            weighted = None if self.weighted is None else self.weighted[None]
            return State(self.top[None], self.total[None], weighted)
        top = torch.full_like(self.top, LOWEST).repeat(count, 1)
        total = torch.zeros_like(top, dtype=torch.float64)
        weighted = None
        if self.weighted is not None:
            weighted = self.weighted.new_zeros((count, *self.weighted.shape))
        return State(top, total, weighted)


def empty_state(num_rows: int, dim: int | None, like: Tensor) -> State:
    """No key seen; `dim` None where no gradient is wanted."""
    top = like.new_full((num_rows,), LOWEST, dtype=torch.float32)
    total = like.new_zeros((num_rows,), dtype=torch.float64)
    weighted = None if dim is None else like.new_zeros((num_rows, dim), dtype=torch.float32)
    return State(top, total, weighted)


def merge_slices(state: State, slices: State) -> None:
    """Add states of parts of the keys, [slices, N], to the state; their sums are overwritten."""
    highest = torch.maximum(state.top, slices.top.amax(dim=0))
    before, scale = (state.top - highest).exp2(), (slices.top - highest).exp2()
    state.total.mul_(before).add_((slices.total * scale).sum(dim=0))
    if state.weighted is not None:
        weighted = slices.weighted.mul_(scale[:, :, None])
        state.weighted.mul_(before[:, None]).add_(weighted.sum(dim=0))
    state.top.copy_(highest)


def row_products(a: Tensor, b: Tensor) -> Tensor:  # [N, D] -> [N]
    # torch.linalg.vecdot would be cast by autocast, also inside of an op.
    return (a * b).sum(dim=1)


def passes(backend: str) -> ModuleType:
    """contrastive_cpp or contrastive_triton, whose functions have the same signatures."""
    if backend == "cpp":
        from fastssl.kernels.common import contrastive_cpp as module
    else:
        from fastssl.kernels.common import contrastive_triton as module
    return module


def why_not_triton(dim: int) -> str | None:
    if dim > MAX_TRITON_DIM:
        return f"features of {dim} dimensions, more than {MAX_TRITON_DIM}"
    return None


def check_temperature(temperature: float | Tensor, like: Tensor) -> Tensor:
    """`temperature` as a tensor [] beside `like`, float32 or wider, with its gradient."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature, device=like.device)
        if temperature.numel() != 1:
            shape = list(temperature.shape)
            raise ValueError(f"temperature must hold one number, got shape {shape}")
        return temperature.reshape(()).to(dtype)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        came = type(temperature).__name__
        raise TypeError(f"temperature must be a float or a Tensor, got {came}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    return torch.full((), temperature, dtype=dtype, device=like.device)


def check_features(name: str, value: Tensor, like: Tensor | None = None) -> None:
    """[N, D] with N and D at least 1, on the device of `like`."""
    check_tensor(name, value, dim=2, device=None if like is None else like.device)
    if value.shape[0] < 1 or value.shape[1] < 1:
        raise ValueError(f"{name} must have at least one row and column, got {list(value.shape)}")
