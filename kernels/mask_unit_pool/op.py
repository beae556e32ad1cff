"""The public op fastssl::mask_unit_pool: checks, backends, fake implementation, autograd."""

import torch
from torch import Tensor

from fastssl.kernels.common import dispatch
from fastssl.kernels.common.checks import check_int, check_tensor
from fastssl.kernels.common.eager import custom_op, direct
from fastssl.kernels.common.flops import counts_no_flops
from fastssl.kernels.mask_unit_pool import reference

# The argmax of a group is one byte; Hiera merges 4 tokens at a time, seldom 8.
MAX_Q_STRIDE = 64


def _example(device: torch.device) -> tuple:
    return (torch.zeros(2, 8, 6, device=device),)


OP = dispatch.register(
    "mask_unit_pool",
    {"triton": dispatch.cannot_run_triton, "cpp": dispatch.cannot_run_cpp},
    _example,
)


def mask_unit_pool(
    x: Tensor,  # [B, N, C]
    *,
    unit_size: int,
    q_stride: int,
    backend: str | None = None,
) -> Tensor:  # [B, N / q_stride, C]
    """The maximum over each pooling group of Hiera's mask units (Ryali et al. 2023, arXiv
    2306.00989).

    A unit is `unit_size` tokens that lie together, seen as [q_stride, unit_size / q_stride, C]; the
    maximum is over the first axis. A NaN makes its maximum NaN. The first of several equal maxima
    gets the gradient, the other tokens zeros. `q_stride` is at most 64; at 1, x itself is returned.

    Saved for backward, where x wants a gradient: one byte per element of the result, that of the
    token that gave it. x is not kept: nothing else in a block needs it, it is 8 times as large in
    bfloat16 at q_stride 4, and backward would have to read it again.

    Raises ValueError or TypeError for arguments that do not fit, naming them.
    """
    check_tensor("x", x, dim=3)
    check_int("unit_size", unit_size, 1)
    check_int("q_stride", q_stride, 1, MAX_Q_STRIDE)
    if x.shape[1] % unit_size:
        raise ValueError(
            f"x must hold whole units of unit_size = {unit_size} tokens, got {x.shape[1]} tokens"
        )
    if unit_size % q_stride:
        raise ValueError(f"unit_size must be divisible by q_stride = {q_stride}, got {unit_size}")
    name = dispatch.choose_backend(OP, backend, x)
    if q_stride == 1:
        return x
    if name == "reference":
        return reference.mask_unit_pool(x, unit_size, q_stride)
    saves = torch.is_grad_enabled() and x.requires_grad
    out, _ = _call(x.contiguous(), unit_size, q_stride, saves, name)
    return out


@custom_op("fastssl::mask_unit_pool")
def _mask_unit_pool(
    x: Tensor, unit_size: int, q_stride: int, saves: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """out and its argmax, empty unless `saves`: backward needs it."""
    if backend == "reference":
        out = reference.mask_unit_pool(x, unit_size, q_stride)
        argmax = reference.argmax(x, unit_size, q_stride) if saves else _nothing(x)
        return out, argmax
    out, argmax = _mask_unit_pool_fake(x, unit_size, q_stride, saves, backend)
    saved = argmax if saves else None
    if backend == "cpp":
        torch.ops.fastssl_csrc.mask_unit_pool_fwd(x, unit_size, q_stride, out, saved)
    else:
        from fastssl.kernels.mask_unit_pool import triton_kernel

        triton_kernel.mask_unit_pool_fwd(x, unit_size, q_stride, out, saved)
    return out, argmax


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty((0,), dtype=torch.uint8)


@_mask_unit_pool.register_fake
def _mask_unit_pool_fake(x, unit_size, q_stride, saves, backend):
    batch, num_tokens, dim = x.shape
    out = x.new_empty((batch, num_tokens // q_stride, dim))
    return out, torch.empty_like(out, dtype=torch.uint8) if saves else _nothing(x)


@custom_op("fastssl::mask_unit_pool_backward")
def _mask_unit_pool_backward(
    dout: Tensor, argmax: Tensor, unit_size: int, q_stride: int, backend: str
) -> Tensor:
    if backend == "reference":
        return reference.mask_unit_pool_backward(dout, argmax, unit_size, q_stride)
    dx = _mask_unit_pool_backward_fake(dout, argmax, unit_size, q_stride, backend)
    if backend == "cpp":
        torch.ops.fastssl_csrc.mask_unit_pool_bwd(dout, argmax, unit_size, q_stride, dx)
    else:
        from fastssl.kernels.mask_unit_pool import triton_kernel

        triton_kernel.mask_unit_pool_bwd(dout, argmax, unit_size, q_stride, dx)
    return dx


@_mask_unit_pool_backward.register_fake
def _mask_unit_pool_backward_fake(dout, argmax, unit_size, q_stride, backend):
    return dout.new_empty((dout.shape[0], dout.shape[1] * q_stride, dout.shape[2]))


def _setup_context(ctx, inputs, output):
    _, ctx.unit_size, ctx.q_stride, saves, ctx.backend = inputs
    argmax = output[1]
    ctx.mark_non_differentiable(argmax)
    if ctx.needs_input_grad[0] and not saves:
        raise ValueError("saves must be True where x wants a gradient, got False")
    ctx.save_for_backward(argmax)


def _backward(ctx, dout, _):
    (argmax,) = ctx.saved_tensors
    dx = _call_backward(dout.contiguous(), argmax, ctx.unit_size, ctx.q_stride, ctx.backend)
    return dx, None, None, None, None


_mask_unit_pool.register_autograd(_backward, setup_context=_setup_context)
_call = direct(_mask_unit_pool, _setup_context, _backward)
_call_backward = direct(_mask_unit_pool_backward)
counts_no_flops(torch.ops.fastssl.mask_unit_pool, torch.ops.fastssl.mask_unit_pool_backward)
