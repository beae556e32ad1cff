"""The public op fastssl::sinkhorn_knopp: checks, backends, fake implementation."""

import math
from types import ModuleType

import torch
from torch import Tensor

from fastssl.kernels.common import collectives, dispatch
from fastssl.kernels.common.checks import INDEX_DTYPES, check_int, check_tensor
from fastssl.kernels.common.collectives import Group
from fastssl.kernels.common.eager import custom_op
from fastssl.kernels.common.flops import counts_no_flops
from fastssl.kernels.sinkhorn_knopp import reference


def _example(device: torch.device) -> tuple:
    return (torch.zeros(4, 6, device=device),)


OP = dispatch.register(
    "sinkhorn_knopp",
    {
        "triton": dispatch.cannot_run_triton,
        "cpp": dispatch.cannot_run_cpp,
        "cuda": dispatch.cannot_run_cuda,
    },
    _example,
)


def sinkhorn_knopp(
    logits: Tensor,  # [B, K]
    *,
    temperature: float,
    num_iters: int = 3,
    group: Group = None,
    materialize: bool = True,
    num_rows: Tensor | None = None,  # [] int
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Equipartition of samples over prototypes, as in SwAV and DINOv2 (Caron et al. 2020,
    arXiv 2006.09882; Oquab et al. 2023, arXiv 2304.07193).

    The matrix exp(logits / temperature) [B, K] is scaled num_iters times, each time first the
    prototypes (columns), then the samples (rows) to equal sums. Returns the assignment [B, K],
    float32 (float64 for float64 logits), whose rows sum to 1; or, with materialize=False, the
    logarithms (log_u [K], log_v [B]) of the two scaling vectors::

        assignment = exp(logits / temperature + log_u + log_v)
                   = softmax(logits / temperature + log_u)

    for use by `dino_cross_entropy` without the matrix. num_rows, an integer tensor without
    dimensions on the logits' device, ignores all rows from that number on, whatever they hold,
    without a look at it from the host: their assignment and log_v are 0.

    Several processes: the rows of all ranks of `group` (None: the default group) are one batch, of
    which each rank gets its own rows; only vectors of K numbers travel, num_iters sums and one
    maximum. All ranks must call with the same K, temperature and num_iters.

    An assignment is a target: no gradient flows through it, and the logits are never cast by
    autocast. Logits must not hold NaN or +inf; -inf forbids a pair. temperature is a Python
    float; a tensor would need a host sync. Raises ValueError or TypeError for arguments that do
    not fit, naming them.
    """
    check_tensor("logits", logits, dim=2)
    if logits.shape[1] < 1:
        raise ValueError(f"logits must have at least one prototype, got {list(logits.shape)}")
    if isinstance(temperature, Tensor):
        raise TypeError("temperature must be a float, got a Tensor")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    check_int("num_iters", num_iters, 1)
    if num_rows is not None:
        check_tensor("num_rows", num_rows, dtypes=INDEX_DTYPES, device=logits.device)
        if num_rows.numel() != 1:
            raise ValueError(f"num_rows must hold one integer, got shape {list(num_rows.shape)}")
        num_rows = num_rows.reshape(()).long()
    logits = logits.detach()
    name = dispatch.choose_backend(OP, backend, logits)
    group = collectives.group_name(group)
    if name == "reference":
        assignment, log_u, log_v = reference.sinkhorn_knopp(
            logits, num_rows, temperature, num_iters, group
        )
    else:
        assignment, log_u, log_v = torch.ops.fastssl.sinkhorn_knopp(
            logits.contiguous(), num_rows, temperature, num_iters, materialize, group, name
        )
    return assignment if materialize else (log_u, log_v)


@custom_op("fastssl::sinkhorn_knopp")
def _sinkhorn_knopp(
    logits: Tensor,
    num_rows: Tensor | None,
    temperature: float,
    num_iters: int,
    materialize: bool,
    group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """assignment (empty unless `materialize`), log_u, log_v; `group` is a name, "" for none."""
    if backend == "reference":
        assignment, log_u, log_v = reference.sinkhorn_knopp(
            logits, num_rows, temperature, num_iters, group
        )
        return assignment if materialize else assignment.new_empty((0, 0)), log_u, log_v
    outputs = _sinkhorn_knopp_fake(
        logits, num_rows, temperature, num_iters, materialize, group, backend
    )
    if backend == "cpp":
        from fastssl.kernels.sinkhorn_knopp import cpp_kernel as passes
    elif backend == "cuda":
        from fastssl.kernels.sinkhorn_knopp import cuda_kernel as passes
    else:
        from fastssl.kernels.sinkhorn_knopp import triton_kernel as passes
    _run(passes, logits, num_rows, temperature, num_iters, materialize, group, *outputs)
    return outputs


def _run(
    passes: ModuleType,
    logits: Tensor,
    num_rows: Tensor | None,
    temperature: float,
    num_iters: int,
    materialize: bool,
    group: str,
    assignment: Tensor,
    log_u: Tensor,
    log_v: Tensor,
) -> None:
    """Fill the last three with a backend's passes and K numbers on the wire between them."""
    # (logit - anchor) * factor + offset is the score, in units of log 2.
    factor = min(1 / (math.log(2) * temperature), torch.finfo(torch.float32).max)
    common = (logits, num_rows, factor)
    anchor, sums, offset = torch.empty_like(log_u), torch.empty_like(log_u), torch.zeros_like(log_u)
    passes.columns(*common, anchor, sums)
    if group:
        local, anchor = anchor, collectives.all_reduce_max(anchor, group)
        passes.move(local, anchor, factor, sums)
    log2_mass = log_v.zero_()
    for _ in range(num_iters - 1):
        sums = collectives.all_reduce_sum(sums, group)
        passes.iterate(*common, anchor, offset, log2_mass, sums)
    sums = collectives.all_reduce_sum(sums, group)
    out = assignment if materialize else None
    passes.assign(*common, anchor, offset, sums, log_u, log_v, out)


@_sinkhorn_knopp.register_fake
def _sinkhorn_knopp_fake(logits, num_rows, temperature, num_iters, materialize, group, backend):
    dtype = torch.promote_types(logits.dtype, torch.float32)
    shape = logits.shape if materialize else (0, 0)
    return tuple(
        logits.new_empty(size, dtype=dtype) for size in (shape, logits.shape[1:], logits.shape[:1])
    )


counts_no_flops(torch.ops.fastssl.sinkhorn_knopp)
