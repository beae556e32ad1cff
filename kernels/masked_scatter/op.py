"""The public op fastssl::masked_scatter: checks, backends, fake implementation, autograd."""

import torch
from torch import Tensor

from fastssl.kernels.common import dispatch
from fastssl.kernels.common.autograd import reference_gradients
from fastssl.kernels.common.checks import (
    INDEX_DTYPES,
    check_int,
    check_shape,
    check_tensor,
)
from fastssl.kernels.common.eager import custom_op
from fastssl.kernels.common.flops import counts_no_flops
from fastssl.kernels.common.positions import with_prefix_rows
from fastssl.kernels.masked_scatter import reference


def _example(device: torch.device) -> tuple:
    x = torch.zeros(2, 3, 8, device=device)
    ids_restore = torch.arange(5, device=device, dtype=torch.int32).expand(2, 5).contiguous()
    return x, torch.zeros(8, device=device), ids_restore, None


OP = dispatch.register(
    "masked_scatter",
    {"triton": dispatch.cannot_run_triton, "cpp": dispatch.cannot_run_cpp},
    _example,
)


def masked_scatter(
    x: Tensor,  # [B, P + K, D]
    mask_token: Tensor,  # [D]
    ids_restore: Tensor,  # [B, N]
    pos: Tensor | None = None,  # [N, D] or [P + N, D]
    *,
    num_prefix_tokens: int = 0,
    backend: str | None = None,
) -> Tensor:  # [B, P + N, D]
    """The decoder's input of a masked autoencoder (He et al. 2021, arXiv 2111.06377).

    Prefix tokens (class token, registers) pass through; token n of image b is visible token
    r = ids_restore[b, n] where r < K, else the mask token; `pos` is added to all of them, to the
    prefix only where it has rows for it. Each row of ids_restore must be a permutation of
    0 .. N-1, as `random_masking` gives it: with a number twice, some row of the gradient of x is
    undefined. mask_token and pos may have leading dimensions of 1.

    The result has the widest dtype of the three. Gradients reach x, mask_token and pos; only
    ids_restore is saved for them.

    Raises ValueError or TypeError for arguments that do not fit, naming them; numbers outside
    0 .. N-1 are a RuntimeError on the CPU and undefined on a GPU.
    """
    check_int("num_prefix_tokens", num_prefix_tokens, 0)
    check_tensor("x", x, dim=3)
    device, dim = x.device, x.shape[2]
    check_tensor("mask_token", mask_token, device=device)
    if mask_token.numel() != dim or mask_token.shape[-1:] != (dim,):
        raise ValueError(
            f"mask_token must have shape [D] = [{dim}] after leading ones, "
            f"got {list(mask_token.shape)}"
        )
    check_tensor("ids_restore", ids_restore, dim=2, dtypes=INDEX_DTYPES, device=device)
    check_shape("ids_restore", ids_restore, (x.shape[0], None), "[B, N]")
    num_tokens = ids_restore.shape[1]
    num_visible = x.shape[1] - num_prefix_tokens
    if not 0 <= num_visible <= num_tokens:
        raise ValueError(
            f"x must hold num_prefix_tokens + K tokens with 0 <= K <= N = {num_tokens}, got "
            f"{x.shape[1]} tokens and num_prefix_tokens = {num_prefix_tokens}"
        )
    dtype = torch.promote_types(x.dtype, mask_token.dtype)
    if pos is not None:
        check_tensor("pos", pos, device=device)
        dtype = torch.promote_types(dtype, pos.dtype)
        pos = with_prefix_rows("pos", pos, num_tokens, dim, num_prefix_tokens)
    mask_token = mask_token.reshape(dim).contiguous()
    name = dispatch.choose_backend(OP, backend, x, mask_token, ids_restore, pos)
    if name == "reference":
        if x.dtype != dtype:
            x = x.to(dtype)
        return reference.masked_scatter(x, mask_token, ids_restore, pos, num_prefix_tokens)
    # The kernels add in float32 and round once, so the small operands come in float32.
    return torch.ops.fastssl.masked_scatter(
        x.contiguous(),
        mask_token.float(),
        ids_restore.contiguous(),
        None if pos is None else pos.float(),
        num_prefix_tokens,
        dtype,
        name,
    )


