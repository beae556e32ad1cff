"""AdamW, fused, with its state there from the first step on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from fastssl.optim.param_groups import param_groups


def build_adamw(
    module: nn.Module,
    *,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-8,
    layer_decay: float = 1.0,
    fixed_lr: Sequence[str] = (),
) -> AdamW:
    """Fused AdamW on the groups of `param_groups`; lr and weight decay come with every step.

    Built after `fully_shard`, its state is sharded like the parameters.
    """
    groups = param_groups(module, layer_decay=layer_decay, fixed_lr=fixed_lr)
    optimizer = AdamW(groups, lr=0.0, betas=tuple(betas), eps=eps, weight_decay=0.0, fused=True)
    # AdamW makes its state at a parameter's first gradient. Made now, a checkpoint has the same
    # keys whenever it is written, and loading one can fill tensors that exist.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
    return optimizer


def set_hyperparameters(
    optimizer: Optimizer,
    *,
    lr: float,
    weight_decay: float,
    last_layer_lr: float = 1.0,
    fixed_lr: float | None = None,
) -> None:
    """Put the values of this step into every group: `last_layer_lr` is a factor, `fixed_lr`, if it
    is given, the rate in place of `lr` of the groups that have a fixed one."""
    for group in optimizer.param_groups:
        factor = group["lr_scale"] * (last_layer_lr if group["last_layer"] else 1.0)
        is_fixed = group["fixed_lr"] and fixed_lr is not None
        group["lr"] = (fixed_lr if is_fixed else lr) * factor
        group["weight_decay"] = weight_decay if group["decay"] else 0.0
