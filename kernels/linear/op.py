"""The public op fastssl::linear: checks, backends, fake implementation, autograd."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastssl.kernels.common import dispatch, products
from fastssl.kernels.common.eager import custom_op, direct
from fastssl.kernels.linear import reference


def _example(device: torch.device) -> tuple:
    return torch.zeros(2, 8, device=device), torch.zeros(4, 8, device=device), None


OP = dispatch.register(
    "linear",
    {"triton": dispatch.cannot_run_triton, "cpp": dispatch.cannot_run_cpp},
    _example,
)


def linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None = None,  # [N]
    *,
    backend: str | None = None,
) -> Tensor:  # [..., N]
    """x weight^T + bias, as torch.nn.functional.linear.

    Under autocast the product and the result have the autocast dtype, and the gradients of x,
    weight and bias come in the dtypes of these, without autograd's casts. x is saved in the
    product's dtype, weight too unless the product reads it as it is. In float32 and float64
    without autocast it is F.linear, on every backend. weight and bias are parameters: under FSDP2
    call this inside the forward of the module that owns them.

    Raises ValueError or TypeError for arguments that do not fit, naming them.
    """
    products.check_linear(x, weight, bias, ("x", "weight", "bias"))
    dtype = products.product_dtype(x, weight, "weight")
    name = dispatch.choose_backend(OP, backend, x, weight, bias)
    if name == "reference" or dtype == torch.float32:
        return reference.linear(x, weight, bias, dtype)
    return _call(x.contiguous(), weight.contiguous(), bias, dtype, name)[0]


@custom_op("fastssl::linear", num_outputs=3)
def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, and x and weight as the products took them; None where that is as they are."""
    own_x = products.cast(x, dtype, backend)
    own_weight = products.operand(weight, dtype, backend)
    y = products.affine(products.rows_of(own_x), own_weight, bias, backend)
    return (
        y.view(*x.shape[:-1], weight.shape[0]),
        None if own_x is x else own_x,
        None if own_weight is weight else own_weight,
    )


@_linear.register_fake
def _linear_fake(x, weight, bias, dtype, backend):
    casts_weight = not products.is_operand(weight, dtype, backend)
    return (
        x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype),
        x.new_empty((0,)) if x.dtype == dtype else x.new_empty(x.shape, dtype=dtype),
        x.new_empty(weight.shape, dtype=dtype) if casts_weight else x.new_empty((0,)),
    )


@custom_op("fastssl::linear_backward", num_outputs=3)
def _linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    shape: Sequence[int],
    dx_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx of `shape`, dweight and dbias; those without a dtype are not wanted, and None."""
    dx = None
    dy = products.rows_of(dy)
    # The dtypes are decided, whatever context backward is called in.
    with torch.autocast(dy.device.type, enabled=False):
        x = None if dweight_dtype is None else products.rows_of(x)
        dweight, dbias = products.parameter_gradients(dy, x, dweight_dtype, dbias_dtype, backend)
        if dx_dtype is not None:
            dx = products.input_gradient(dy, weight, dx_dtype, backend).view(*shape)
    return dx, dweight, dbias


@_linear_backward.register_fake
def _linear_backward_fake(dy, x, weight, shape, dx_dtype, dweight_dtype, dbias_dtype, backend):
    num_outputs = dy.shape[-1]
    wanted = (
        (tuple(shape), dx_dtype),
        ((num_outputs, shape[-1]), dweight_dtype),
        ((num_outputs,), dbias_dtype),
    )
    return tuple(
        dy.new_empty((0,)) if dtype is None else dy.new_empty(size, dtype=dtype)
        for size, dtype in wanted
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias, dtype, ctx.backend = inputs
    _, own_x, own_weight = output
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    ctx.shape = x.shape
    ctx.dtypes = (
        x.dtype if wants_x else None,
        weight.dtype if wants_weight else None,
        bias.dtype if wants_bias else None,
    )
    # Autograd would fill gradients of the casts with zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        (x if x.dtype == dtype else own_x) if wants_weight else None,
        (weight if products.is_operand(weight, dtype, ctx.backend) else own_weight)
        if wants_x
        else None,
    )


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 5
    grads = _call_backward(dy.contiguous(), *ctx.saved_tensors, ctx.shape, *ctx.dtypes, ctx.backend)
    wanted = (
        None if dtype is None else grad for grad, dtype in zip(grads, ctx.dtypes, strict=True)
    )
    return *wanted, None, None


_linear.register_autograd(_backward, setup_context=_setup_context)
_call = direct(_linear, _setup_context, _backward)
_call_backward = direct(_linear_backward)


@register_flop_formula(torch.ops.fastssl.linear)
def _flops(x, weight, *_, **__):
    return 2 * math.prod(x) * weight[0]


@register_flop_formula(torch.ops.fastssl.linear_backward)
def _backward_flops(dy, x, weight, shape, dx_dtype, dweight_dtype, *_, **__):
    """One product per gradient of x and weight that is wanted."""
    return 2 * math.prod(dy) * shape[-1] * ((dx_dtype is not None) + (dweight_dtype is not None))
