"""Probes trained by SGD with several learning rates at once (DINOv2, arXiv:2304.07193).

L learning rates, N training and M test samples, B samples of a step, C classes. Every parameter
has a leading dimension L: one batched head per learning rate sees the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastssl.data.loader import epoch_permutation
from fastssl.evaluation.shares import Shares, percent
from fastssl.evaluation.standardize import Standardize
from fastssl.kernels.common import collectives
from fastssl.kernels.common.checks import check_int
from fastssl.kernels.common.collectives import Group
from fastssl.losses.common import check_positive
from fastssl.optim import Schedule

# (parameters, samples [B, ..., D]) -> logits [L, B, C]
Heads = Callable[[Sequence[Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class SGDOptions:
    """How probes are trained; no weight decay, the learning rate falls to 0 as a cosine.

    batch_size: samples of a step, over all ranks; the last batch of an epoch may be smaller.
    held_out: share of the training set that chooses the learning rate and is not learned from.
    standardize: features to mean 0 and deviation 1 per dimension, as over the training set.
    """

    lrs: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    epochs: int = 10
    batch_size: int = 256
    momentum: float = 0.9
    held_out: float = 0.1
    standardize: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lrs or len(set(self.lrs)) < len(self.lrs):
            raise ValueError(f"lrs must be different learning rates, got {self.lrs}")
        for lr in self.lrs:
            check_positive(lrs=lr)
        check_int("epochs", self.epochs, 1)
        check_int("batch_size", self.batch_size, 1)
        check_int("seed", self.seed, 0)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be in (0, 1), got {self.held_out}")


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies in percent; the learning rate is chosen on the held-out part, never on test."""

    accuracy: float  # on the test set, of best_lr
    best_lr: float
    test: dict[float, float]  # by learning rate
    held_out: dict[float, float]  # by learning rate


@dataclass(frozen=True)
class _Samples:
    """This rank's share of a set, standardised where it is read."""

    features: Tensor
    labels: Tensor
    standardize: Standardize

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.standardize(self.features[rows]), self.labels[rows]


def train_probes(
    heads: Heads,
    parameters: list[Tensor],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    options: SGDOptions,
    group: Group,
) -> ProbeResult:
    """Train `parameters` in place on this rank's share of `train` and the others'.

    Steps, batches and result are those of one process that holds all: a sample is known by its
    place among the samples of all ranks, and gradients are summed over the ranks.
    """
    shares = Shares.of(train[0], group)
    num_held_out = math.ceil(options.held_out * shares.total)
    if num_held_out >= shares.total:
        raise ValueError(
            "train_features must have a row to learn from beside the held-out ones over all "
            f"ranks, got {shares.total}"
        )
    standardize = Standardize.identity(train[0])
    if options.standardize:
        standardize = Standardize.fit(train[0], group)
    samples, test_samples = _Samples(*train, standardize), _Samples(*test, standardize)
    # Epoch 0 of the order splits the set, the epochs from 1 on are learned.
    order = epoch_permutation(shares.total, seed=options.seed, epoch=0).to(train[0].device)
    kept, learned = order[:num_held_out], order[num_held_out:]
    _descend(heads, parameters, samples, learned, shares, options, group)

    def accuracies(samples: _Samples, rows: Tensor, total: int) -> dict[float, float]:
        correct = _num_correct(heads, parameters, samples, rows, options.batch_size)
        return dict(zip(options.lrs, percent(correct, total, group), strict=True))

    held_out = accuracies(samples, shares.own(kept), num_held_out)
    every_row = torch.arange(len(test[0]), device=order.device)
    on_test = accuracies(test_samples, every_row, Shares.of(test[0], group).total)
    # Of equally good ones the smallest.
    best = max(sorted(options.lrs), key=held_out.__getitem__)
    return ProbeResult(on_test[best], best, on_test, held_out)


def _descend(
    heads: Heads,
    parameters: list[Tensor],
    samples: _Samples,
    learned: Tensor,  # places among all ranks' samples
    shares: Shares,
    options: SGDOptions,
    group: Group,
) -> None:
    """All epochs of SGD with momentum."""
    lrs = torch.tensor(options.lrs, device=learned.device)
    schedule = Schedule(base=1.0, final=0.0)
    num_steps = options.epochs * -(-len(learned) // options.batch_size)
    velocities = [torch.zeros_like(parameter) for parameter in parameters]
    step = 0
    for epoch in range(1, options.epochs + 1):
        order = epoch_permutation(len(learned), seed=options.seed, epoch=epoch)
        for batch in learned[order.to(learned.device)].split(options.batch_size):
            x, labels = samples[shares.own(batch)]
            gradients = _gradients(heads, parameters, x, labels, group)
            lr = lrs * schedule(step, num_steps)
            for parameter, velocity, gradient in zip(
                parameters, velocities, gradients, strict=True
            ):
                velocity.mul_(options.momentum).add_(gradient, alpha=1 / len(batch))
                parameter.sub_(lr.view(-1, *(1,) * (parameter.dim() - 1)) * velocity)
            step += 1


def _gradients(
    heads: Heads, parameters: list[Tensor], x: Tensor, labels: Tensor, group: Group
) -> list[Tensor]:
    """Of the cross-entropy summed over the samples of all ranks; each rate's is its own."""
    leaves = [parameter.detach().requires_grad_() for parameter in parameters]
    with torch.enable_grad():
        logits = heads(leaves, x)
        repeated = labels.expand(len(logits), -1).flatten()
        loss = cross_entropy(logits.flatten(0, 1), repeated, reduction="sum")
        gradients = torch.autograd.grad(loss, leaves)
    flat = collectives.all_reduce_sum(torch.cat([g.flatten() for g in gradients]), group)
    parts = flat.split([parameter.numel() for parameter in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


@torch.no_grad()
def _num_correct(
    heads: Heads, parameters: list[Tensor], samples: _Samples, rows: Tensor, chunk: int
) -> Tensor:  # [L]
    correct = rows.new_zeros(len(parameters[0]))
    for part in rows.split(chunk):
        x, labels = samples[part]
        logits = heads(parameters, x)
        # A head that diverged is never right.
        right = (logits.argmax(dim=2) == labels) & logits.isfinite().all(dim=2)
        correct += right.sum(dim=1)
    return correct
