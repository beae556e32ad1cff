"""LAMB: Adam with a learning rate per layer (You et al., 2019, arXiv:1904.00962)."""

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


class LAMB(LayerwiseOptimizer):
    """For every parameter w with gradient g, in its t-th step::

        m <- b1 * m + (1 - b1) * g
        v <- b2 * v + (1 - b2) * g^2
        u <- (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * w
        w <- w - lr * |w| / |u| * u                                (the factor is 1 if a norm is 0)

    the paper's Algorithm 2 with the identity for phi. Clipping of the whole gradient, which some
    implementations build in, is the caller's.

    exclude_1d, of every group: parameters of fewer than two dimensions (biases, norms) take Adam's
    step, without adaptation and without weight decay.

    Norms never leave the device; `step` is counted on the CPU, as by torch's Adam.
    Under FSDP2 the norms are those of the whole parameter, by one all-reduce of 16 bytes per
    parameter for every 4 million elements of a shard. Extra memory at the peak: twice as many
    elements, or two of one parameter if it has more.

    Raises TypeError or ValueError for arguments out of range, naming them, also those of a group.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        *,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        exclude_1d: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps}
        defaults |= {"weight_decay": weight_decay, "exclude_1d": exclude_1d}
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_number("eps", group["eps"])
        betas = group["betas"]
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas!r}")
        for i, beta in enumerate(betas):
            check_number(f"betas[{i}]", beta, below=1)

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }

    def _step_some(self, group: dict[str, Any], parameters: list[Tensor], adapts: bool) -> None:
        weights = [local(p) for p in parameters]
        updates = self._adam_updates(group, parameters)
        if not adapts:
            torch._foreach_add_(weights, updates, alpha=-group["lr"])
            return
        if group["weight_decay"] != 0:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        norms = whole_norms([*weights, *updates], [*parameters, *parameters])
        ratios = trust_ratios(*norms.chunk(2))
        torch._foreach_addcmul_(weights, updates, ratios, value=-group["lr"])

    def _adam_updates(self, group: dict[str, Any], parameters: list[Tensor]) -> list[Tensor]:
        """Advance the moments and return Adam's update of each parameter, a new tensor."""
        beta1, beta2 = group["betas"]
        states = [self._state_of(p) for p in parameters]
        grads = [local(p.grad) for p in parameters]
        means = [local(state["exp_avg"]) for state in states]
        squares = [local(state["exp_avg_sq"]) for state in states]
        torch._foreach_add_([state["step"] for state in states], 1)
        counts = [state["step"].item() for state in states]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
        scales = torch._foreach_sqrt(squares)
        torch._foreach_div_(scales, [(1 - beta2**count) ** 0.5 for count in counts])
        torch._foreach_add_(scales, group["eps"])
        updates = torch._foreach_div(means, scales)
        torch._foreach_div_(updates, [1 - beta1**count for count in counts])
        return list(updates)


def build_lamb(
    module: nn.Module,
    *,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-6,
    layer_decay: float = 1.0,
    fixed_lr: Sequence[str] = (),
) -> LAMB:
    """LAMB on the groups of `param_groups`; lr and weight decay come with every step.

    Built after `fully_shard`, its state is sharded like the parameters.
    """
    groups = param_groups(module, layer_decay=layer_decay, fixed_lr=fixed_lr)
    optimizer = LAMB(groups, 0.0, betas=tuple(betas), eps=eps)
    optimizer.make_state()
    return optimizer
