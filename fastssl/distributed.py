"""Several processes, or one, with the same code: start-up, small collectives, sharding.

Started by torchrun, a process joins a group (NCCL for CUDA tensors, gloo for CPU ones); started
alone, every function here does what a group of one would.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, on `device`."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def session(device: str = "auto") -> Iterator[World]:
    """Join the group that torchrun's variables describe, leave it at the end.

    A group that exists already is used and left alone. After an exception the group is not taken
    down: ranks that wait in a collective would be waited for; torchrun ends them.
    """
    chosen = choose_device(device)
    joins = "RANK" in os.environ and not dist.is_initialized()
    if joins:
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), chosen)
    else:
        yield World(0, 1, chosen)
    if joins:
        dist.destroy_process_group()


def choose_device(device: str) -> torch.device:
    """ "auto": CUDA where there is one, else the CPU; under torchrun each rank's own GPU."""
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device must be cpu or auto where torch sees no GPU, got 'cuda'")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def is_initialized() -> bool:
    """Whether this process is one of a group, be it of one."""
    return dist.is_initialized()


def subgroup(num_ranks: int) -> dist.ProcessGroup | None:
    """The group of `num_ranks` neighbours that this rank is in; None, which is all, for 0."""
    if num_ranks == 0 or not dist.is_initialized():
        return None
    if dist.get_world_size() % num_ranks:
        raise ValueError(
            f"train.batch_norm_ranks must divide the {dist.get_world_size()} ranks, got {num_ranks}"
        )
    return dist.new_subgroups(num_ranks)[0]


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        # On the CPU, where a barrier does not wait for the GPU's queue.
        dist.all_reduce(torch.zeros(()))


def any_rank(flag: bool) -> bool:
    """True on all ranks if it is on one."""
    if not dist.is_initialized():
        return flag
    value = torch.tensor(int(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


def mean(values: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean over ranks of each scalar, in one collective and one transfer from the device."""
    if not values:
        return {}
    stacked = torch.stack([v.detach().double() for v in values.values()])
    if dist.is_initialized():
        dist.all_reduce(stacked)
        stacked /= dist.get_world_size()
    return dict(zip(values, stacked.tolist(), strict=True))


def gather(value: Any) -> list:
    """The picklable `value` of every rank, in order of rank, on all ranks."""
    if not dist.is_initialized():
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(function: Callable[[], Any]) -> Any:
    """Rank 0 calls `function`; all ranks return its result, or raise its exception."""
    result, error = None, None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = function()
        except Exception as e:
            error = e
    if dist.is_initialized():
        outcome = [(result, error)]
        dist.broadcast_object_list(outcome)
        result, error = outcome[0]
    if error is not None:
        raise error
    return result


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: the members of lists called `*blocks`, and of the stages
    `layer1`, `layer2`, ... of a ResNet."""
    found = []
    for name, child in module.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        is_list = isinstance(child, nn.ModuleList) and leaf.endswith("blocks")
        is_stage = isinstance(child, nn.Sequential) and re.fullmatch(r"layer\d", leaf)
        if is_list or is_stage:
            found += list(child)
    return found


def shard(module: nn.Module, world: World, forward_methods: tuple[str, ...] = ()) -> None:
    """FSDP2: each block and the rest of `module` are sharded in place over all ranks.

    `forward_methods` are those methods, besides `forward`, that may be called from outside. The
    ranks must hold the same values before. Gradients become the mean over the ranks.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in blocks(module):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for name in forward_methods:
        register_fsdp_forward_method(module, name)


def sync_gradients(module: nn.Module, sync: bool) -> None:
    """Whether the next backward reduces the gradients: False for all but the last micro-batch."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(sync)
        module.set_is_last_backward(sync)


def reshard(module: nn.Module) -> None:
    """Drop the full parameters that a forward without a backward leaves behind."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()
