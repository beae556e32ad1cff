"""The public op fastssl::gelu_mlp: checks, backends, fake implementation, autograd."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastssl.kernels.common import dispatch, products
from fastssl.kernels.common.eager import custom_op, direct
from fastssl.kernels.gelu_mlp import reference


def _example(device: torch.device) -> tuple:
    x, fc1_weight, fc2_weight = (
        torch.zeros(shape, device=device) for shape in ((2, 8), (16, 8), (8, 16))
    )
    return x, fc1_weight, None, fc2_weight, None


OP = dispatch.register(
    "gelu_mlp",
    {"triton": dispatch.cannot_run_triton, "cpp": dispatch.cannot_run_cpp},
    _example,
)


def gelu_mlp(
    x: Tensor,  # [..., K]
    fc1_weight: Tensor,  # [H, K]
    fc1_bias: Tensor | None,  # [H]
    fc2_weight: Tensor,  # [N, H]
    fc2_bias: Tensor | None,  # [N]
    *,
    backend: str | None = None,
) -> Tensor:  # [..., N]
    """gelu(x fc1_weight^T + fc1_bias) fc2_weight^T + fc2_bias, with the exact GELU (by erf).

    Under autocast the products and the result have the autocast dtype, and every gradient comes
    in the dtype of what it belongs to. x and the hidden layer before bias and GELU are saved in the
    products' dtype, the weights as `linear` does; the activation is made again in backward. The
    weights and biases are parameters: under FSDP2 call this inside the forward of the module that
    owns them.

    Raises ValueError or TypeError for arguments that do not fit, naming them.
    """
    products.check_linear(x, fc1_weight, fc1_bias, ("x", "fc1_weight", "fc1_bias"))
    # fc2's input: as wide as fc1's output.
    hidden = fc1_weight[:, :1].detach().t()
    products.check_linear(hidden, fc2_weight, fc2_bias, ("h", "fc2_weight", "fc2_bias"))
    dtype = products.product_dtype(x, fc1_weight, "fc1_weight")
    products.product_dtype(x, fc2_weight, "fc2_weight")
    tensors = (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    name = dispatch.choose_backend(OP, backend, *tensors)
    if name == "reference":
        return reference.gelu_mlp(*tensors, dtype)
    saves = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _call(
        *(x.contiguous(), fc1_weight.contiguous(), fc1_bias),
        *(fc2_weight.contiguous(), fc2_bias, dtype, saves, name),
    )[0]


@custom_op("fastssl::gelu_mlp", num_outputs=5)
def _gelu_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    dtype: torch.dtype,
    saves: bool,
    backend: str,
) -> tuple[Tensor | None, ...]:
    """y, and for backward h = x fc1_weight^T and x, fc1_weight and fc2_weight as the products took
    them; what is not needed, or is as it came, is None."""
    weights = (fc1_weight, fc2_weight)
    own = [
        products.cast(x, dtype, backend),
        *(products.operand(weight, dtype, backend) for weight in weights),
    ]
    h = products.affine(products.rows_of(own[0]), own[1], None, backend)
    activation = torch.empty_like(h) if saves else h
    bias = None if fc1_bias is None else fc1_bias.float().contiguous()
    if backend == "cpp":
        torch.ops.fastssl_csrc.gelu_mlp_fwd(h, bias, activation)
    else:
        from fastssl.kernels.gelu_mlp import triton_kernel

        triton_kernel.gelu_mlp_fwd(h, bias, activation)
    y = products.affine(activation, own[2], fc2_bias, backend)
    saved = (h, *own)
    kept = _kept(x, weights, dtype, saves, backend)
    return (
        y.view(*x.shape[:-1], fc2_weight.shape[0]),
        *(value if keep else None for value, keep in zip(saved, kept, strict=True)),
    )


def _kept(
    x: Tensor, weights: Sequence[Tensor], dtype: torch.dtype, saves: bool, backend: str
) -> list[bool]:
    """Whether h and the casts of x and the weights go from forward to backward."""
    casts = [not products.is_operand(weight, dtype, backend) for weight in weights]
    return [saves, *(saves and cast for cast in (x.dtype != dtype, *casts))]


@_gelu_mlp.register_fake
def _gelu_mlp_fake(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, dtype, saves, backend):
    num_rows, num_hidden = math.prod(x.shape[:-1]), fc1_weight.shape[0]
    shapes = ((num_rows, num_hidden), x.shape, fc1_weight.shape, fc2_weight.shape)
    kept = _kept(x, (fc1_weight, fc2_weight), dtype, saves, backend)
    return (
        x.new_empty((*x.shape[:-1], fc2_weight.shape[0]), dtype=dtype),
        *(
            x.new_empty(shape, dtype=dtype) if keep else x.new_empty((0,))
            for shape, keep in zip(shapes, kept, strict=True)
        ),
    )


@custom_op("fastssl::gelu_mlp_backward", num_outputs=5)
def _gelu_mlp_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor,
    fc1_weight: Tensor | None,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    shape: Sequence[int],
    dx_dtype: torch.dtype | None,
    dfc1_weight_dtype: torch.dtype | None,
    dfc1_bias_dtype: torch.dtype | None,
    dfc2_weight_dtype: torch.dtype | None,
    dfc2_bias_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor | None, ...]:
    """Gradients of x (of `shape`), fc1_weight, fc1_bias, fc2_weight and fc2_bias; those without a
    dtype are not wanted, and None."""
    dx = dfc1_bias = None
    dy = products.rows_of(dy)
    dh = products.input_gradient(dy, fc2_weight, dy.dtype, backend)
    activation = torch.empty_like(h)
    sums = _gelu_backward(h, fc1_bias, dh, activation, backend)
    if dfc1_bias_dtype is not None:
        dfc1_bias = sums.to(dfc1_bias_dtype)
    dfc2_weight, dfc2_bias = products.parameter_gradients(
        dy, activation, dfc2_weight_dtype, dfc2_bias_dtype, backend
    )
    del activation
    x = None if dfc1_weight_dtype is None else products.rows_of(x)
    dfc1_weight, _ = products.parameter_gradients(dh, x, dfc1_weight_dtype, None, backend)
    if dx_dtype is not None:
        dx = products.input_gradient(dh, fc1_weight, dx_dtype, backend).view(*shape)
    return dx, dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias


def _gelu_backward(
    h: Tensor, bias: Tensor | None, grad: Tensor, activation: Tensor, backend: str
) -> Tensor:
    """Turn the gradient of gelu(h + bias) into that of h; fill activation, return the bias's."""
    bias = None if bias is None else bias.float().contiguous()
    if backend != "cpp":
        from fastssl.kernels.gelu_mlp import triton_kernel

        return triton_kernel.gelu_mlp_bwd(h, bias, grad, activation)
    parts = h.new_empty((0,), dtype=torch.float32) if bias is None else products.new_parts(h)
    sums = h.new_empty((0 if bias is None else h.shape[1],), dtype=torch.float32)
    torch.ops.fastssl_csrc.gelu_mlp_bwd(h, bias, grad, activation, parts, sums)
    return sums


