"""LARS: momentum SGD with a learning rate per layer (You et al., 2017, arXiv:1708.03888)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.optim.layerwise import (
    LayerwiseOptimizer,
    check_number,
    local,
    trust_ratios,
    whole_norms,
)
from fastssl.optim.param_groups import param_groups


class LARS(LayerwiseOptimizer):
    """For every parameter w with gradient g::

        u <- g + weight_decay * w
        m <- momentum * m + trust_coefficient * |w| / |u| * u      (the factor is 1 if a norm is 0)
        w <- w - lr * m

    as MoCo v3 (arXiv 2104.02057) and Barlow Twins (arXiv 2103.03230) train: the rate multiplies
    the momentum as in torch's SGD, and not what enters it as in the paper, which differs where the
    rate changes.

    exclude_1d, of every group: parameters of fewer than two dimensions (biases, norms) take
    m <- momentum * m + g, without adaptation and without weight decay.

    Norms never leave the device. Under FSDP2 they are those of the whole parameter, by one
    all-reduce of 16 bytes per parameter for every 4 million elements of a shard. Extra memory at
    the peak: as many elements, or one parameter if it has more.

    Raises TypeError or ValueError for arguments out of range, naming them, also those of a group.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        exclude_1d: bool = True,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        defaults |= {"trust_coefficient": trust_coefficient, "exclude_1d": exclude_1d}
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_number("momentum", group["momentum"], below=1)
        check_number("trust_coefficient", group["trust_coefficient"])

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return {"momentum_buffer": zeros}

    def _step_some(self, group: dict[str, Any], parameters: list[Tensor], adapts: bool) -> None:
        weights = [local(p) for p in parameters]
        updates = [local(p.grad) for p in parameters]
        buffers = [local(self._state_of(p)["momentum_buffer"]) for p in parameters]
        torch._foreach_mul_(buffers, group["momentum"])
        if adapts:
            if group["weight_decay"] != 0:
                updates = torch._foreach_add(updates, weights, alpha=group["weight_decay"])
            norms = whole_norms([*weights, *updates], [*parameters, *parameters])
            ratios = trust_ratios(*norms.chunk(2), group["trust_coefficient"])
            torch._foreach_addcmul_(buffers, updates, ratios)
        else:
            torch._foreach_add_(buffers, updates)
        torch._foreach_add_(weights, buffers, alpha=-group["lr"])


def build_lars(
    module: nn.Module,
    *,
    momentum: float = 0.9,
    trust_coefficient: float = 0.001,
    layer_decay: float = 1.0,
    fixed_lr: Sequence[str] = (),
) -> LARS:
    """LARS on the groups of `param_groups`; lr and weight decay come with every step.

    Built after `fully_shard`, its state is sharded like the parameters.
    """
    groups = param_groups(module, layer_decay=layer_decay, fixed_lr=fixed_lr)
    optimizer = LARS(groups, 0.0, momentum=momentum, trust_coefficient=trust_coefficient)
    optimizer.make_state()
    return optimizer
