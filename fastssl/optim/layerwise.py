"""What LARS and LAMB share: a rate per parameter tensor, from whole norms, without a host sync."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

# Elements per rank that a step works on at a time, unless one parameter has more. The temporary
# tensors stay small enough for the allocator to use them again, where those of a whole model would
# come from the system anew at each step: page by page, which on a CPU costs more than the step.
_AT_A_TIME = 1 << 22


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; another tensor is itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _layout(parameter: Tensor) -> tuple | None:
    """(mesh, placements) of a DTensor."""
    if not isinstance(parameter, DTensor):
        return None
    if any(placement.is_partial() for placement in parameter.placements):
        raise ValueError(
            f"parameters must be sharded or replicated, got placements {parameter.placements}"
        )
    return parameter.device_mesh, tuple(parameter.placements)


def _portions(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of about _AT_A_TIME elements together; by whole sizes, so that ranks agree."""
    portion: list[Tensor] = []
    held = 0.0
    for parameter in parameters:
        shards = parameter.device_mesh.size() if isinstance(parameter, DTensor) else 1
        size = parameter.numel() / shards
        if portion and held + size > _AT_A_TIME:
            yield portion
            portion, held = [], 0.0
        portion.append(parameter)
        held += size
    if portion:
        yield portion


def whole_norms(tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:  # [n] float64
    """The L2 norm of each tensor, of which `tensors` are this rank's shards, laid out like
    `parameters`. Shards' squares are summed in one all-reduce per mesh, not one per tensor."""
    kinds = defaultdict(list)
    for i, parameter in enumerate(parameters):
        kinds[_layout(parameter), torch.promote_types(tensors[i].dtype, torch.float32)].append(i)
    norms: list[Tensor] = [torch.empty(0)] * len(tensors)
    for (layout, dtype), members in kinds.items():
        parts = torch._foreach_norm([tensors[i] for i in members], 2, dtype=dtype)
        # float64: a sum over shards loses nothing, for any number of them.
        squares = torch.stack(parts).double().square()
        if layout is not None:
            mesh, placements = layout
            for dim, placement in enumerate(placements):
                if not placement.is_replicate():
                    dist.all_reduce(squares, group=mesh.get_group(dim))
        for i, norm in zip(members, squares.sqrt().unbind(), strict=True):
            norms[i] = norm
    return torch.stack(norms)


def trust_ratios(
    weight_norms: Tensor, update_norms: Tensor, coefficient: float = 1.0
) -> list[Tensor]:
    """coefficient * |w| / |u| of each parameter; 1 where one of the norms is zero."""
    known = (weight_norms > 0) & (update_norms > 0)
    ratios = torch.where(known, coefficient * weight_norms / update_norms, 1.0)
    return list(ratios.unbind())


class LayerwiseOptimizer(Optimizer):
    """An optimizer whose groups carry `lr`, `weight_decay` and `exclude_1d`.

    Parameters may be DTensors (FSDP2, HSDP): norms are those of the whole parameter, everything
    else works on this rank's shards.
    """

    def __init__(self, params: Iterable, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError or TypeError for a value that no group may have."""
        check_number("lr", group["lr"])
        check_number("weight_decay", group["weight_decay"])
        if not isinstance(group["exclude_1d"], bool):
            raise TypeError(f"exclude_1d must be a bool, got {type(group['exclude_1d']).__name__}")
        for parameter in group["params"]:
            _layout(parameter)

    def make_state(self) -> None:
        """Make every parameter's state now instead of at its first gradient: then a checkpoint has
        the same keys whenever it is written, and loading one can fill tensors that exist."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._state_of(parameter)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        if not self.state[parameter]:
            self.state[parameter] = self._new_state(parameter)
        return self.state[parameter]

    @abstractmethod
    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]: ...

    @abstractmethod
    def _step_some(self, group: dict[str, Any], parameters: list[Tensor], adapts: bool) -> None:
        """A step of these parameters of the group; without `adapts`, at the rate lr and without
        weight decay."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step; `closure` evaluates the model anew and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in parameters):
                raise ValueError(f"gradients must be dense for {type(self).__name__}, got sparse")
            for adapts in (True, False):
                chosen = [
                    p for p in parameters if (p.ndim > 1 or not group["exclude_1d"]) == adapts
                ]
                for portion in _portions(chosen):
                    self._step_some(group, portion, adapts)
        return loss


def check_number(name: str, value: object, *, below: float = math.inf) -> None:
    """Refuse what is not a number in [0, below)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not 0 <= value < below:
        limit = "at least 0 and finite" if below == math.inf else f"in [0, {below:g})"
        raise ValueError(f"{name} must be {limit}, got {value}")
