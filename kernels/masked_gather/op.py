"""The public op fastssl::masked_gather: checks, backends, fake implementation, autograd."""

import torch
from torch import Tensor

from fastssl.kernels.common import dispatch
from fastssl.kernels.common.autograd import reference_gradients
from fastssl.kernels.common.checks import INDEX_DTYPES, check_int, check_shape, check_tensor
from fastssl.kernels.common.eager import custom_op
from fastssl.kernels.common.flops import counts_no_flops
from fastssl.kernels.common.positions import with_prefix_rows
from fastssl.kernels.masked_gather import reference


def _example(device: torch.device) -> tuple:
    ids_keep = torch.arange(3, device=device, dtype=torch.int32).expand(2, 3).contiguous()
    return torch.zeros(2, 5, 8, device=device), ids_keep, None, None


OP = dispatch.register(
    "masked_gather",
    {"triton": dispatch.cannot_run_triton, "cpp": dispatch.cannot_run_cpp},
    _example,
)


def masked_gather(
    x: Tensor,  # [B, P + N, D]
    ids_keep: Tensor,  # [B, K]
    pos: Tensor | None = None,  # [N, D] or [P + N, D]
    *,
    ids_restore: Tensor | None = None,  # [B, N]
    num_prefix_tokens: int = 0,
    backend: str | None = None,
) -> Tensor:  # [B, P + K, D]
    """The visible tokens with their positions added, behind the prefix tokens.

    ids_keep must be unique in each row and lie in [0, N): with a repeated index the gradients are
    undefined, and one out of range is an error on the CPU but undefined on a GPU. ids_restore, as
    random_masking gives it, spares backward the inversion of ids_keep. The dtype is the promotion
    of x's and pos'. Prefix tokens get no position where pos is [N, D].
    """
    check_int("num_prefix_tokens", num_prefix_tokens, 0)
    check_tensor("x", x, dim=3)
    batch, num_rows, dim = x.shape
    num_tokens = num_rows - num_prefix_tokens
    if num_tokens < 0:
        raise ValueError(
            f"x must hold at least num_prefix_tokens = {num_prefix_tokens} tokens, got {num_rows}"
        )
    check_tensor("ids_keep", ids_keep, dim=2, dtypes=INDEX_DTYPES, device=x.device)
    check_shape("ids_keep", ids_keep, (batch, None), "[B, K]")
    if ids_keep.shape[1] > num_tokens:
        raise ValueError(
            f"ids_keep must keep at most N = {num_tokens} tokens, got {ids_keep.shape[1]}"
        )
    if ids_restore is not None:
        check_tensor("ids_restore", ids_restore, dim=2, dtypes=INDEX_DTYPES, device=x.device)
        check_shape("ids_restore", ids_restore, (batch, num_tokens), "[B, N]")
    dtype = x.dtype
    if pos is not None:
        check_tensor("pos", pos, device=x.device)
        dtype = torch.promote_types(dtype, pos.dtype)
        pos = with_prefix_rows("pos", pos, num_tokens, dim, num_prefix_tokens)
    name = dispatch.choose_backend(OP, backend, x, ids_keep, pos, ids_restore)
    if name == "reference":
        if x.dtype != dtype:
            x = x.to(dtype)
        return reference.masked_gather(x, ids_keep, pos, num_prefix_tokens)
    # The kernels add in float32 and round once, so the small operand comes in float32.
    return torch.ops.fastssl.masked_gather(
        x.contiguous(),
        ids_keep.contiguous(),
        None if pos is None else pos.float(),
        num_prefix_tokens,
        None if ids_restore is None else ids_restore.contiguous(),
        dtype,
        name,
    )


