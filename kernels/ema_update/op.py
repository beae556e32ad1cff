"""The public op fastssl::ema_update: checks, backends, fake implementation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.kernels.common import dispatch
from fastssl.kernels.common.checks import check_tensor
from fastssl.kernels.common.eager import custom_op
from fastssl.kernels.common.flops import counts_no_flops
from fastssl.kernels.ema_update import reference


def _tensors_of(targets: list, sources: list, momentum: Tensor | None) -> list:
    return [*targets, *sources, *([] if momentum is None else [momentum])]


def _cannot_flatten(targets: list[Tensor], sources: list[Tensor]) -> str | None:
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if _flat_pair(target, source) is None:
            return (
                f"targets[{i}] of strides {target.stride()} and sources[{i}] of strides "
                f"{source.stride()} do not lie in memory in one dense order"
            )
    return None


def _cannot_run_cpp(targets: list, sources: list, momentum: Tensor | None) -> str | None:
    reason = dispatch.cannot_run_cpp(*_tensors_of(targets, sources, momentum))
    return reason or _cannot_flatten(targets, sources)


def _cannot_run_triton(targets: list, sources: list, momentum: Tensor | None) -> str | None:
    reason = dispatch.cannot_run_triton(*_tensors_of(targets, sources, momentum))
    return reason or _cannot_flatten(targets, sources)


def _example(device: torch.device) -> tuple:
    return [torch.zeros(3, 5, device=device)], [torch.ones(3, 5, device=device)], None


OP = dispatch.register(
    "ema_update", {"triton": _cannot_run_triton, "cpp": _cannot_run_cpp}, _example
)


def ema_update(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    *,
    momentum: float | Tensor,
    backend: str | None = None,
) -> None:
    """Move each target towards its source, in place: see `fastssl.kernels.ema_update`.

    targets, sources: as many of the one as of the other, pairwise of one shape, all on one device;
    float32, bfloat16, float16 (float64: reference only), a pair may mix them. Targets must not
    share memory with each other or with sources. DTensors are taken by their local shards, for
    which both of a pair must be sharded alike.
    momentum: share of the target that stays, in [0, 1]; as a 0-d tensor on the same device (for
    a captured graph, say) it is used unseen.

    No gradient is recorded. Raises ValueError or TypeError that name the tensor.
    """
    targets, sources = list(targets), list(sources)
    if len(targets) != len(sources):
        raise ValueError(
            f"sources must be as many as targets, {len(targets)}, got {len(sources)} tensors"
        )
    if not targets:
        _split_momentum(momentum, None)
        return
    check_tensor("targets[0]", targets[0])
    device = targets[0].device
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        check_tensor(f"targets[{i}]", target, device=device)
        check_tensor(f"sources[{i}]", source, device=device)
        if target.shape != source.shape:
            raise ValueError(
                f"sources[{i}] must have the shape of targets[{i}], {list(target.shape)}, "
                f"got {list(source.shape)}"
            )
    number, tensor = _split_momentum(momentum, device)
    with torch.no_grad():
        pairs = [_local(i, *pair) for i, pair in enumerate(zip(targets, sources, strict=True))]
        targets, sources = ([pair[k] for pair in pairs] for k in (0, 1))
        name = dispatch.choose_backend(OP, backend, targets, sources, tensor)
        if name == "reference":
            reference.ema_update(targets, sources, number, tensor)
            return
        pairs = [_flat_pair(*pair) for pair in pairs]
        torch.ops.fastssl.ema_update(
            [target for target, _ in pairs],
            [source for _, source in pairs],
            number,
            None if tensor is None else tensor.float(),
            name,
        )


def _split_momentum(
    momentum: float | Tensor, device: torch.device | None
) -> tuple[float, Tensor | None]:
    """(number, None), or (1.0, tensor)."""
    if isinstance(momentum, Tensor):
        check_tensor("momentum", momentum, dim=0, device=device)
        return 1.0, momentum.detach()
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)):
        raise TypeError(f"momentum must be a float or a Tensor, got {type(momentum).__name__}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")
    return float(momentum), None


def _local(index: int, target: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's shards of a pair of DTensors. They are told by what they have, since the import
    of their class would cost every process a second."""
    layouts = [
        (x.device_mesh, tuple(x.placements)) if hasattr(x, "placements") else None
        for x in (target, source)
    ]
    if layouts[0] != layouts[1]:
        raise ValueError(
            f"sources[{index}] must be sharded like targets[{index}], {layouts[0]}, "
            f"got {layouts[1]}"
        )
    return (target, source) if layouts[0] is None else (target.to_local(), source.to_local())


def _flat_pair(target: Tensor, source: Tensor) -> tuple[Tensor, Tensor] | None:
    """The pair with its dimensions in the order in which both lie in memory without gaps."""
    if target.is_contiguous() and source.is_contiguous():
        return target, source
    order = sorted(range(target.dim()), key=target.stride, reverse=True)
    target, source = target.permute(order), source.permute(order)
    return (target, source) if target.is_contiguous() and source.is_contiguous() else None


@custom_op("fastssl::ema_update", mutates_args=("targets",))
def _ema_update(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: float,
    momentum_tensor: Tensor | None,
    backend: str,
) -> None:
    if backend == "reference":
        reference.ema_update(targets, sources, momentum, momentum_tensor)
    elif backend == "cpp":
        torch.ops.fastssl_csrc.ema_update(targets, sources, momentum, momentum_tensor)
    else:
        from fastssl.kernels.ema_update import triton_kernel

        triton_kernel.ema_update(targets, sources, momentum, momentum_tensor)


@_ema_update.register_fake
def _ema_update_fake(targets, sources, momentum, momentum_tensor, backend):
    return None


counts_no_flops(torch.ops.fastssl.ema_update)
