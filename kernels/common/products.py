"""The matrix products of linear layers and the casts around them: what linear and gelu_mlp share.

M rows, K inputs, N outputs. Every tensor is contiguous. Products are torch's; on a CPU they write
into huge pages, since a training step frees and maps hundreds of MB, and page faults of 4 KB pages
cost more than the writing itself.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from fastssl.kernels.common.checks import check_shape, check_tensor

# Rows per partial sum on a CPU, as in csrc/cpu/linear.cpp and gelu_mlp.cpp.
SUM_ROWS = 32
# Inputs from which on the product of a transposed dy gains more than transposing x saves.
WIDE = 768


def check_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str, str]
) -> None:
    """Refuse what F.linear(x, weight, bias) cannot take; `names` are those of the arguments."""
    name_x, name_weight, name_bias = names
    check_tensor(name_x, x)
    if x.dim() == 0:
        raise ValueError(f"{name_x} must have at least 1 dimension, got a scalar")
    check_tensor(name_weight, weight, dim=2, device=x.device)
    check_shape(name_weight, weight, (None, x.shape[-1]), "[N, K]")
    if bias is not None:
        check_tensor(name_bias, bias, dim=1, device=x.device)
        check_shape(name_bias, bias, (weight.shape[0],), "[N]")


def product_dtype(x: Tensor, weight: Tensor, name: str) -> torch.dtype:
    """The autocast dtype where autocast is on, else that of both; `name` is the weight's."""
    device_type = x.device.type
    double = torch.float64 in (x.dtype, weight.dtype)
    if torch.is_autocast_enabled(device_type) and not double:
        return torch.get_autocast_dtype(device_type)
    if x.dtype != weight.dtype:
        raise TypeError(f"{name} must be {x.dtype} like x without autocast, got {weight.dtype}")
    return x.dtype


def rows_of(x: Tensor) -> Tensor:  # [..., K] -> [M, K]
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def cast(x: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """x in `dtype`; x itself where it is so already."""
    if x.dtype == dtype or backend != "cpp":
        return x.to(dtype)
    out = torch.empty_like(x, dtype=dtype)
    torch.ops.fastssl_csrc.linear_cast(x, out)
    return out


def multiply(x: Tensor, other: Tensor, backend: str) -> Tensor:  # [M, K], [K, N] -> [M, N]
    out = x.new_empty((x.shape[0], other.shape[1]))
    if backend == "cpp":
        torch.ops.fastssl_csrc.linear_prefer_huge_pages(out)
    # With `out` the dtype is decided, even where backward is called under autocast.
    return torch.mm(x, other, out=out)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:  # -> [M, N]
    """x weight^T + bias, all in one dtype but the bias, which may have another."""
    if bias is not None:
        bias = bias.to(x.dtype)
    if backend == "cpp" and _adds_bias_in_product(x.dtype):
        # addmm copies the bias into its result first, and then reads it back.
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return functional.linear(x, weight, bias)


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """dy^T x in `dtype`, from dy [M, N] and x [M, K]: [N, K]."""
    if dy.dtype == torch.float32 or backend != "cpp":
        if dy.is_cuda and dtype == torch.float32 != dy.dtype:
            # The product's float32 sums, never rounded.
            return torch.mm(dy.t(), x, out_dtype=dtype)
        return multiply(dy.t(), x, backend).to(dtype)
    # The product takes twice as long from an operand that lies transposed. Either is transposed
    # beforehand; where it is x, the cast of the result turns that back.
    if dy.shape[1] <= x.shape[1] or x.shape[1] >= WIDE:
        return cast(multiply(_transpose(dy, dy.dtype), x, backend), dtype, backend)
    return _transpose(multiply(_transpose(x, x.dtype), dy, backend), dtype)


def column_sums(x: Tensor, backend: str) -> Tensor:  # [M, N] -> [N] float32
    if backend != "cpp":
        from fastssl.kernels.common import triton_columns

        return triton_columns.column_sums(x)
    sums = x.new_empty((x.shape[1],), dtype=torch.float32)
    torch.ops.fastssl_csrc.linear_column_sums(x, new_parts(x), sums)
    return sums


def new_parts(x: Tensor) -> Tensor:
    """Room for the partial sums of the columns of x [M, N] on a CPU: a row per SUM_ROWS of x."""
    return x.new_empty((-(-x.shape[0] // SUM_ROWS), x.shape[1]), dtype=torch.float32)


def _transpose(x: Tensor, dtype: torch.dtype) -> Tensor:
    out = x.new_empty((x.shape[1], x.shape[0]), dtype=dtype)
    torch.ops.fastssl_csrc.linear_transpose(x, out)
    return out


@functools.cache
def _adds_bias_in_product(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    mkldnn = torch.ops.mkldnn
    if dtype == torch.bfloat16:
        return mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and mkldnn._is_mkldnn_fp16_supported()