@custom_op("fastssl::masked_gather")
def _masked_gather(
    x: Tensor,
    ids_keep: Tensor,
    pos: Tensor | None,
    num_prefix_tokens: int,
    ids_restore: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    if backend == "reference":
        return reference.masked_gather(x.to(dtype), ids_keep, pos, num_prefix_tokens).to(dtype)
    out = _masked_gather_fake(x, ids_keep, pos, num_prefix_tokens, ids_restore, dtype, backend)
    if backend == "cpp":
        torch.ops.fastssl_csrc.masked_gather_fwd(x, ids_keep, pos, num_prefix_tokens, out)
    else:
        from fastssl.kernels.masked_gather import triton_kernel

        triton_kernel.masked_gather_fwd(x, ids_keep, pos, num_prefix_tokens, out)
    return out


@_masked_gather.register_fake
def _masked_gather_fake(x, ids_keep, pos, num_prefix_tokens, ids_restore, dtype, backend):
    num_rows = num_prefix_tokens + ids_keep.shape[1]
    return x.new_empty((x.shape[0], num_rows, x.shape[2]), dtype=dtype)


@custom_op("fastssl::masked_gather_backward")
def _masked_gather_backward(
    dout: Tensor,
    ids_restore: Tensor,
    num_prefix_tokens: int,
    wants_dpos: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """dx and dpos; the latter is empty unless wanted."""
    dx, dpos = _masked_gather_backward_fake(
        dout, ids_restore, num_prefix_tokens, wants_dpos, dtype, backend
    )
    if backend == "cpp":
        torch.ops.fastssl_csrc.masked_gather_bwd(
            dout, ids_restore, num_prefix_tokens, dx, dpos if wants_dpos else None
        )
    else:
        from fastssl.kernels.masked_gather import triton_kernel

        total = triton_kernel.masked_gather_bwd(
            dout, ids_restore, num_prefix_tokens, dx, wants_dpos
        )
        dpos = dpos if total is None else total
    return dx, dpos


@_masked_gather_backward.register_fake
def _masked_gather_backward_fake(dout, ids_restore, num_prefix_tokens, wants_dpos, dtype, backend):
    batch, _, dim = dout.shape
    num_rows = num_prefix_tokens + ids_restore.shape[1]
    return (
        dout.new_empty((batch, num_rows, dim), dtype=dtype),
        dout.new_empty((num_rows, dim) if wants_dpos else (0,), dtype=torch.float32),
    )


def _inverse(ids_keep: Tensor, num_tokens: int) -> Tensor:
    """int32 [B, N]: the k at which ids_keep names a token, K for tokens that it does not."""
    batch, num_visible = ids_keep.shape
    shape = (batch, num_tokens)
    inverse = torch.full(shape, num_visible, dtype=torch.int32, device=ids_keep.device)
    ranks = torch.arange(num_visible, dtype=torch.int32, device=ids_keep.device)
    return inverse.scatter(1, ids_keep.long(), ranks.expand(batch, num_visible))


def _setup_context(ctx, inputs, output):
    x, ids_keep, pos, num_prefix_tokens, ids_restore, _, backend = inputs
    ctx.backend, ctx.dtype, ctx.num_prefix_tokens = backend, x.dtype, num_prefix_tokens
    ctx.num_tokens = x.shape[1] - num_prefix_tokens
    ctx.has_inverse = ids_restore is not None
    if backend == "reference":
        ctx.save_for_backward(x, ids_keep, pos)
    else:
        ctx.save_for_backward(ids_restore if ctx.has_inverse else ids_keep)


def _backward(ctx, dout):
    if ctx.backend == "reference":
        inputs = (*ctx.saved_tensors, ctx.num_prefix_tokens)
        grads = reference_gradients(ctx, reference.masked_gather, inputs, dout)
        return *grads, None, None, None
    (ids,) = ctx.saved_tensors
    dx, dpos = torch.ops.fastssl.masked_gather_backward(
        dout.contiguous(),
        ids if ctx.has_inverse else _inverse(ids, ctx.num_tokens),
        ctx.num_prefix_tokens,
        ctx.needs_input_grad[2],
        ctx.dtype,
        ctx.backend,
    )
    dx = dx if ctx.needs_input_grad[0] else None
    return dx, None, dpos if ctx.needs_input_grad[2] else None, None, None, None, None


_masked_gather.register_autograd(_backward, setup_context=_setup_context)
counts_no_flops(torch.ops.fastssl.masked_gather, torch.ops.fastssl.masked_gather_backward)