@custom_op("fastssl::masked_scatter")
def _masked_scatter(
    x: Tensor,
    mask_token: Tensor,
    ids_restore: Tensor,
    pos: Tensor | None,
    num_prefix_tokens: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    if backend == "reference":
        x = x.to(dtype)
        return reference.masked_scatter(x, mask_token, ids_restore, pos, num_prefix_tokens).to(
            dtype
        )
    out = _masked_scatter_fake(x, mask_token, ids_restore, pos, num_prefix_tokens, dtype, backend)
    if backend == "cpp":
        torch.ops.fastssl_csrc.masked_scatter_fwd(
            x, mask_token, ids_restore, pos, num_prefix_tokens, out
        )
    else:
        from fastssl.kernels.masked_scatter import triton_kernel

        triton_kernel.masked_scatter_fwd(x, mask_token, ids_restore, pos, num_prefix_tokens, out)
    return out


@_masked_scatter.register_fake
def _masked_scatter_fake(x, mask_token, ids_restore, pos, num_prefix_tokens, dtype, backend):
    num_rows = num_prefix_tokens + ids_restore.shape[1]
    return x.new_empty((x.shape[0], num_rows, x.shape[2]), dtype=dtype)


@custom_op("fastssl::masked_scatter_backward")
def _masked_scatter_backward(
    dout: Tensor,
    ids_restore: Tensor,
    num_visible: int,
    num_prefix_tokens: int,
    wants_dmask_token: bool,
    wants_dpos: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dmask_token, dpos; those not wanted are empty."""
    num_prefix, dim = num_prefix_tokens, dout.shape[2]
    dx = dout.new_empty((dout.shape[0], num_prefix + num_visible, dim), dtype=dtype)
    if backend == "cpp":
        shape = (num_prefix + ids_restore.shape[1], dim)
        partial = dout.new_empty(shape, dtype=torch.float32) if wants_dmask_token else None
        dpos = dout.new_empty(shape, dtype=torch.float32) if wants_dpos else None
        torch.ops.fastssl_csrc.masked_scatter_bwd(dout, ids_restore, num_prefix, dx, partial, dpos)
        dmask_token = None if partial is None else partial.sum(0)
    else:
        from fastssl.kernels.masked_scatter import triton_kernel

        dmask_token, dpos = triton_kernel.masked_scatter_bwd(
            dout, ids_restore, num_prefix, dx, wants_dmask_token, wants_dpos
        )
    nothing = dout.new_empty((0,), dtype=torch.float32)
    return (
        dx,
        nothing if dmask_token is None else dmask_token,
        nothing.clone() if dpos is None else dpos,
    )


@_masked_scatter_backward.register_fake
def _masked_scatter_backward_fake(
    dout, ids_restore, num_visible, num_prefix_tokens, wants_dmask_token, wants_dpos, dtype, backend
):
    batch, num_rows, dim = dout.shape
    return (
        dout.new_empty((batch, num_prefix_tokens + num_visible, dim), dtype=dtype),
        dout.new_empty((dim if wants_dmask_token else 0,), dtype=torch.float32),
        dout.new_empty((num_rows, dim) if wants_dpos else (0,), dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output):
    x, mask_token, ids_restore, pos, num_prefix_tokens, _, backend = inputs
    ctx.backend, ctx.dtype, ctx.num_prefix_tokens = backend, x.dtype, num_prefix_tokens
    ctx.num_visible = x.shape[1] - num_prefix_tokens
    if backend == "reference":
        ctx.save_for_backward(x, mask_token, ids_restore, pos)
    else:
        ctx.save_for_backward(ids_restore)


def _backward(ctx, dout):
    if ctx.backend == "reference":
        inputs = (*ctx.saved_tensors, ctx.num_prefix_tokens)
        grads = reference_gradients(ctx, reference.masked_scatter, inputs, dout)
        return *grads, None, None
    wants_x, wants_mask_token, _, wants_pos = ctx.needs_input_grad[:4]
    dx, dmask_token, dpos = torch.ops.fastssl.masked_scatter_backward(
        dout.contiguous(),
        *ctx.saved_tensors,
        ctx.num_visible,
        ctx.num_prefix_tokens,
        wants_mask_token,
        wants_pos,
        ctx.dtype,
        ctx.backend,
    )
    return (
        dx if wants_x else None,
        dmask_token if wants_mask_token else None,
        None,
        dpos if wants_pos else None,
        None,
        None,
        None,
    )


_masked_scatter.register_autograd(_backward, setup_context=_setup_context)
counts_no_flops(torch.ops.fastssl.masked_scatter, torch.ops.fastssl.masked_scatter_backward)
