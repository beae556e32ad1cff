"""Batch normalisation over the batches of all processes of a group (Ioffe & Szegedy 2015, arXiv
1502.03167).

W processes, C channels, N values per channel in all processes together.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.kernels.common import collectives
from fastssl.kernels.common.collectives import Group


def _reduced_dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _per_channel(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(1, -1, *[1] * (like.dim() - 2))


def _local_statistics(x: Tensor) -> Tensor:
    """Mean, sum of squared deviations from it, and count: [2 C + 1]; zeros for an empty batch."""
    count = x.numel() // x.shape[1]
    if count == 0:
        return x.new_zeros(2 * x.shape[1] + 1)
    var, mean = torch.var_mean(x, dim=_reduced_dims(x), correction=0)
    return torch.cat([mean, var * count, mean.new_full((1,), count)])


def _combine(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[W, 2 C + 1] of all ranks -> mean [C], squared deviations [C] and count [] of the union."""
    counts = statistics[:, -1:]
    means, deviations = statistics[:, :-1].chunk(2, dim=1)
    count = counts.sum()
    mean = (means * counts).sum(dim=0) / count.clamp(min=1)
    between = ((means - mean).square() * counts).sum(dim=0)
    return mean, deviations.sum(dim=0) + between, count


class _Normalize(torch.autograd.Function):
    """(x - mean) * inv_std * weight + bias, where mean and inv_std are those of all ranks' x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
        group: str,
    ) -> Tensor:
        ctx.group = group
        inv_std = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, mean, inv_std, count)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inv_std, count = ctx.saved_tensors
        wide = dy.to(mean.dtype)
        normalized = (x.to(mean.dtype) - _per_channel(mean, x)) * _per_channel(inv_std, x)
        dims = _reduced_dims(x)
        local = torch.cat([wide.sum(dim=dims), (wide * normalized).sum(dim=dims)])
        dbias, dweight = local.chunk(2)
        # Every rank's outputs depend on every rank's inputs through mean and variance.
        whole = collectives.all_reduce_sum(local, ctx.group) / count.clamp(min=1)
        mean_dy, mean_dy_normalized = (_per_channel(part, x) for part in whole.chunk(2))
        dx = wide - mean_dy - normalized * mean_dy_normalized
        dx = (dx * _per_channel(weight * inv_std, x)).to(x.dtype)
        return dx, dweight, dbias, None, None, None, None, None


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation of [B, C, ...] over the batches of all processes of a group.

    Arguments, keys and behaviour of torch.nn.BatchNorm{1,2,3}d, whose state dicts it reads, and of
    torch.nn.SyncBatchNorm, except that it runs on any device and backend and under torch.compile
    without a graph break. `process_group` None is the default group at the time of the call; a
    process alone normalises its own batch. A layer can be copied and pickled: it keeps the group by
    name.

    Batches may be of different size on each rank, empty ones included: every value counts the same.
    The gradients that DDP or FSDP2 average over ranks are those of one process on the whole batch.
    Statistics are float32 (float64 for float64 input) and travel once, 2 C + 1 numbers per rank
    forward and 2 C backward. Saved for backward: x.

    Raises ValueError for an input without a channel dimension or of other than num_features
    channels and, in a process alone in training, for one value per channel.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Group = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.process_group = (
            None if process_group is None else collectives.group_name(process_group)
        )

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(
                f"input must have shape [B, {self.num_features}, ...], got {list(x.shape)}"
            )

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training or collectives.world_size(self.process_group) == 1:
            return self._forward_alone(input)
        wide = torch.promote_types(input.dtype, torch.float32)
        with torch.no_grad():
            local = _local_statistics(input.detach().to(wide))
            everyone = collectives.all_gather_with_grad(local[None], self.process_group)
            mean, deviations, count = _combine(everyone)
            self._track(mean, deviations / (count - 1).clamp(min=1))
            var = deviations / count.clamp(min=1)
        weight, bias = mean.new_ones(mean.shape), mean.new_zeros(mean.shape)
        if self.affine:
            weight, bias = self._affine(input)
        group = collectives.group_name(self.process_group)
        return _Normalize.apply(input, weight, bias, mean, var, count, self.eps, group)

    def _affine(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias in the dtype of the statistics; FSDP2 may have gathered bfloat16."""
        if not self.affine:
            return None, None
        wide = torch.promote_types(x.dtype, torch.float32)
        return self.weight.to(wide), self.bias.to(wide)

    def _forward_alone(self, x: Tensor) -> Tensor:
        uses_batch = self.training or self.running_mean is None
        tracks = self.training and self.track_running_stats
        if tracks and self.momentum is None and self.running_mean is not None:
            # torch's kernel takes the momentum as a number, which a count on the device is not.
            self._check_more_than_one(x)
            with torch.no_grad():
                wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
                mean, deviations, count = _combine(_local_statistics(wide)[None])
                self._track(mean, deviations / (count - 1).clamp(min=1))
            return F.batch_norm(x, None, None, *self._affine(x), True, 0.0, self.eps)
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        running = (self.running_mean, self.running_var)
        if self.training and not self.track_running_stats:
            running = (None, None)
        momentum = 0.0 if self.momentum is None else self.momentum
        return F.batch_norm(x, *running, *self._affine(x), uses_batch, momentum, self.eps)

    def _check_more_than_one(self, x: Tensor) -> None:
        if x.numel() // x.shape[1] == 1:
            raise ValueError(
                "input must have more than 1 value per channel in training, got shape "
                f"{list(x.shape)}"
            )

    def _track(self, mean: Tensor, unbiased_var: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None:
            return
        self.num_batches_tracked.add_(1)
        if self.momentum is None:
            factor = self.num_batches_tracked.to(mean.dtype).reciprocal()
        else:
            factor = mean.new_full((), self.momentum)
        for running, value in ((self.running_mean, mean), (self.running_var, unbiased_var)):
            factor_here = factor.to(running.dtype)
            running.copy_(torch.lerp(running, value.to(running.dtype), factor_here))

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Group = None) -> nn.Module:
        """`module` with every batch normalisation in it replaced by this class, parameters and
        buffers taken over; torch.nn.SyncBatchNorm layers are replaced, too."""
        if isinstance(module, _BatchNorm) and not isinstance(module, cls):
            converted = cls(
                module.num_features,
                module.eps,
                module.momentum,
                module.affine,
                module.track_running_stats,
                process_group,
            )
            if module.affine:
                converted.weight, converted.bias = module.weight, module.bias
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                setattr(converted, name, getattr(module, name))
            converted.train(module.training)
            return converted
        for name, child in module.named_children():
            replacement = cls.convert_sync_batchnorm(child, process_group)
            if replacement is not child:
                module.add_module(name, replacement)
        return module
