"""The public op fastssl::barlow_twins: checks, backends, fake implementation, autograd."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastssl.kernels.barlow_twins import reference
from fastssl.kernels.common import collectives, dispatch, gram
from fastssl.kernels.common.autograd import reference_gradients
from fastssl.kernels.common.collectives import Group
from fastssl.kernels.common.gram_checks import check_number, check_pair


def _example(device: torch.device) -> tuple:
    return torch.zeros(4, 6, device=device), torch.zeros(4, 6, device=device)


OP = dispatch.register(
    "barlow_twins",
    {"triton": dispatch.cannot_run_triton, "cpp": dispatch.cannot_run_cpp},
    _example,
)


def barlow_twins(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    *,
    lambd: float = 5e-3,
    eps: float = 1e-5,
    group: Group = None,
    backend: str | None = None,
) -> Tensor:  # [] float32, float64 where z0 and z1 are
    """Redundancy reduction between two views (Zbontar et al. 2021, arXiv 2103.03230).

    With C the D x D cross-correlation of the columns of z0 and z1, standardised over the batch
    (biased variance + eps, as a batch normalisation without parameters), the loss is
    sum_i (1 - C_ii)^2 + lambd * sum_{i != j} C_ij^2. Both views get gradients.

    Several processes: the rows of all ranks of `group` (None: the default group), equally many on
    each, are one batch; every rank returns the loss of the whole batch, and the mean over ranks of
    the gradients is what one process has.

    Autocast does not touch z0 and z1. Raises ValueError or TypeError for arguments that do not
    fit, naming them.
    """
    check_pair(z0, z1)
    check_number("lambd", lambd)
    check_number("eps", eps, positive=True)
    name = dispatch.choose_backend(OP, backend, z0, z1)
    group = collectives.group_name(group)
    if name == "reference":
        return reference.barlow_twins(z0, z1, lambd, eps, group)
    views = (
        z0.contiguous(),
        z1.contiguous(),
    )
    return torch.ops.fastssl.barlow_twins(*views, lambd, eps, group, name)[0]


def _loss(lambd: float, eps: float) -> gram.BarlowTwins:
    return gram.BarlowTwins(lambd, eps)


@torch.library.custom_op("fastssl::barlow_twins", mutates_args=())
def _barlow_twins(
    z0: Tensor,
    z1: Tensor,
    lambd: float,
    eps: float,
    group: str,
    backend: str,
) -> list[Tensor]:
    """loss, y of each view, matrices, factors: see common/gram.py."""
    if backend == "reference":
        outputs = _barlow_twins_fake(z0, z1, lambd, eps, group, backend)
        value = reference.barlow_twins(z0, z1, lambd, eps, group)
        return [value.float(), *(output.zero_() for output in outputs[1:])]
    return list(gram.forward(backend, [z0, z1], _loss(lambd, eps), group))


@_barlow_twins.register_fake
def _barlow_twins_fake(z0, z1, lambd, eps, group, backend):
    return list(gram.empty_outputs([z0, z1], _loss(lambd, eps), group))


@torch.library.custom_op("fastssl::barlow_twins_backward", mutates_args=())
def _barlow_twins_backward(
    dloss: Tensor,
    ys: list[Tensor],
    matrices: list[Tensor],
    factors: Tensor,
    dtype: torch.dtype,
    wanted: list[bool],
    lambd: float,
    eps: float,
    group: str,
    backend: str,
) -> list[Tensor]:
    return gram.backward(
        backend, dloss, ys, matrices, factors, _loss(lambd, eps), dtype, wanted, group
    )


@_barlow_twins_backward.register_fake
def _barlow_twins_backward_fake(dloss, ys, matrices, factors, dtype, wanted, *rest):
    return gram.empty_gradients(ys, matrices, dtype, wanted)


def _setup_context(ctx, inputs, output):
    views, (*ctx.numbers, ctx.group, ctx.backend) = inputs[:2], inputs[2:]
    ctx.dtype = views[0].dtype
    # Autograd would fill the gradients of everything saved with zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(views if ctx.backend == "reference" else output[1:]))


def _backward(ctx, grads):
    nothing = (None,) * (len(ctx.numbers) + 2)
    saved = ctx.saved_tensors
    if ctx.backend == "reference":
        inputs = (*saved, *ctx.numbers, ctx.group)
        return *reference_gradients(ctx, reference.barlow_twins, inputs, grads[0])[:2], *nothing
    *matrices, factors = saved[2:]
    wanted = ctx.needs_input_grad[:2]
    found = torch.ops.fastssl.barlow_twins_backward(
        *(grads[0], saved[:2], matrices, factors, ctx.dtype, wanted),
        *(*ctx.numbers, ctx.group, ctx.backend),
    )
    return *(grad if want else None for grad, want in zip(found, wanted, strict=True)), *nothing


_barlow_twins.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.fastssl.barlow_twins)
def _flops(z0, *_, group="", **__):
    return gram.forward_flops(z0, 2, True)


@register_flop_formula(torch.ops.fastssl.barlow_twins_backward)
def _backward_flops(dloss, ys, matrices, factors, dtype, wanted, *_, **__):
    return gram.backward_flops(matrices[0], ys[0], sum(wanted))
