"""The public op fastssl::masked_unfold: checks, backends, fake implementation, autograd."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from fastssl.kernels.common import dispatch
from fastssl.kernels.common.autograd import reference_gradients
from fastssl.kernels.common.checks import FLOAT_DTYPES, INDEX_DTYPES, check_shape, check_tensor
from fastssl.kernels.common.eager import custom_op
from fastssl.kernels.common.flops import counts_no_flops
from fastssl.kernels.masked_unfold import reference
from fastssl.kernels.masked_unfold.geometry import (
    check_dtype,
    check_order,
    per_dim,
    reads_dropped_units,
    unit_grid,
)


def _example(device: torch.device) -> tuple:
    ids_keep = torch.zeros(2, 1, device=device, dtype=torch.int32)
    return torch.zeros(2, 3, 8, 8, device=device), ids_keep, torch.bfloat16


def _unless_double(cannot_run: dispatch.Reason) -> dispatch.Reason:
    def reason(images: Tensor, ids_keep: Tensor, dtype: torch.dtype) -> str | None:
        if dtype == torch.float64:
            return "float64 patches are served by the reference only"
        return cannot_run(images, ids_keep)

    return reason


OP = dispatch.register(
    "masked_unfold",
    {
        "triton": _unless_double(dispatch.cannot_run_triton),
        "cpp": _unless_double(dispatch.cannot_run_cpp),
    },
    _example,
)


def masked_unfold(
    images: Tensor,  # [B, C, H, W] or [B, C, T, H, W], any strides
    ids_keep: Tensor,  # [B, K]
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] = 0,
    unit_size: int | Sequence[int] = 1,
    unit_order: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:  # [B, K * u, C * prod(kernel_size)]
    """The input windows of a convolution at the tokens of the kept mask units; see __init__.py.

    `unit_size` tokens per dimension make a unit, and must divide the convolution's output grid;
    `ids_keep` names units in row-major order, each at most once per row. The tokens of a unit are
    contiguous, in row-major order or as `unit_order` says: position -> row-major index. Columns
    are ordered like `weight.flatten(1)`. Pixels of units not kept, and padding, read as zero.
    `dtype` is that of the patches (None: images'), rounded to in the same pass.

    Raises TypeError or ValueError for arguments that do not fit, naming them.
    """
    check_tensor("images", images, dim=(4, 5))
    sizes = images.shape[2:]
    kernel_size = per_dim("kernel_size", kernel_size, len(sizes), 1)
    stride = per_dim("stride", stride, len(sizes), 1)
    padding = per_dim("padding", padding, len(sizes), 0)
    unit_size = per_dim("unit_size", unit_size, len(sizes), 1)
    num_units = math.prod(unit_grid(sizes, kernel_size, stride, padding, unit_size))
    check_tensor("ids_keep", ids_keep, dim=2, dtypes=INDEX_DTYPES, device=images.device)
    check_shape("ids_keep", ids_keep, (images.shape[0], None), "[B, K]")
    if ids_keep.shape[1] > num_units:
        raise ValueError(
            f"ids_keep must name at most the {num_units} units of an image, "
            f"got {ids_keep.shape[1]} per row"
        )
    if unit_order is not None:
        check_order(unit_order, math.prod(unit_size))
        unit_order = tuple(unit_order)
    if dtype is None:
        dtype = images.dtype
    check_dtype(dtype, FLOAT_DTYPES)
    name = dispatch.choose_backend(OP, backend, images, ids_keep, dtype)
    if name == "reference":
        return reference.masked_unfold(
            images, ids_keep, unit_order, kernel_size, stride, padding, unit_size, dtype
        )
    if images.dim() == 4:  # one frame; the kernels know three dimensions
        images = images.unsqueeze(2)
        kernel_size, stride, unit_size = (1, *kernel_size), (1, *stride), (1, *unit_size)
        padding = (0, *padding)
    return torch.ops.fastssl.masked_unfold(
        images,
        ids_keep.contiguous(),
        None if unit_order is None else _order_tensor(unit_order, images),
        kernel_size,
        stride,
        padding,
        unit_size,
        dtype,
        name,
    )


def _order_tensor(unit_order: tuple[int, ...], images: Tensor) -> Tensor:
    if isinstance(images, FakeTensor):  # a fake one must not enter the cache
        return torch.tensor(unit_order, dtype=torch.int32, device=images.device)
    return _cached_order_tensor(unit_order, images.device)


# To compiled code a constant, made before any CUDA graph is captured.
@torch.compiler.assume_constant_result
def _cached_order_tensor(unit_order: tuple[int, ...], device: torch.device) -> Tensor:
    return _make_order_tensor(unit_order, device)


@functools.cache
def _make_order_tensor(unit_order: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # or no later call could save it for backward
        return torch.tensor(unit_order, dtype=torch.int32, device=device)


@custom_op("fastssl::masked_unfold")
def _masked_unfold(
    images: Tensor,  # [B, C, T, H, W], any strides
    ids_keep: Tensor,
    unit_order: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    unit_size: Sequence[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    geometry = (kernel_size, stride, padding, unit_size)
    if backend == "reference":
        return reference.masked_unfold(images, ids_keep, unit_order, *geometry, dtype)
    out = _masked_unfold_fake(images, ids_keep, unit_order, *geometry, dtype, backend)
    units = unit_grid(images.shape[2:], *geometry)
    masked = reads_dropped_units(ids_keep.shape[1], units, kernel_size, stride, padding)
    if backend == "cpp":
        ranks = None
        if masked:
            ranks = ids_keep.new_empty((images.shape[0], math.prod(units)), dtype=torch.int32)
        torch.ops.fastssl_csrc.masked_unfold_fwd(
            images, ids_keep, unit_order, *geometry, ranks, out
        )
    else:
        from fastssl.kernels.masked_unfold import triton_kernel

        triton_kernel.masked_unfold_fwd(images, ids_keep, unit_order, *geometry, masked, out)
    return out


@_masked_unfold.register_fake
def _masked_unfold_fake(
    images, ids_keep, unit_order, kernel_size, stride, padding, unit_size, dtype, backend
):
    num_tokens = ids_keep.shape[1] * math.prod(unit_size)
    num_columns = images.shape[1] * math.prod(kernel_size)
    return images.new_empty((images.shape[0], num_tokens, num_columns), dtype=dtype)


@custom_op("fastssl::masked_unfold_backward")
def _masked_unfold_backward(
    dout: Tensor,
    ids_keep: Tensor,
    unit_order: Tensor | None,
    size: Sequence[int],  # C, T, H, W
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    unit_size: Sequence[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:  # dimages
    geometry = (kernel_size, stride, padding, unit_size)
    dimages = dout.new_empty((dout.shape[0], *size), dtype=dtype)
    if backend == "cpp":
        num_units = math.prod(unit_grid(size[1:], *geometry))
        ranks = ids_keep.new_empty((dout.shape[0], num_units), dtype=torch.int32)
        torch.ops.fastssl_csrc.masked_unfold_bwd(
            dout, ids_keep, unit_order, *geometry, ranks, dimages
        )
    else:
        from fastssl.kernels.masked_unfold import triton_kernel

        triton_kernel.masked_unfold_bwd(dout, ids_keep, unit_order, *geometry, dimages)
    return dimages


@_masked_unfold_backward.register_fake
def _masked_unfold_backward_fake(
    dout, ids_keep, unit_order, size, kernel_size, stride, padding, unit_size, dtype, backend
):
    return dout.new_empty((dout.shape[0], *size), dtype=dtype)


def _setup_context(ctx, inputs, output):
    images, ids_keep, unit_order, *ctx.geometry, ctx.out_dtype, ctx.backend = inputs
    ctx.size, ctx.dtype = images.shape[1:], images.dtype
    saves_images = ctx.backend == "reference"
    ctx.save_for_backward(ids_keep, unit_order, *([images] if saves_images else []))


def _backward(ctx, dout):
    ids_keep, unit_order, *images = ctx.saved_tensors
    if ctx.backend == "reference":
        inputs = (*images, ids_keep, unit_order, *ctx.geometry, ctx.out_dtype)
        dimages = reference_gradients(ctx, reference.masked_unfold, inputs, dout)[0]
    else:
        dimages = torch.ops.fastssl.masked_unfold_backward(
            dout.contiguous(),
            ids_keep,
            unit_order,
            ctx.size,
            *ctx.geometry,
            ctx.dtype,
            ctx.backend,
        )
    return dimages, *[None] * 8


_masked_unfold.register_autograd(_backward, setup_context=_setup_context)
counts_no_flops(torch.ops.fastssl.masked_unfold, torch.ops.fastssl.masked_unfold_backward)
