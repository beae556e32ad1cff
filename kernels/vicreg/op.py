"""The public op fastssl::vicreg: checks, backends, fake implementation, autograd."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastssl.kernels.common import collectives, dispatch, gram
from fastssl.kernels.common.autograd import reference_gradients
from fastssl.kernels.common.collectives import Group
from fastssl.kernels.common.gram_checks import check_number, check_pair
from fastssl.kernels.vicreg import reference


def _example(device: torch.device) -> tuple:
    return torch.zeros(4, 6, device=device), torch.zeros(4, 6, device=device)


OP = dispatch.register(
    "vicreg",
    {"triton": dispatch.cannot_run_triton, "cpp": dispatch.cannot_run_cpp},
    _example,
)


def vicreg(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    *,
    sim_coeff: float = 25.0,
    std_coeff: float = 25.0,
    cov_coeff: float = 1.0,
    eps: float = 1e-4,
    group: Group = None,
    backend: str | None = None,
) -> Tensor:  # [] float32, float64 where z0 and z1 are
    """Variance-invariance-covariance regularisation (Bardes et al. 2022, arXiv 2105.04906).

    The sum of sim_coeff * mean (z0 - z1)^2 and, for each view with the unbiased covariance C of its
    columns, std_coeff / 2 * mean_j max(0, 1 - sqrt(C_jj + eps)) and cov_coeff / D *
    sum_{i != j} C_ij^2. The half is the authors' code's, not the paper's. A batch of one has
    variance 0. Both views get gradients.

    Several processes: the rows of all ranks of `group` (None: the default group), equally many on
    each, are one batch; every rank returns the loss of the whole batch, and the mean over ranks of
    the gradients is what one process has.

    Autocast does not touch z0 and z1. Raises ValueError or TypeError for arguments that do not
    fit, naming them.
    """
    check_pair(z0, z1)
    coefficients = {"sim_coeff": sim_coeff, "std_coeff": std_coeff, "cov_coeff": cov_coeff}
    for name, value in coefficients.items():
        check_number(name, value)
    check_number("eps", eps, positive=True)
    name = dispatch.choose_backend(OP, backend, z0, z1)
    group = collectives.group_name(group)
    if name == "reference":
        return reference.vicreg(z0, z1, sim_coeff, std_coeff, cov_coeff, eps, group)
    views = (
        z0.contiguous(),
        z1.contiguous(),
    )
    return torch.ops.fastssl.vicreg(*views, sim_coeff, std_coeff, cov_coeff, eps, group, name)[0]


def _loss(sim_coeff: float, std_coeff: float, cov_coeff: float, eps: float) -> gram.VICReg:
    return gram.VICReg(sim_coeff, std_coeff, cov_coeff, eps)


@torch.library.custom_op("fastssl::vicreg", mutates_args=())
def _vicreg(
    z0: Tensor,
    z1: Tensor,
    sim_coeff: float,
    std_coeff: float,
    cov_coeff: float,
    eps: float,
    group: str,
    backend: str,
) -> list[Tensor]:
    """loss, y of each view, matrices, factors: see common/gram.py."""
    if backend == "reference":
        outputs = _vicreg_fake(z0, z1, sim_coeff, std_coeff, cov_coeff, eps, group, backend)
        value = reference.vicreg(z0, z1, sim_coeff, std_coeff, cov_coeff, eps, group)
        return [value.float(), *(output.zero_() for output in outputs[1:])]
    return list(gram.forward(backend, [z0, z1], _loss(sim_coeff, std_coeff, cov_coeff, eps), group))


@_vicreg.register_fake
def _vicreg_fake(z0, z1, sim_coeff, std_coeff, cov_coeff, eps, group, backend):
    return list(gram.empty_outputs([z0, z1], _loss(sim_coeff, std_coeff, cov_coeff, eps), group))


@torch.library.custom_op("fastssl::vicreg_backward", mutates_args=())
def _vicreg_backward(
    dloss: Tensor,
    ys: list[Tensor],
    matrices: list[Tensor],
    factors: Tensor,
    dtype: torch.dtype,
    wanted: list[bool],
    sim_coeff: float,
    std_coeff: float,
    cov_coeff: float,
    eps: float,
    group: str,
    backend: str,
) -> list[Tensor]:
    return gram.backward(
        backend,
        dloss,
        ys,
        matrices,
        factors,
        _loss(sim_coeff, std_coeff, cov_coeff, eps),
        dtype,
        wanted,
        group,
    )


@_vicreg_backward.register_fake
def _vicreg_backward_fake(dloss, ys, matrices, factors, dtype, wanted, *rest):
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
        return *reference_gradients(ctx, reference.vicreg, inputs, grads[0])[:2], *nothing
    *matrices, factors = saved[2:]
    wanted = ctx.needs_input_grad[:2]
    found = torch.ops.fastssl.vicreg_backward(
        *(grads[0], saved[:2], matrices, factors, ctx.dtype, wanted),
        *(*ctx.numbers, ctx.group, ctx.backend),
    )
    return *(grad if want else None for grad, want in zip(found, wanted, strict=True)), *nothing


_vicreg.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.fastssl.vicreg)
def _flops(z0, *_, group="", **__):
    return gram.forward_flops(z0, 2, False)


@register_flop_formula(torch.ops.fastssl.vicreg_backward)
def _backward_flops(dloss, ys, matrices, factors, dtype, wanted, *_, **__):
    return gram.backward_flops(matrices[0], ys[0], sum(wanted))
