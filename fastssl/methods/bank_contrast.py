"""Contrast with a vector of every sample of the dataset.

B samples, D embedding, M negatives, W processes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastssl import functional as F
from fastssl.kernels.common import collectives
from fastssl.kernels.common.checks import check_int
from fastssl.losses.common import Stats, check_positive, cross_entropy_stats
from fastssl.methods.memory_bank import MemoryBank


class BankContrast(MemoryBank):
    """A memory bank in which each query finds its sample's row::

        loss = -log(exp(q . bank[i] / t) / sum over candidates j of exp(q . bank[j] / t))

    The candidates of sample i are i itself and num_negatives other samples, drawn uniformly with
    replacement, which takes B M D numbers of memory; for None they are the whole bank, which takes
    a copy of it. The indices of a batch of all processes must differ.
    """

    def __init__(
        self,
        num_samples: int,
        dim: int,
        *,
        momentum: float,
        temperature: float,
        num_negatives: int | None,
    ) -> None:
        # With one sample there is nothing to tell apart.
        check_int("num_samples", num_samples, 2)
        check_positive(temperature=temperature)
        if num_negatives is not None:
            check_int("num_negatives", num_negatives, 1)
        super().__init__(num_samples, dim, momentum)
        self.temperature, self.num_negatives = temperature, num_negatives

    @property
    def num_uniforms(self) -> int:
        """Numbers of [0, 1) that a sample's negatives use up."""
        return 2 * (self.num_negatives or 0)

    def forward(self, index: Tensor, uniforms: Tensor, *queries: Tensor) -> list[Tensor]:
        """The loss of each of `queries`, all [B, D] of the samples `index` [B], against the same
        negatives, which `uniforms` [B, num_uniforms] choose."""
        whole = self.num_negatives is None
        negatives = self._rest(index) if whole else self.bank[self.drawn(index, uniforms)]
        return [
            F.info_nce(
                normalize(one.to(self.bank.dtype), dim=1),
                self.bank[index],
                temperature=self.temperature,
                negatives=negatives,
                # A row must count the same as a key and as a negative, to the last bit.
                normalize=False,
                # The rows of the batch with those of all other samples are the bank.
                in_batch_negatives=whole,
                group=self.group,
            )
            for one in queries
        ]

    def stats(self, loss: Tensor) -> Stats:
        """What is logged of a loss."""
        negatives = self.num_negatives
        return cross_entropy_stats(loss, 1 + negatives if negatives else len(self.bank))

    def drawn(self, index: Tensor, uniforms: Tensor) -> Tensor:
        """[B, M] int64: samples other than `index` [B]."""
        others = self.bank.shape[0] - 1
        # A number has 24 bits, which do not reach all of more than 2^24 samples: two make 48.
        high, low = uniforms.double().chunk(2, dim=1)
        steps = ((high + low * 2.0**-24) * others).long()
        return (index[:, None] + 1 + steps) % (others + 1)

    def _rest(self, index: Tensor) -> Tensor:
        """The rows of the samples that are in no process's batch."""
        keep = torch.ones(self.bank.shape[0], dtype=torch.bool, device=self.bank.device)
        keep[collectives.all_gather_with_grad(index, self.group)] = False
        return self.bank[keep]