@_gelu_mlp_backward.register_fake
def _gelu_mlp_backward_fake(dy, x, h, fc1_weight, fc1_bias, fc2_weight, shape, *arguments):
    *dtypes, _ = arguments
    num_hidden, num_outputs = h.shape[1], dy.shape[-1]
    shapes = (
        *(tuple(shape), (num_hidden, shape[-1]), (num_hidden,)),
        *((num_outputs, num_hidden), (num_outputs,)),
    )
    return tuple(
        dy.new_empty((0,)) if dtype is None else dy.new_empty(size, dtype=dtype)
        for size, dtype in zip(shapes, dtypes, strict=True)
    )


def _setup_context(ctx, inputs, output):
    *tensors, dtype, _, backend = inputs
    x, fc1_weight, fc1_bias, fc2_weight, _ = tensors
    ctx.backend = backend
    ctx.shape = x.shape
    ctx.dtypes = [
        value.dtype if want else None
        for value, want in zip(tensors, ctx.needs_input_grad, strict=False)
    ]
    own_x = x if x.dtype == dtype else output[2]
    own_fc1_weight, own_fc2_weight = (
        weight if products.is_operand(weight, dtype, backend) else cast
        for weight, cast in zip((fc1_weight, fc2_weight), output[3:], strict=True)
    )
    wants_x, wants_fc1_weight = ctx.needs_input_grad[:2]
    # Autograd would fill gradients of the casts with zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        own_x if wants_fc1_weight else None,
        output[1],
        own_fc1_weight if wants_x else None,
        fc1_bias,
        own_fc2_weight,
    )


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 8
    grads = _call_backward(dy.contiguous(), *ctx.saved_tensors, ctx.shape, *ctx.dtypes, ctx.backend)
    wanted = (
        None if dtype is None else grad for grad, dtype in zip(grads, ctx.dtypes, strict=True)
    )
    return *wanted, None, None, None


_gelu_mlp.register_autograd(_backward, setup_context=_setup_context)
_call = direct(_gelu_mlp, _setup_context, _backward)
_call_backward = direct(_gelu_mlp_backward)


@register_flop_formula(torch.ops.fastssl.gelu_mlp)
def _flops(x, fc1_weight, fc1_bias, fc2_weight, *_, **__):
    return 2 * math.prod(x[:-1]) * fc1_weight[0] * (x[-1] + fc2_weight[0])


@register_flop_formula(torch.ops.fastssl.gelu_mlp_backward)
def _backward_flops(dy, x, h, fc1_weight, fc1_bias, fc2_weight, shape, *arguments, **__):
    """One product for dh, one per gradient of x and of the weights that is wanted."""
    wants_x, wants_fc1_weight, _, wants_fc2_weight = (d is not None for d in arguments[:4])
    inner, outer = wants_x + wants_fc1_weight, 1 + wants_fc2_weight
    return 2 * math.prod(h) * (shape[-1] * inner + dy[-1] * outer)
