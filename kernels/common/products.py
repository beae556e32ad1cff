"""The matrix products of linear layers and the casts around them: what linear and gelu_mlp share.

M rows, K inputs, N outputs. Every tensor is contiguous. Products are torch's or, in bfloat16 on
CPUs with dot products of pairs, the CPU library's. On a CPU they write into huge pages, since a
training step frees and maps hundreds of MB, and page faults of 4 KB pages cost more than the
writing itself.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from fastssl.kernels.common import libraries
from fastssl.kernels.common.checks import check_shape, check_tensor

# Rows per partial sum on a CPU, as in csrc/cpu/column_parts.h.
SUM_ROWS = 32
# Inputs from which on the product of a transposed dy gains more than transposing x saves.
WIDE = 768
# What weights are read in, and gradients written, where the CPU library multiplies itself.
_PAIRS_DTYPES = (torch.float32, torch.bfloat16)


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


def is_operand(weight: Tensor, dtype: torch.dtype, backend: str) -> bool:
    """Whether products in `dtype` read `weight` as it is: no cast of it is made or saved."""
    return weight.dtype == dtype or _in_pairs(weight, dtype, backend)


def operand(weight: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return weight if is_operand(weight, dtype, backend) else cast(weight, dtype, backend)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:  # -> [M, N]
    """x weight^T + bias in x's dtype, from x [M, K], an operand [N, K] and a bias of any dtype."""
    if _in_pairs(weight, x.dtype, backend):
        out = x.new_empty((x.shape[0], weight.shape[0]))
        bias = None if bias is None else bias.float().contiguous()
        threads = torch.get_num_threads()
        torch.ops.fastssl_csrc.linear_product(x, weight, False, bias, threads, out)
        return out
    if bias is None:
        return _multiply(x, weight.t(), backend)
    bias = bias.to(x.dtype)
    if backend == "cpp" and x.numel() > 0 and _adds_bias_in_product(x.dtype):
        # addmm copies the bias into its result first, and then reads it back.
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return functional.linear(x, weight, bias)


def input_gradient(dy: Tensor, weight: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """dy weight in `dtype`, from dy [M, N] and an operand [N, K]: [M, K]."""
    if not _in_pairs(weight, dy.dtype, backend):
        return cast(_multiply(dy, weight, backend), dtype, backend)
    out_dtype = dtype if dtype in _PAIRS_DTYPES else dy.dtype
    out = dy.new_empty((dy.shape[0], weight.shape[1]), dtype=out_dtype)
    threads = torch.get_num_threads()
    torch.ops.fastssl_csrc.linear_product(dy, weight, True, None, threads, out)
    return cast(out, dtype, backend)


def parameter_gradients(
    dy: Tensor,
    x: Tensor | None,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor | None, Tensor | None]:
    """dy^T x [N, K] and the sums of dy's columns [N], from dy [M, N] and x [M, K]; what has no
    dtype is not wanted, and None."""
    if dweight_dtype in _PAIRS_DTYPES and _reads_pairs(dy.dtype, backend):
        dweight = dy.new_empty((dy.shape[1], x.shape[1]), dtype=dweight_dtype)
        parts = sums = None
        if dbias_dtype is not None:
            parts, sums = new_parts(dy), dy.new_empty((dy.shape[1],), dtype=torch.float32)
        threads = torch.get_num_threads()
        torch.ops.fastssl_csrc.linear_weight_gradient(dy, x, parts, sums, threads, dweight)
        return dweight, None if sums is None else sums.to(dbias_dtype)
    dweight = dbias = None
    if dbias_dtype is not None:
        dbias = column_sums(dy, backend).to(dbias_dtype)
    if dweight_dtype is not None:
        dweight = _weight_gradient(dy, x, dweight_dtype, backend)
    return dweight, dbias


def _in_pairs(weight: Tensor, dtype: torch.dtype, backend: str) -> bool:
    """Whether the CPU library multiplies with `weight` itself, in pairs of rows and of columns."""
    N, K = weight.shape
    even = N > 0 and K > 0 and N % 2 == 0 and K % 2 == 0
    return _reads_pairs(dtype, backend) and weight.dtype in _PAIRS_DTYPES and even


def _reads_pairs(dtype: torch.dtype, backend: str) -> bool:
    # On AMX the products are torch's.
    return backend == "cpp" and dtype == torch.bfloat16 and libraries.bf16_unit() == "dots"


def _multiply(x: Tensor, other: Tensor, backend: str) -> Tensor:  # [M, K], [K, N] -> [M, N]
    out = x.new_empty((x.shape[0], other.shape[1]))
    if backend == "cpp":
        torch.ops.fastssl_csrc.linear_prefer_huge_pages(out)
    # With `out` the dtype is decided, even where backward is called under autocast.
    return torch.mm(x, other, out=out)


def _weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    if dy.dtype == torch.float32 or backend != "cpp":
        if dy.is_cuda and dtype == torch.float32 != dy.dtype:
            # The product's float32 sums, never rounded.
            return torch.mm(dy.t(), x, out_dtype=dtype)
        return _multiply(dy.t(), x, backend).to(dtype)
    # The product takes twice as long from an operand that lies transposed. Either is transposed
    # beforehand; where it is x, the cast of the result turns that back.
    if dy.shape[1] <= x.shape[1] or x.shape[1] >= WIDE:
        return cast(_multiply(_transpose(dy, dy.dtype), x, backend), dtype, backend)
    return _transpose(_multiply(_transpose(x, x.dtype), dy, backend), dtype)


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
