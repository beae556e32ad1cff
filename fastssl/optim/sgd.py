"""SGD with momentum, with its state there from the first step on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import SGD

from fastssl.optim.param_groups import param_groups


def build_sgd(
    module: nn.Module,
    *,
    momentum: float = 0.9,
    layer_decay: float = 1.0,
    fixed_lr: Sequence[str] = (),
) -> SGD:
    """SGD on the groups of `param_groups`; lr and weight decay come with every step.

    Built after `fully_shard`, its state is sharded like the parameters.
    """
    groups = param_groups(module, layer_decay=layer_decay, fixed_lr=fixed_lr)
    # The fused kernel has no rule for sharded tensors.
    optimizer = SGD(groups, lr=0.0, momentum=momentum, weight_decay=0.0, foreach=True)
    # SGD makes its state at a parameter's first gradient, of which momentum times 0 and the
    # gradient is the same. Made now, a checkpoint has the same keys whenever it is written.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "momentum_buffer": torch.zeros_like(parameter, memory_format=torch.preserve_format)
            }
    return optimizer
