"""A vector for every sample of a dataset (Wu et al., 2018, arXiv:1805.01978)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastssl.kernels.common import collectives
from fastssl.kernels.common.checks import check_int
from fastssl.kernels.common.collectives import Group
from fastssl.losses.common import check_fraction, resolved


class MemoryBank(nn.Module):
    """`bank` [num_samples, D]: a running mean of what was collected of each sample, of length 1.

    `collect(index, features)` in a forward; `step()`, once per optimizer step, moves the rows of
    the samples that all ranks collected::

        bank[i] = normalize(momentum * bank[i] + (1 - momentum) * normalize(features))

    so that the bank, which is in the state dict, is the same on all ranks. It starts at random
    unit vectors, whatever the global generator. With several views of a sample collected, their
    mean counts.
    """

    bank: Tensor

    def __init__(
        self, num_samples: int, dim: int, momentum: float = 0.5, group: Group = None
    ) -> None:
        super().__init__()
        check_int("num_samples", num_samples, 1)
        check_int("dim", dim, 1)
        check_fraction(momentum=momentum)
        self.momentum = momentum
        self.group = resolved(group)
        generator = torch.Generator().manual_seed(0)
        bank = torch.randn(num_samples, dim, generator=generator, device="cpu")
        self.register_buffer("bank", normalize(bank, dim=1))
        self._collected: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def collect(self, index: Tensor, features: Tensor) -> None:
        """Remember features [n, D] of the samples `index` [n] for `step`."""
        self._collected.append((index, normalize(features.detach().to(self.bank.dtype), dim=1)))

    @torch.no_grad()
    def step(self) -> None:
        """Write what all ranks collected, and forget it. Every rank must call it."""
        if not self._collected:
            return
        index, features = (torch.cat(parts) for parts in zip(*self._collected, strict=True))
        self._collected = []
        index = collectives.all_gather_with_grad(index, self.group)
        features = collectives.all_gather_with_grad(features, self.group)
        rows, place = index.unique(return_inverse=True)
        mean = features.new_zeros(len(rows), features.shape[1]).index_add_(0, place, features)
        mean = normalize(mean, dim=1)
        moved = torch.lerp(mean, self.bank[rows], self.momentum)
        self.bank[rows] = normalize(moved, dim=1)

    def discard(self) -> None:
        """Forget what was collected, as after a step that was not made."""
        self._collected = []
