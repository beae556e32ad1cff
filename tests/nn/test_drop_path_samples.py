"""Stochastic depth that spares the work of the samples it drops."""

import pytest
import torch
from torch import nn

from fastssl.nn import Block, DropPath
from fastssl.nn.mask_units import HieraBlock


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.batches = []

    def forward(self, x):
        self.batches.append(len(x))
        return 2 * x


def test_only_kept_samples_are_computed_and_the_expectation_stays():
    drop_path, branch = DropPath(0.3), Counting()
    x = torch.randn(10, 4, 3, requires_grad=True)
    out = drop_path.add_branch(x, x, branch)
    assert branch.batches == [7]
    factor = ((out - x) / x).detach()
    kept = factor[:, 0, 0] != 0
    assert kept.sum() == 7
    torch.testing.assert_close(factor[kept], torch.full_like(factor[kept], 2 * 10 / 7))
    assert (factor[~kept] == 0).all()
    out.sum().backward()
    torch.testing.assert_close(x.grad, 1 + factor)


@pytest.mark.parametrize(("rate", "batch", "kept"), [(0.1, 10, 10), (0.5, 10, 5), (0.9, 2, 1)])
def test_number_of_samples_that_are_computed(rate, batch, kept):
    drop_path = DropPath(rate)
    assert drop_path.num_kept(batch) == kept
    assert drop_path.eval().num_kept(batch) == batch


def test_every_sample_is_dropped_as_often():
    drop_path, x = DropPath(0.5), torch.zeros(4, 1)
    counts = sum(drop_path.add_branch(x, x + 1, lambda y: y) > 0 for _ in range(2000))
    assert (counts / 2000 - 0.5).abs().max() < 0.06  # more than 5 standard deviations


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.4])
def test_a_rate_changes_no_block_in_evaluation(rate):
    torch.manual_seed(0)
    x = torch.randn(4, 16, 8)
    blocks = [Block(8, 2), HieraBlock(8, 16, 2, q_stride=4, window_size=4)]
    for block in blocks:
        expected = block.eval()(x)
        for module in block.modules():
            if isinstance(module, DropPath):
                module.drop_prob = rate
        assert torch.equal(block(x), expected)


def test_blocks_compute_the_kept_samples_as_they_would_alone():
    """With one of two samples dropped in both branches, what is left is a block of twice the
    branches."""
    torch.manual_seed(0)
    block = HieraBlock(8, 8, 2, drop_path=0.5)
    x = torch.randn(2, 6, 8)
    alone = x + 2 * block.attn(block.norm1(x))
    both = alone + 2 * block.mlp(block.norm2(alone))
    only_mlp = x + 2 * block.mlp(block.norm2(x))
    choices = torch.stack([x, alone, only_mlp, both])
    seen = set()
    for _ in range(40):
        out = block(x)
        for sample in range(2):
            distances = (choices[:, sample] - out[sample]).abs().amax((1, 2))
            assert distances.min() < 1e-5
            seen.add((sample, int(distances.argmin())))
    assert len(seen) == 8
