"""The public op fastssl::info_nce: checks, backends, fake implementation, autograd."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastssl.kernels.common import collectives, contrastive, dispatch
from fastssl.kernels.common.autograd import reference_gradients
from fastssl.kernels.common.checks import check_shape, check_tensor
from fastssl.kernels.common.collectives import Group
from fastssl.kernels.common.contrastive import LN2, LOG2E, Rows, State
from fastssl.kernels.common.eager import custom_op
from fastssl.kernels.info_nce import reference


def _example(device: torch.device) -> tuple:
    return torch.zeros(4, 8, device=device), torch.zeros(4, 8, device=device), None


def cannot_run_triton(queries: Tensor, keys: Tensor, negatives: Tensor | None) -> str | None:
    reason = dispatch.cannot_run_triton(queries, keys, negatives)
    return reason or contrastive.why_not_triton(queries.shape[1])


OP = dispatch.register(
    "info_nce", {"triton": cannot_run_triton, "cpp": dispatch.cannot_run_cpp}, _example
)


def info_nce(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [N, D]
    *,
    temperature: float | Tensor,  # []
    negatives: Tensor | None = None,  # [M, D] or [N, M, D]
    in_batch_negatives: bool = True,
    normalize: bool = True,
    group: Group = None,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE (van den Oord et al. 2018, arXiv 1807.03748): query i finds key i among all keys.

    The mean over queries of the cross-entropy of softmax(queries @ candidates^T / temperature) with
    the query's own key. Candidates are the keys of the whole batch and `negatives`: [M, D] for all
    queries (a queue: MoCo, arXiv 1911.05722) or [N, M, D], M for each (a memory bank). With
    in_batch_negatives=False they are the query's own key and `negatives` alone, as in MoCo, NPID
    and PIRL. normalize=True divides queries and keys by their lengths, never the negatives, which
    are taken as they are. Returns a scalar, float32 (float64 for float64 queries).

    queries, keys and a temperature that is a tensor get gradients; keys that want none (MoCo's, of
    the momentum encoder) cost none. Negatives get none, and are refused if they ask for one. Never
    cast by autocast.

    Several processes: the keys of all ranks of `group` (None: the default group) are candidates
    for every rank's queries, and the loss is the mean over this rank's queries. Ranks must have
    equally many rows; the mean over ranks of loss and gradients (DDP, FSDP2) is then that of one
    process on the whole batch. `negatives` [M, D] must be the same on all ranks for this, those of
    [N, M, D] belong to this rank's queries.

    Raises ValueError or TypeError for arguments that do not fit, naming them.
    """
    _check(queries, keys, negatives, in_batch_negatives)
    temperature = contrastive.check_temperature(temperature, queries)
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    queries, keys = queries.to(dtype), keys.to(dtype)
    first = 0
    if in_batch_negatives:
        first = collectives.rank(group) * queries.shape[0]
        keys = collectives.all_gather_with_grad(keys, group)
    name = dispatch.choose_backend(OP, backend, queries, keys, negatives)
    settings = (first, bool(in_batch_negatives), bool(normalize))
    if name == "reference":
        return reference.info_nce(queries, keys, negatives, temperature, *settings)
    wants_gradient = torch.is_grad_enabled() and (
        queries.requires_grad or temperature.requires_grad
    )
    tensors = (queries.contiguous(), keys.contiguous())
    negatives = None if negatives is None else negatives.contiguous()
    return torch.ops.fastssl.info_nce(
        *tensors, negatives, temperature, *settings, wants_gradient, name
    )[0]


def _check(
    queries: Tensor, keys: Tensor, negatives: Tensor | None, in_batch_negatives: bool
) -> None:
    contrastive.check_features("queries", queries)
    contrastive.check_features("keys", keys, queries)
    check_shape("keys", keys, queries.shape, "[N, D]")
    if negatives is None:
        if not in_batch_negatives:
            raise ValueError("negatives must be given where in_batch_negatives is False, got None")
        return
    check_tensor("negatives", negatives, dim=(2, 3), device=queries.device)
    if negatives.dim() == 2:
        check_shape("negatives", negatives, (None, queries.shape[1]), "[M, D]")
    else:
        expected = (queries.shape[0], None, queries.shape[1])
        check_shape("negatives", negatives, expected, "[N, M, D]")
    if negatives.requires_grad and torch.is_grad_enabled():
        raise ValueError("negatives must not require a gradient (detach them), got one that does")


