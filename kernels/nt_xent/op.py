"""The public op fastssl::nt_xent: checks, backends, fake implementation, autograd."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastssl.kernels.common import collectives, contrastive, dispatch
from fastssl.kernels.common.autograd import reference_gradients
from fastssl.kernels.common.checks import check_shape
from fastssl.kernels.common.collectives import Group
from fastssl.kernels.common.contrastive import LN2, LOG2E
from fastssl.kernels.common.eager import custom_op
from fastssl.kernels.nt_xent import reference


def _example(device: torch.device) -> tuple:
    return torch.zeros(4, 8, device=device), torch.zeros(4, 8, device=device)


def cannot_run_triton(z0: Tensor, z1: Tensor) -> str | None:
    return dispatch.cannot_run_triton(z0, z1) or contrastive.why_not_triton(z0.shape[1])


OP = dispatch.register(
    "nt_xent", {"triton": cannot_run_triton, "cpp": dispatch.cannot_run_cpp}, _example
)


def nt_xent(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    *,
    temperature: float | Tensor,  # []
    group: Group = None,
    backend: str | None = None,
) -> Tensor:
    """SimCLR's loss (Chen et al. 2020, arXiv 2002.05709) of two views of N images.

    Each of the 2N features, divided by its length, finds the other view of its image among the
    2N - 1 others: the mean over the 2N of the cross-entropy of softmax(cosines / temperature).
    Returns a scalar, float32 (float64 for float64 features); z0, z1 and a temperature that is a
    tensor get gradients. Never cast by autocast.

    Several processes: the features of all ranks of `group` (None: the default group) are
    candidates, and the loss is the mean over this rank's features. Ranks must have equally many
    rows; the mean over ranks of loss and gradients (DDP, FSDP2) is then that of one process on the
    whole batch.

    Raises ValueError or TypeError for arguments that do not fit, naming them.
    """
    contrastive.check_features("z0", z0)
    contrastive.check_features("z1", z1, z0)
    check_shape("z1", z1, z0.shape, "[N, D]")
    temperature = contrastive.check_temperature(temperature, z0)
    dtype = torch.promote_types(z0.dtype, z1.dtype)
    z0, z1 = z0.to(dtype), z1.to(dtype)
    name = dispatch.choose_backend(OP, backend, z0, z1)
    if name == "reference":
        return reference.nt_xent(z0, z1, temperature, group)
    settings = (temperature, collectives.group_name(group), name)
    return torch.ops.fastssl.nt_xent(z0.contiguous(), z1.contiguous(), *settings)[0]


@custom_op("fastssl::nt_xent")
def _nt_xent(
    z0: Tensor, z1: Tensor, temperature: Tensor, group: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """loss; log2 of each row's sum of exponentials [2N]; and the features of all processes, empty
    for a process alone."""
    loss, log2_total, everyone = _nt_xent_fake(z0, z1, temperature, group, backend)
    if everyone.numel():
        everyone = collectives.all_gather_with_grad(torch.cat([z0, z1]), group)
    if backend == "reference":
        loss.copy_(reference.nt_xent(z0, z1, temperature, group))
        return loss, log2_total.zero_(), everyone
    passes = contrastive.passes(backend)
    factor = LOG2E / temperature
    rows = passes.prepare_pair(z0, z1)
    columns = passes.prepare(everyone, True) if everyone.numel() else rows
    first = collectives.rank(group) * log2_total.shape[0]
    state = contrastive.empty_state(log2_total.shape[0], None, z0)
    passes.stream_pairs(rows, columns, first, factor, state)
    log2_total.copy_(state.log2_total())
    num_images = z0.shape[0]
    views = (rows.part(0, num_images), rows.part(num_images, 2 * num_images))
    positive = passes.inner_products(*views) * factor
    loss.copy_(LN2 * (log2_total.view(2, -1) - positive).mean())
    return loss, log2_total, everyone


@_nt_xent.register_fake
def _nt_xent_fake(z0, z1, temperature, group, backend):
    dtype = torch.promote_types(z0.dtype, torch.float32)
    num_rows, dim = 2 * z0.shape[0], z0.shape[1]
    world = collectives.world_size(group)
    everyone = (world * num_rows, dim) if world > 1 else (0, 0)
    loss, log2_total = (z0.new_empty(shape, dtype=dtype) for shape in ((), (num_rows,)))
    return loss, log2_total, z0.new_empty(everyone)


@custom_op("fastssl::nt_xent_backward")
def _nt_xent_backward(
    dloss: Tensor,
    z0: Tensor,
    z1: Tensor,
    temperature: Tensor,
    log2_total: Tensor,
    everyone: Tensor,
    group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dz0, dz1, dtemperature. Rows of other ranks add p[j, i], each times the dloss of its rank."""
    passes = contrastive.passes(backend)
    num_images, num_rows = z0.shape[0], log2_total.shape[0]
    factor = LOG2E / temperature
    rows = passes.prepare_pair(z0, z1)
    columns, totals, weights = rows, log2_total, torch.ones_like(log2_total)
    scale = dloss / (num_rows * temperature)
    if everyone.numel():
        columns = passes.prepare(everyone, True)
        sent = torch.stack([log2_total, dloss.float().expand(num_rows)], dim=1)
        totals, weights = collectives.all_gather_with_grad(sent, group).t().contiguous()
        scale = 1 / (num_rows * temperature)
    first = collectives.rank(group) * num_rows
    gradients = (torch.empty_like(z0), torch.empty_like(z1))
    sums = tuple(
        g if g.dtype == torch.float32 else torch.empty_like(g, dtype=torch.float32)
        for g in gradients
    )
    passes.pair_gradient(rows, columns, first, factor, totals, weights, sums)
    mine = weights[first]
    along = torch.zeros_like(dloss, dtype=torch.float32)
    for view in range(2):
        here, there = (rows.part(v * num_images, (v + 1) * num_images) for v in (view, 1 - view))
        passes.finish_pair(sums[view], here, there, -2 * mine, scale, along, gradients[view])
    return *gradients, -along / (2 * temperature)


@_nt_xent_backward.register_fake
def _nt_xent_backward_fake(dloss, z0, z1, temperature, *_):
    return torch.empty_like(z0), torch.empty_like(z1), torch.empty_like(temperature)


def _setup_context(ctx, inputs, output):
    z0, z1, temperature, ctx.group, ctx.backend = inputs
    _, log2_total, everyone = output
    ctx.mark_non_differentiable(log2_total, everyone)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z0, z1, temperature, log2_total, everyone)


def _backward(ctx, dloss, *_):
    if ctx.backend == "reference":
        inputs = (*ctx.saved_tensors[:3], ctx.group)
        return *reference_gradients(ctx, reference.nt_xent, inputs, dloss), None
    grads = torch.ops.fastssl.nt_xent_backward(dloss, *ctx.saved_tensors, ctx.group, ctx.backend)
    grads = (g if want else None for g, want in zip(grads, ctx.needs_input_grad, strict=False))
    return *grads, None, None


_nt_xent.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.fastssl.nt_xent)
def _flops(z0, z1, temperature, group, backend, **_) -> int:
    # One triangle where the symmetry is used; by convention the work of all pairs.
    num_rows, dim = 2 * z0[0], z0[1]
    return 2 * num_rows * num_rows * collectives.world_size(group) * dim


@register_flop_formula(torch.ops.fastssl.nt_xent_backward)
def _backward_flops(dloss, z0, z1, temperature, log2_total, everyone, *_, **__) -> int:
    num_rows, dim = 2 * z0[0], z0[1]
    return 2 * 2 * num_rows * max(everyone[0], num_rows) * dim
