"""The public op fastssl::mask_unit_attention: checks, backends, fake implementation, autograd."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastssl.kernels.common import dispatch
from fastssl.kernels.common.autograd import reference_gradients
from fastssl.kernels.common.checks import check_int, check_tensor
from fastssl.kernels.common.eager import custom_op, direct
from fastssl.kernels.mask_unit_attention import reference

# The compiled kernels hold the scores of a block of queries with all keys of a unit.
MAX_UNIT_SIZE = 256
MAX_HEAD_DIM = 256


def _example(device: torch.device) -> tuple:
    return torch.zeros(2, 8, 48, device=device), 2, 4, 1


def _why_too_large(qkv: Tensor, num_heads: int, unit_size: int) -> str | None:
    if unit_size > MAX_UNIT_SIZE:
        return f"unit_size {unit_size} is above {MAX_UNIT_SIZE}"
    head_dim = qkv.shape[2] // (3 * num_heads)
    if head_dim > MAX_HEAD_DIM:
        return f"a head's width {head_dim} is above {MAX_HEAD_DIM}"
    return None


def _cannot_run_cpp(qkv: Tensor, num_heads: int, unit_size: int, q_stride: int) -> str | None:
    return dispatch.cannot_run_cpp(qkv) or _why_too_large(qkv, num_heads, unit_size)


def _cannot_run_triton(qkv: Tensor, num_heads: int, unit_size: int, q_stride: int) -> str | None:
    return dispatch.cannot_run_triton(qkv) or _why_too_large(qkv, num_heads, unit_size)


OP = dispatch.register(
    "mask_unit_attention", {"triton": _cannot_run_triton, "cpp": _cannot_run_cpp}, _example
)


def mask_unit_attention(
    qkv: Tensor,  # [B, N, 3 * D], (q, k, v) outermost, heads next
    *,
    num_heads: int,
    unit_size: int | None = None,
    q_stride: int = 1,
    backend: str | None = None,
) -> Tensor:  # [B, N / q_stride, D]
    """Attention within the mask units of Hiera (Ryali et al. 2023, arXiv 2306.00989).

    softmax(q k^T / sqrt(D / num_heads)) v among the tokens of each unit, from the output of the
    packed projection to the input of the next. A unit is `unit_size` tokens that lie together;
    None takes each image's N tokens for one unit, which is global attention. With `q_stride` > 1
    the queries are pooled first: query i of a unit is the maximum over its tokens i, i + u, i + 2 u
    and so on, for u = unit_size / q_stride queries per unit.

    The result has qkv's dtype; scores and softmax are float32 inside the kernels. What is not
    finite in one unit may reach the small units that are worked on with it. Where several
    tokens share a maximum, the first gets the gradient.
    Backward computes everything again from qkv, the only tensor saved.

    Raises ValueError or TypeError for arguments that do not fit, naming them.
    """
    check_tensor("qkv", qkv, dim=3)
    check_int("num_heads", num_heads, 1)
    check_int("q_stride", q_stride, 1)
    num_tokens, width = qkv.shape[1:]
    if width % (3 * num_heads) or width == 0:
        raise ValueError(
            f"qkv must have 3 * D channels, D divisible by num_heads = {num_heads}, got {width}"
        )
    if unit_size is None:
        unit_size = num_tokens
    else:
        check_int("unit_size", unit_size, 1)
    if unit_size < 1 or num_tokens % unit_size:
        raise ValueError(
            f"qkv must hold whole units of unit_size = {unit_size} tokens, got {num_tokens} tokens"
        )
    if unit_size % q_stride:
        raise ValueError(f"unit_size must be divisible by q_stride = {q_stride}, got {unit_size}")
    name = dispatch.choose_backend(OP, backend, qkv, num_heads, unit_size, q_stride)
    if name == "reference":
        return reference.mask_unit_attention(qkv, num_heads, unit_size, q_stride)
    return _call(qkv.contiguous(), num_heads, unit_size, q_stride, name)


@custom_op("fastssl::mask_unit_attention")
def _mask_unit_attention(
    qkv: Tensor, num_heads: int, unit_size: int, q_stride: int, backend: str
) -> Tensor:
    if backend == "reference":
        return reference.mask_unit_attention(qkv, num_heads, unit_size, q_stride)
    out = _mask_unit_attention_fake(qkv, num_heads, unit_size, q_stride, backend)
    if backend == "cpp":
        from fastssl.kernels.mask_unit_attention import cpp_kernel as kernel
    else:
        from fastssl.kernels.mask_unit_attention import triton_kernel as kernel
    kernel.mask_unit_attention_fwd(qkv, num_heads, unit_size, q_stride, out)
    return out


@_mask_unit_attention.register_fake
def _mask_unit_attention_fake(qkv, num_heads, unit_size, q_stride, backend):
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] // q_stride, qkv.shape[2] // 3))


@custom_op("fastssl::mask_unit_attention_backward")
def _mask_unit_attention_backward(
    dout: Tensor, qkv: Tensor, num_heads: int, unit_size: int, q_stride: int, backend: str
) -> Tensor:
    dqkv = torch.empty_like(qkv)
    if backend == "cpp":
        from fastssl.kernels.mask_unit_attention import cpp_kernel as kernel
    else:
        from fastssl.kernels.mask_unit_attention import triton_kernel as kernel
    kernel.mask_unit_attention_bwd(dout, qkv, num_heads, unit_size, q_stride, dqkv)
    return dqkv


@_mask_unit_attention_backward.register_fake
def _mask_unit_attention_backward_fake(dout, qkv, num_heads, unit_size, q_stride, backend):
    return torch.empty_like(qkv)


def _setup_context(ctx, inputs, output):
    qkv, *ctx.settings = inputs
    ctx.save_for_backward(qkv)


def _backward(ctx, dout):
    (qkv,) = ctx.saved_tensors
    *settings, backend = ctx.settings
    if backend == "reference":
        inputs = (qkv, *settings)
        return *reference_gradients(ctx, reference.mask_unit_attention, inputs, dout), None
    dqkv = _call_backward(dout.contiguous(), qkv, *settings, backend)
    return dqkv, None, None, None, None


_mask_unit_attention.register_autograd(_backward, setup_context=_setup_context)
_call = direct(_mask_unit_attention, _setup_context, _backward)
_call_backward = direct(_mask_unit_attention_backward)


@register_flop_formula(torch.ops.fastssl.mask_unit_attention)
def _flops(qkv, num_heads, unit_size, q_stride, *_, **__):
    """Two products of queries, keys and channels."""
    batch, num_tokens, width = qkv
    return 4 * batch * num_tokens // q_stride * unit_size * width // 3


@register_flop_formula(torch.ops.fastssl.mask_unit_attention_backward)
def _flops_backward(dout, qkv, num_heads, unit_size, q_stride, *_, **__):
    """Four products; computing the scores again is not counted."""
    return 2 * _flops(qkv, num_heads, unit_size, q_stride)
