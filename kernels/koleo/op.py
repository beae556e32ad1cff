"""The public op fastssl::koleo: checks, backends, fake implementation, autograd."""

from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastssl.kernels.common import collectives, dispatch
from fastssl.kernels.common.collectives import Group
from fastssl.kernels.common.eager import custom_op
from fastssl.kernels.common.flops import counts_no_flops
from fastssl.kernels.common.gram_checks import check_batch, check_number
from fastssl.kernels.koleo import reference
from fastssl.kernels.koleo.reference import MIN_LENGTH


def _example(device: torch.device) -> tuple:
    return (torch.zeros(4, 6, device=device),)


OP = dispatch.register(
    "koleo",
    {"triton": dispatch.cannot_run_triton, "cpp": dispatch.cannot_run_cpp},
    _example,
)


def koleo(
    x: Tensor,  # [N, D]
    *,
    eps: float = 1e-8,
    group: Group = None,
    backend: str | None = None,
) -> Tensor:  # [] float32, float64 where x is
    """Kozachenko-Leonenko entropy regulariser: spread the features (Sablayrolles et al. 2019,
    arXiv 1806.03198; DINOv2, Oquab et al. 2023, arXiv 2304.07193).

    Rows of x are normalised to length 1 inside; the loss is -mean log(distance + eps) over rows, to
    each row's nearest other row. Gradients flow into both ends of each pair. Duplicates count with
    log(eps) and get no gradient from each other; a batch of one gives 0 with gradient 0.

    Several processes: neighbours are searched among the rows of all ranks of `group` (None: the
    default group), equally many on each; each rank returns the mean over its own rows, and the
    mean over ranks, of loss and gradients, is what one process has on the whole batch.

    Autocast does not touch x. Raises ValueError or TypeError for arguments that do not fit.
    """
    check_batch("x", x)
    check_number("eps", eps, positive=True)
    name = dispatch.choose_backend(OP, backend, x)
    group = collectives.group_name(group)
    # A row alone has no neighbour, and nothing to search.
    if name == "reference" or x.shape[0] * collectives.world_size(group) == 1:
        return reference.koleo(x, eps, group)
    return torch.ops.fastssl.koleo(x.contiguous(), eps, group, name)[0]


def _kernels(backend: str) -> ModuleType:
    if backend == "cpp":
        from fastssl.kernels.koleo import cpp_kernel as module
    else:
        from fastssl.kernels.koleo import triton_kernel as module
    return module


@custom_op("fastssl::koleo")
def _koleo(x: Tensor, eps: float, group: str, backend: str) -> list[Tensor]:
    """loss [], and of n own rows among C of all processes: the unit rows [C, D], the lengths, the
    nearest rows and the distances to them, [n] each."""
    kernels = _kernels(backend)
    rows = collectives.all_gather_with_grad(x, group)
    count, first = x.shape[0], collectives.rank(group) * x.shape[0]
    unit, norm = kernels.normalize(rows, MIN_LENGTH)
    nearest = kernels.nearest(rows, unit, norm, first, count)
    distances = kernels.distances(unit, first, nearest)
    loss = -(distances + eps).log().mean()
    return [loss, unit, norm[first : first + count].clone(), nearest, distances]


@_koleo.register_fake
def _koleo_fake(x, eps, group, backend):
    count, width = x.shape
    total = count * collectives.world_size(group)
    kwargs = {"dtype": torch.float32}
    return [
        x.new_empty((), **kwargs),
        x.new_empty((total, width), **kwargs),
        x.new_empty(count, **kwargs),
        x.new_empty(count, dtype=torch.int64),
        x.new_empty(count, **kwargs),
    ]


@custom_op("fastssl::koleo_backward")
def _koleo_backward(
    dloss: Tensor,
    unit: Tensor,
    norm: Tensor,
    nearest: Tensor,
    distances: Tensor,
    dtype: torch.dtype,
    eps: float,
    group: str,
    backend: str,
) -> Tensor:
    """The gradient of this process's rows, from the pairs that they stand in on all processes."""
    count = nearest.shape[0]
    first = collectives.rank(group) * count
    # The root has no finite slope at 0: duplicates count, but pull and push nothing.
    weights = (-dloss / count) / (distances + eps) / distances
    weights = torch.where(distances > 0, weights, 0.0)
    weights = collectives.all_gather_with_grad(weights, group)
    nearest = collectives.all_gather_with_grad(nearest, group)
    # Which rows a row is the neighbour of: a stretch of the rows sorted by neighbour.
    found, order = nearest.sort(stable=True)
    offsets = torch.searchsorted(found, torch.arange(first, first + count + 1, device=unit.device))
    return _kernels(backend).gradient(
        unit, first, norm, MIN_LENGTH, nearest, weights, order, offsets, dtype
    )


@_koleo_backward.register_fake
def _koleo_backward_fake(dloss, unit, norm, nearest, distances, dtype, *_):
    return unit.new_empty((nearest.shape[0], unit.shape[1]), dtype=dtype)


def _setup_context(ctx, inputs, output):
    x, *ctx.settings = inputs
    ctx.dtype = x.dtype
    # Autograd would fill the gradients of everything saved with zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _backward(ctx, grads):
    dx = torch.ops.fastssl.koleo_backward(grads[0], *ctx.saved_tensors, ctx.dtype, *ctx.settings)
    return dx, None, None, None


_koleo.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.fastssl.koleo)
def _flops(x, *_, **__):
    """Of one process's own rows against themselves."""
    rows, width = x
    return 2 * rows**2 * width


counts_no_flops(torch.ops.fastssl.koleo_backward)
