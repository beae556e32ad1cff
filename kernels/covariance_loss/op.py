"""The public op fastssl::covariance_loss: checks, backends, fake implementation, autograd."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastssl.kernels.common import collectives, dispatch, gram
from fastssl.kernels.common.autograd import reference_gradients
from fastssl.kernels.common.collectives import Group
from fastssl.kernels.common.gram_checks import check_batch
from fastssl.kernels.covariance_loss import reference


def _example(device: torch.device) -> tuple:
    return (torch.zeros(4, 6, device=device),)


OP = dispatch.register(
    "covariance_loss",
    {"triton": dispatch.cannot_run_triton, "cpp": dispatch.cannot_run_cpp},
    _example,
)


def covariance_loss(
    z: Tensor,  # [N, D]
    *,
    group: Group = None,
    backend: str | None = None,
) -> Tensor:  # [] float32, float64 where z is
    """Sum of the squared off-diagonal entries of the unbiased covariance of z's columns, over D:
    the covariance term of VICReg (Bardes et al. 2022, arXiv 2105.04906).

    Several processes: the rows of all ranks of `group` (None: the default group), equally many on
    each, are one batch; every rank returns the loss of the whole batch, and the mean over ranks of
    the gradients is what one process has.

    Autocast does not touch z. Raises ValueError or TypeError for arguments that do not fit.
    """
    check_batch("z", z)
    name = dispatch.choose_backend(OP, backend, z)
    group = collectives.group_name(group)
    if name == "reference":
        return reference.covariance_loss(z, group)
    views = (z.contiguous(),)
    return torch.ops.fastssl.covariance_loss(*views, group, name)[0]


def _loss() -> gram.VICReg:
    return gram.VICReg(0.0, 0.0, 1.0, 1.0)


@torch.library.custom_op("fastssl::covariance_loss", mutates_args=())
def _covariance_loss(
    z: Tensor,
    group: str,
    backend: str,
) -> list[Tensor]:
    """loss, y of each view, matrices, factors: see common/gram.py."""
    if backend == "reference":
        outputs = _covariance_loss_fake(z, group, backend)
        value = reference.covariance_loss(z, group)
        return [value.float(), *(output.zero_() for output in outputs[1:])]
    return list(gram.forward(backend, [z], _loss(), group))


@_covariance_loss.register_fake
def _covariance_loss_fake(z, group, backend):
    return list(gram.empty_outputs([z], _loss(), group))


@torch.library.custom_op("fastssl::covariance_loss_backward", mutates_args=())
def _covariance_loss_backward(
    dloss: Tensor,
    ys: list[Tensor],
    matrices: list[Tensor],
    factors: Tensor,
    dtype: torch.dtype,
    wanted: list[bool],
    group: str,
    backend: str,
) -> list[Tensor]:
    return gram.backward(backend, dloss, ys, matrices, factors, _loss(), dtype, wanted, group)


@_covariance_loss_backward.register_fake
def _covariance_loss_backward_fake(dloss, ys, matrices, factors, dtype, wanted, *rest):
    return gram.empty_gradients(ys, matrices, dtype, wanted)


def _setup_context(ctx, inputs, output):
    views, (*ctx.numbers, ctx.group, ctx.backend) = inputs[:1], inputs[1:]
    ctx.dtype = views[0].dtype
    # Autograd would fill the gradients of everything saved with zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(views if ctx.backend == "reference" else output[1:]))


def _backward(ctx, grads):
    nothing = (None,) * (len(ctx.numbers) + 2)
    saved = ctx.saved_tensors
    if ctx.backend == "reference":
        inputs = (*saved, *ctx.numbers, ctx.group)
        return *reference_gradients(ctx, reference.covariance_loss, inputs, grads[0])[:1], *nothing
    *matrices, factors = saved[1:]
    wanted = ctx.needs_input_grad[:1]
    found = torch.ops.fastssl.covariance_loss_backward(
        *(grads[0], saved[:1], matrices, factors, ctx.dtype, wanted),
        *(*ctx.numbers, ctx.group, ctx.backend),
    )
    return *(grad if want else None for grad, want in zip(found, wanted, strict=True)), *nothing


_covariance_loss.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.fastssl.covariance_loss)
def _flops(z, *_, group="", **__):
    return gram.forward_flops(z, 1, False)


@register_flop_formula(torch.ops.fastssl.covariance_loss_backward)
def _backward_flops(dloss, ys, matrices, factors, dtype, wanted, *_, **__):
    return gram.backward_flops(matrices[0], ys[0], sum(wanted))
