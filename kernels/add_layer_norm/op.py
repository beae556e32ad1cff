"""The public op fastssl::add_layer_norm: checks, backends, fake implementation, autograd."""

import torch
from torch import Tensor

from fastssl.kernels.add_layer_norm import reference
from fastssl.kernels.common import dispatch
from fastssl.kernels.common.autograd import reference_gradients
from fastssl.kernels.common.checks import FLOAT_DTYPES, check_shape, check_tensor
from fastssl.kernels.common.eager import custom_op, direct
from fastssl.kernels.common.flops import counts_no_flops

# Triton keeps a whole row in one program.
MAX_TRITON_COLUMNS = 8192
# Rows whose column sums are added up before they meet those of other rows. The numbers depend on
# the shape alone, so the sums do not depend on the number of threads.
CHUNK_ROWS, MAX_CHUNKS = 32, 256


def _example(device: torch.device) -> tuple:
    x, vector = torch.zeros(2, 3, 8, device=device), torch.zeros(8, device=device)
    return x, x, vector, vector, None, None, torch.float32


def _why_not_compiled(scale: Tensor | None, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "dtype torch.float64 is served by the reference only"
    if scale is not None and scale.requires_grad and torch.is_grad_enabled():
        return "scale requires a gradient, which the reference alone computes"
    return None


def cannot_run_cpp(*arguments) -> str | None:
    *tensors, scale, dtype = arguments
    return dispatch.cannot_run_cpp(*tensors, scale) or _why_not_compiled(scale, dtype)


def cannot_run_triton(*arguments) -> str | None:
    *tensors, scale, dtype = arguments
    if tensors[0].shape[-1] > MAX_TRITON_COLUMNS:
        return f"D is {tensors[0].shape[-1]}, a program holds at most {MAX_TRITON_COLUMNS}"
    return dispatch.cannot_run_triton(*tensors, scale) or _why_not_compiled(scale, dtype)


OP = dispatch.register(
    "add_layer_norm", {"triton": cannot_run_triton, "cpp": cannot_run_cpp}, _example
)


def add_layer_norm(
    x: Tensor,  # [B, ..., D]
    branch: Tensor | None,  # as x
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    eps: float = 1e-6,
    *,
    gamma: Tensor | None = None,  # [D]
    scale: Tensor | None = None,  # [B]
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # residual and normed, both as x
    """Ends one branch of a pre-norm block and begins the next: residual add, then LayerNorm.

    residual = x + branch * gamma * scale[b], in the wider dtype of x and branch, and normed =
    LayerNorm(residual) * weight + bias (Ba et al. 2016, arXiv 1607.06450) in `dtype`; None is the
    autocast dtype where autocast is on, otherwise the residual's. So a float32 residual stream
    gives the next linear its half-precision input without a cast, rounded once.

    `gamma` is LayerScale (arXiv 2103.17239), `scale` the factor of stochastic depth of each sample
    (arXiv 1603.09382): 0 where the branch is dropped, 1 / keep_prob where it is not. With
    branch=None there is nothing to add: residual is x itself and normed a plain LayerNorm.
    Statistics and sums are float32 (float64 for a float64 residual). Gradients reach everything
    but `scale`, where it does not require one.

    Raises ValueError or TypeError for arguments that do not fit, naming them.
    """
    dtype = _check(x, branch, weight, bias, eps, gamma, scale, dtype)
    name = dispatch.choose_backend(OP, backend, x, branch, weight, bias, gamma, scale, dtype)
    if name == "reference":
        return reference.add_layer_norm(x, branch, weight, bias, gamma, scale, eps, dtype)
    # The kernels compute in float32, so the small operands come in float32.
    small = (None if t is None else t.float().contiguous() for t in (weight, bias, gamma, scale))
    if branch is None:
        added, rows = x.contiguous(), None
    else:
        added = x.to(torch.promote_types(x.dtype, branch.dtype)).contiguous()
        rows = branch.contiguous()
    residual, normed, _ = _call(added, rows, *small, float(eps), dtype, name)
    return x if branch is None else residual, normed


def _check(
    x: object,
    branch: object,
    weight: object,
    bias: object,
    eps: object,
    gamma: object,
    scale: object,
    dtype: object,
) -> torch.dtype:
    """The dtype of normed; refuses what does not fit."""
    check_tensor("x", x)
    device = x.device
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must have shape [B, ..., D] with D at least 1, got {list(x.shape)}")
    if branch is not None:
        check_tensor("branch", branch, device=device)
        check_shape("branch", branch, x.shape, "as x")
    for name, value in (("weight", weight), ("bias", bias), ("gamma", gamma)):
        if name == "gamma" and value is None:
            continue
        check_tensor(name, value, dim=1, device=device)
        check_shape(name, value, x.shape[-1:], "[D]")
    if scale is not None:
        check_tensor("scale", scale, dim=1, device=device)
        if x.dim() < 2:
            raise ValueError(f"scale needs x of shape [B, ..., D], got {list(x.shape)}")
        check_shape("scale", scale, x.shape[:1], "[B]")
    if branch is None and not (gamma is None and scale is None):
        name = "scale" if gamma is None else "gamma"
        raise ValueError(f"{name} must be None where branch is None, got a Tensor")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a float, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    residual_dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    if dtype is None:
        is_cast = torch.is_autocast_enabled(device.type) and residual_dtype != torch.float64
        return torch.get_autocast_dtype(device.type) if is_cast else residual_dtype
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be a floating-point dtype or None, got {dtype}")
    return dtype


@custom_op("fastssl::add_layer_norm", num_outputs=3)
def _add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    scale: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor | None, ...]:
    """residual (None without a branch), normed, and each row's mean and 1 / std [..., 2]."""
    if backend == "reference":
        arguments = (x, branch, weight, bias, gamma, scale, eps, dtype)
        residual, normed = reference.add_layer_norm(*arguments)
        return None if branch is None else residual, normed, None
    residual = None if branch is None else torch.empty_like(x)
    normed = torch.empty_like(x, dtype=dtype)
    stats = x.new_empty((*x.shape[:-1], 2), dtype=torch.float32)
    arguments = (x, branch, weight, bias, gamma, scale, eps, residual, normed, stats)
    if backend == "cpp":
        torch.ops.fastssl_csrc.add_layer_norm_fwd(*arguments)
    else:
        from fastssl.kernels.add_layer_norm import triton_kernel

        triton_kernel.add_layer_norm_fwd(*arguments)
    return residual, normed, stats


@_add_layer_norm.register_fake
def _add_layer_norm_fake(x, branch, weight, bias, gamma, scale, eps, dtype, backend):
    no_stats = backend == "reference"
    return (
        x.new_empty((0,) if branch is None else x.shape),
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty((0,)) if no_stats else x.new_empty((*x.shape[:-1], 2), dtype=torch.float32),
    )


@custom_op("fastssl::add_layer_norm_backward", num_outputs=5)
def _add_layer_norm_backward(
    dresidual: Tensor | None,
    dnormed: Tensor,
    residual: Tensor,
    stats: Tensor,
    weight: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    scale: Tensor | None,
    branch_dtype: torch.dtype | None,
    wants_affine: bool,
    backend: str,
) -> tuple[Tensor | None, ...]:
    """dx, dbranch (None if branch_dtype is), dweight and dbias (None unless wanted), dgamma (None
    if branch is)."""
    inputs = (dresidual, dnormed, residual, stats, weight, branch, gamma, scale)
    dweight = dbias = None
    if wants_affine:
        dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    written = (
        torch.empty_like(residual),
        None if branch_dtype is None else torch.empty_like(residual, dtype=branch_dtype),
        *(dweight, dbias),
        None if branch is None else torch.empty_like(weight),
    )
    if backend == "cpp":
        num_rows = stats.numel() // 2
        chunk_rows = max(CHUNK_ROWS, -(-num_rows // MAX_CHUNKS))
        shape = (-(-num_rows // chunk_rows), 3, residual.shape[-1])
        partial = residual.new_empty(shape, dtype=torch.float32)
        torch.ops.fastssl_csrc.add_layer_norm_bwd(*inputs, chunk_rows, partial, *written)
    else:
        from fastssl.kernels.add_layer_norm import triton_kernel

        triton_kernel.add_layer_norm_bwd(*inputs, *written)
    return written


@_add_layer_norm_backward.register_fake
def _add_layer_norm_backward_fake(
    dresidual,
    dnormed,
    residual,
    stats,
    weight,
    branch,
    gamma,
    scale,
    branch_dtype,
    wants_affine,
    backend,
):
    like = dnormed if dresidual is None else dresidual
    sums = [residual.new_empty(residual.shape[-1:], dtype=torch.float32) for _ in range(3)]
    return (
        residual.new_empty(residual.shape),
        like.new_empty((0,))
        if branch_dtype is None
        else residual.new_empty(residual.shape, dtype=branch_dtype),
        *(sums[:2] if wants_affine else (like.new_empty((0,)), like.new_empty((0,)))),
        like.new_empty((0,)) if branch is None else sums[2],
    )


def _setup_context(ctx, inputs, output):
    x, branch, weight, bias, gamma, scale, eps, dtype, backend = inputs
    residual, _, stats = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats)
    ctx.backend, ctx.eps, ctx.dtype = backend, eps, dtype
    ctx.branch_dtype = None if branch is None else branch.dtype
    if backend == "reference":
        ctx.save_for_backward(x, branch, weight, bias, gamma, scale)
        return
    wants_dgamma = gamma is not None and ctx.needs_input_grad[4]
    residual = x if branch is None else residual
    branch = branch if wants_dgamma else None
    ctx.save_for_backward(residual, stats, weight, branch, gamma, scale)


def _backward(ctx, dresidual, dnormed, *_):
    if ctx.branch_dtype is None:
        dresidual = None  # of an empty tensor
    if dresidual is None and dnormed is None:
        return (None,) * 9
    if ctx.backend == "reference":
        return *_gradients_of_reference(ctx, dresidual, dnormed), None, None, None
    residual, stats, weight, branch, gamma, scale = ctx.saved_tensors
    wants_branch, wants_weight, wants_bias = ctx.needs_input_grad[1:4]
    if dnormed is None:
        dbranch, dgamma = _gradients_of_add(ctx, dresidual, branch, gamma, scale)
        return dresidual, dbranch, None, None, dgamma, None, None, None, None
    # The gradient of a plain sum is one tensor for both of its terms.
    is_shared = gamma is None and scale is None and ctx.branch_dtype == residual.dtype
    dx, dbranch, dweight, dbias, dgamma = _call_backward(
        None if dresidual is None else dresidual.contiguous(),
        dnormed.contiguous(),
        *(residual, stats, weight, branch, gamma, scale),
        ctx.branch_dtype if wants_branch and not is_shared else None,
        wants_weight or wants_bias,
        ctx.backend,
    )
    return (
        dx if ctx.needs_input_grad[0] else None,
        (dx if is_shared else dbranch) if wants_branch else None,
        dweight if wants_weight else None,
        dbias if wants_bias else None,
        None if branch is None else dgamma,
        *(None,) * 4,
    )


def _gradients_of_add(ctx, dresidual, branch, gamma, scale):
    """dbranch and dgamma where nothing uses normed."""
    scaled = dresidual
    if scale is not None:
        scaled = scaled * scale.view(-1, *(1,) * (dresidual.dim() - 1))
    dgamma = None if branch is None else (scaled.float() * branch).flatten(0, -2).sum(0)
    if not ctx.needs_input_grad[1]:
        return None, dgamma
    return (scaled if gamma is None else scaled * gamma).to(ctx.branch_dtype), dgamma


def _gradients_of_reference(ctx, dresidual, dnormed):
    def function(*inputs) -> Tensor:
        outputs = reference.add_layer_norm(*inputs, ctx.eps, ctx.dtype)
        pairs = zip(outputs, (dresidual, dnormed), strict=True)
        return sum((out * grad).double().sum() for out, grad in pairs if grad is not None)

    one = torch.ones((), dtype=torch.float64, device=ctx.saved_tensors[0].device)
    return reference_gradients(ctx, function, ctx.saved_tensors, one)


_add_layer_norm.register_autograd(_backward, setup_context=_setup_context)
_call = direct(_add_layer_norm, _setup_context, _backward)
_call_backward = direct(_add_layer_norm_backward)
counts_no_flops(torch.ops.fastssl.add_layer_norm, torch.ops.fastssl.add_layer_norm_backward)
