"""Several processes, or one, with the same code: start-up, small collectives, sharding.

Started by torchrun, a process joins a group (NCCL for CUDA tensors, gloo for CPU ones); started
alone, every function here does what a group of one would.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

DEVICES = ("auto", "cpu", "cuda")
# How long a rank waits for the others. That one died is seen at once over gloo; this is for one
# that hangs, and more than any takes to list a large folder or the first to build a large model.
TIMEOUT = timedelta(minutes=30)

logger = logging.getLogger(__name__)


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
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if joins:
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
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


def group_of_threads() -> dist.ProcessGroup | None:
    """Another group of all ranks, on the CPU, for a thread that must not disturb the training's."""
    return dist.new_group(backend="gloo", timeout=TIMEOUT) if dist.is_initialized() else None


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


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list:
    """The picklable `value` of every rank, in order of rank, on all ranks."""
    if not dist.is_initialized():
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


def on_main(function: Callable[[], Any], group: dist.ProcessGroup | None = None) -> Any:
    """Rank 0 calls `function`; all ranks return its result, or raise its exception."""
    result, error = None, None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = function()
        except Exception as e:
            error = e
    if dist.is_initialized():
        outcome = [(result, error)]
        dist.broadcast_object_list(outcome, group=group)
        result, error = outcome[0]
    if error is not None:
        raise error
    return result


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: the members of lists and sequences called `*blocks`, and of
    the stages `layer1`, `layer2`, ... of a ResNet."""
    found = []
    for name, child in module.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        is_list = isinstance(child, (nn.ModuleList, nn.Sequential)) and leaf.endswith("blocks")
        is_stage = isinstance(child, nn.Sequential) and re.fullmatch(r"layer\d", leaf)
        if is_list or is_stage:
            found += list(child)
    return found


def shard(
    module: nn.Module,
    world: World,
    forward_methods: tuple[str, ...] = (),
    *,
    shard_ranks: int = 0,
    param_dtype: torch.dtype | None = None,
) -> None:
    """FSDP2: each block and the rest of `module` are sharded in place.

    The ranks must hold the same values before. Gradients become the mean over all ranks.

    forward_methods: those, besides `forward`, that may be called from outside.
    shard_ranks: neighbours that share one copy; 0: all. With fewer than all (HSDP) parameters are
        gathered within these only, and gradients are summed over the copies as well.
    param_dtype: in which parameters are gathered and computed with. Shards stay in theirs, and
        gradients are reduced in float32. None: all in the parameters' own.
    """
    policy = MixedPrecisionPolicy()
    if param_dtype is not None:
        # Inputs are left to autocast, which knows what must not be rounded.
        policy = MixedPrecisionPolicy(param_dtype, torch.float32, cast_forward_inputs=False)
    mesh = _mesh(world, shard_ranks)
    ranks = mesh.shape[-1]
    for part in [*blocks(module), module]:
        fully_shard(
            part,
            mesh=mesh,
            mp_policy=policy,
            shard_placement_fn=lambda parameter: Shard(shard_dim(parameter.shape, ranks)),
        )
    for name in forward_methods:
        register_fsdp_forward_method(module, name)


def shard_dim(shape: Sequence[int], ranks: int) -> int:
    """The dimension that a parameter is cut along: the first, which is padded to a multiple of
    `ranks`, unless it is shorter than that and another one can be cut evenly. A position embedding
    [1, N, D] would be sent by every rank otherwise, and all but one of them send padding."""
    if shape and shape[0] < ranks:
        return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)
    return 0


def _mesh(world: World, shard_ranks: int) -> DeviceMesh:
    """All ranks in a row, or [copies, ranks of a copy]."""
    if shard_ranks in (0, world.size):
        return init_device_mesh(world.device.type, (world.size,))
    if world.size % shard_ranks:
        raise ValueError(f"train.shard_ranks must divide the {world.size} ranks, got {shard_ranks}")
    shape = (world.size // shard_ranks, shard_ranks)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("copies", "shards"))


def build_once(build: Callable[[], nn.Module], world: World) -> tuple[nn.Module, dict[str, Tensor]]:
    """What `build` makes, without memory ("meta"), and on rank 0 its tensors by name.

    Only rank 0 makes it on the CPU, the others on the meta device; `fill` gives them the values.
    Errors of rank 0 are raised on all ranks.
    """
    built: list[nn.Module] = []
    on_main(lambda: built.append(build()))
    if world.is_main:
        module = built[0]
        tensors = {name: tensor.detach() for name, tensor in _tensors(module)}
        return module.to_empty(device="meta"), tensors
    try:
        with torch.device("meta"):
            module = build()
    except (RuntimeError, NotImplementedError) as error:
        # A module that looks at values while it is built.
        logger.warning("rank %d builds the model on the CPU: %s", world.rank, error)
        module = build()
    return module.to_empty(device="meta"), {}


@torch.no_grad()
def fill(module: nn.Module, world: World, tensors: Mapping[str, Tensor]) -> None:
    """Give a sharded module without memory its values, those that rank 0 has in `tensors`.

    One tensor after the other goes to all ranks, each of which keeps its shard.
    """
    module.to_empty(device=world.device)
    for name, tensor in _tensors(module):
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=world.device)
        if world.is_main:
            whole.copy_(tensors[name])
        dist.broadcast(whole, 0)
        if isinstance(tensor, DTensor):
            # Without a source every rank cuts its own shard.
            whole = distribute_tensor(
                whole, tensor.device_mesh, tensor.placements, src_data_rank=None
            )
        tensor.copy_(whole)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, those that are not saved too; each once."""
    return chain(module.named_parameters(), module.named_buffers())


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