@custom_op("fastssl::info_nce")
def _info_nce(
    queries: Tensor,
    keys: Tensor,
    negatives: Tensor | None,
    temperature: Tensor,
    first: int,
    in_batch_negatives: bool,
    normalize: bool,
    wants_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss; log2 of each query's sum of exponentials; and, empty unless wants_gradient, the
    gradients of the queries (float32) and of the temperature."""
    settings = (first, in_batch_negatives, normalize)
    outputs = _info_nce_fake(
        queries, keys, negatives, temperature, *settings, wants_gradient, backend
    )
    if backend == "reference":
        loss, *rest = outputs
        loss.copy_(reference.info_nce(queries, keys, negatives, temperature, *settings))
        for value in rest:
            value.zero_()
        return outputs
    _forward(backend, queries, keys, negatives, temperature, *settings, wants_gradient, *outputs)
    return outputs


@_info_nce.register_fake
def _info_nce_fake(queries, keys, negatives, temperature, *settings):
    wants_gradient = settings[-2]
    num_queries, dim = queries.shape
    gradient_shape = (num_queries, dim) if wants_gradient else (0, 0)
    shapes = ((), (num_queries,), gradient_shape, (1 if wants_gradient else 0,))
    dtype = torch.promote_types(queries.dtype, torch.float32)
    return tuple(queries.new_empty(shape, dtype=dtype) for shape in shapes)


def _forward(
    backend: str,
    queries: Tensor,
    keys: Tensor,
    negatives: Tensor | None,
    temperature: Tensor,
    first: int,
    in_batch_negatives: bool,
    normalize: bool,
    wants_gradient: bool,
    loss: Tensor,
    log2_total: Tensor,
    dqueries: Tensor,
    dtemperature: Tensor,
) -> None:
    """Fill the last four; the gradients are the keys' mean under the softmax less the own key, so
    they come out of the same stream of keys."""
    passes = contrastive.passes(backend)
    num_queries, dim = queries.shape
    factor = LOG2E / temperature
    rows, columns = passes.prepare(queries, normalize), passes.prepare(keys, normalize)
    unit, own = rows.unit(), columns.part(first, first + num_queries).unit()
    positive = contrastive.row_products(unit, own) * factor
    if in_batch_negatives:
        state = contrastive.empty_state(num_queries, dim if wants_gradient else None, queries)
        passes.stream(rows, columns, factor, state)
    else:
        total = torch.ones_like(positive, dtype=torch.float64)
        state = State(positive.clone(), total, own.clone() if wants_gradient else None)
    if negatives is not None and negatives.dim() == 2:
        passes.stream(rows, Rows(negatives, None, False), factor, state)
    elif negatives is not None:
        passes.stream_per_row(rows, negatives, factor, state)
    log2_total.copy_(state.log2_total())
    loss.copy_(LN2 * (log2_total - positive).mean())
    if wants_gradient:
        gradient = state.weighted.div_(state.total.float()[:, None]).sub_(own)
        gradient.div_(num_queries * temperature)
        dtemperature.copy_(-(contrastive.row_products(unit, gradient).sum() / temperature))
        passes.project(gradient, rows, dqueries)


@custom_op("fastssl::info_nce_backward")
def _info_nce_backward(
    dloss: Tensor,
    queries: Tensor,
    keys: Tensor,
    temperature: Tensor,
    log2_total: Tensor,
    first: int,
    in_batch_negatives: bool,
    normalize: bool,
    backend: str,
) -> Tensor:
    """dkeys: the scores of queries and keys once more, and one product."""
    passes = contrastive.passes(backend)
    num_queries = queries.shape[0]
    factor = LOG2E / temperature
    rows, columns = passes.prepare(queries, normalize), passes.prepare(keys, normalize)
    unit = rows.unit()
    mine = slice(first, first + num_queries)
    if in_batch_negatives:
        gradient = passes.key_gradient(rows, columns, factor, log2_total)
        gradient[mine] -= unit
    else:
        gradient = torch.zeros_like(keys, dtype=torch.float32)
        positive = (
            contrastive.row_products(unit, columns.part(mine.start, mine.stop).unit()) * factor
        )
        gradient[mine] = unit * ((positive - log2_total).exp2() - 1)[:, None]
    gradient.mul_(dloss / (num_queries * temperature))
    dkeys = torch.empty_like(keys)
    passes.project(gradient, columns, dkeys)
    return dkeys


@_info_nce_backward.register_fake
def _info_nce_backward_fake(dloss, queries, keys, *_):
    return torch.empty_like(keys)


def _setup_context(ctx, inputs, output):
    queries, keys, negatives, temperature, *settings, wants_gradient, ctx.backend = inputs
    _, log2_total, dqueries, dtemperature = output
    ctx.settings, ctx.wants_gradient = settings, wants_gradient
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    if ctx.backend == "reference":
        ctx.save_for_backward(queries, keys, negatives, temperature)
    else:
        ctx.dtype = queries.dtype
        # Queries are read again for the gradient of the keys only.
        again = (queries, keys, log2_total) if ctx.needs_input_grad[1] else (None, None, None)
        ctx.save_for_backward(*again, temperature, dqueries, dtemperature)


def _backward(ctx, dloss, *_):
    rest = (None,) * 5
    if ctx.backend == "reference":
        inputs = (*ctx.saved_tensors, *ctx.settings)
        dqueries, dkeys, _, dtemperature, *_ = reference_gradients(
            ctx, reference.info_nce, inputs, dloss
        )
        return dqueries, dkeys, None, dtemperature, *rest
    queries, keys, log2_total, temperature, unit_dqueries, unit_dtemperature = ctx.saved_tensors
    dqueries = dkeys = dtemperature = None
    if ctx.needs_input_grad[0]:
        dqueries = (unit_dqueries * dloss).to(ctx.dtype)
    if ctx.needs_input_grad[1]:
        dkeys = torch.ops.fastssl.info_nce_backward(
            dloss, queries, keys, temperature, log2_total, *ctx.settings, ctx.backend
        )
    if ctx.needs_input_grad[3]:
        dtemperature = unit_dtemperature.reshape(()) * dloss
    return dqueries, dkeys, None, dtemperature, *rest


_info_nce.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.fastssl.info_nce)
def _flops(queries, keys, negatives, *settings, **_) -> int:
    (num_queries, dim), wants_gradient = queries, settings[-2]
    columns = keys[0] if settings[2] else 1
    columns += 0 if negatives is None else negatives[-2]
    return 2 * num_queries * columns * dim * (2 if wants_gradient else 1)


@register_flop_formula(torch.ops.fastssl.info_nce_backward)
def _backward_flops(dloss, queries, keys, *settings, **_) -> int:
    columns = keys[0] if settings[3] else 1
    return 2 * 2 * queries[0] * columns * queries[1]
