"""Collectives of the losses, with and without gradient; a process alone keeps its own value.

The convention of the gradients: every rank r has a loss L_r, and DDP and FSDP2 average the
gradients of the parameters over ranks, so what is minimised is mean_r L_r. A collective's
backward therefore gives rank r the sum over ranks q of dL_q/dx_r, and the mean that DDP takes
does the division. Two kinds of loss come out equal to ONE process on the whole batch, without any
factor of the world size:

- every rank computes the loss of the whole batch from gathered or reduced values;
- every rank computes the mean over its own rows, equally many on each rank, against gathered
  values.

`group` is a process group, None for the default one, or the name of one (`group_name`), which is
what the schema of an op can carry. Works under torch.compile; tensors keep their shape on every
rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | str | None if dist.is_available() else str | None


def _is_alone(group: Group) -> bool:
    return group == "" or not (dist.is_available() and dist.is_initialized())


def group_name(group: Group = None) -> str:
    """What the schema of an op can carry in place of `group`; "" for a process alone."""
    if isinstance(group, str):
        return group
    if world_size(group) == 1:
        return ""
    return (dist.group.WORLD if group is None else group).group_name


def world_size(group: Group = None) -> int:
    """Number of processes; 1 where torch.distributed is not initialised."""
    if _is_alone(group):
        return 1
    if isinstance(group, str):
        return dist.distributed_c10d._get_group_size_by_name(group)
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError("group must be one that this process is a member of")
    return size


def rank(group: Group = None) -> int:
    """Number of this process in the group; 0 where torch.distributed is not initialised."""
    if _is_alone(group):
        return 0
    if isinstance(group, str):
        group = dist.distributed_c10d._resolve_process_group(group)
    return dist.get_rank(group)


def _all_reduce(x: Tensor, op: str, name: str) -> Tensor:
    # The functional form of torch.distributed: the compiler can trace it and overlap it.
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), op, name))


def _all_gather(x: Tensor, size: int, name: str) -> Tensor:
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_gather_into_tensor(x.contiguous(), size, name))


def _reduce_scatter(x: Tensor, size: int, name: str) -> Tensor:
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(
        functional.reduce_scatter_tensor(x.contiguous(), "sum", size, name)
    )


def all_reduce_sum(x: Tensor, group: Group = None) -> Tensor:
    """Sum of `x` over ranks, without gradient."""
    x = x.detach()
    return x if world_size(group) == 1 else _all_reduce(x, "sum", group_name(group))


def all_reduce_max(x: Tensor, group: Group = None) -> Tensor:
    """Elementwise maximum of `x` over ranks, without gradient."""
    x = x.detach()
    return x if world_size(group) == 1 else _all_reduce(x, "max", group_name(group))


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, name: str) -> Tensor:
        ctx.name = name
        return _all_reduce(x, "sum", name)

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(dout, "sum", ctx.name), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, size: int, name: str) -> Tensor:
        ctx.size, ctx.name = size, name
        return _all_gather(x, size, name)

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(dout, ctx.size, ctx.name), None, None


def all_reduce_with_grad(x: Tensor, group: Group = None) -> Tensor:
    """Sum of `x` over ranks; its gradient is the sum of the ranks' gradients."""
    if world_size(group) == 1:
        return x
    return _AllReduce.apply(x, group_name(group))


def all_gather_with_grad(x: Tensor, group: Group = None) -> Tensor:  # [N, ...] -> [W * N, ...]
    """The ranks' `x`, of one shape, in the order of ranks along the first dimension.

    The gradient of this rank's rows is the sum over ranks of theirs.
    """
    size = world_size(group)
    return x if size == 1 else _AllGather.apply(x, size, group_name(group))
