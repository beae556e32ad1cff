"""rankme, alignment, uniformity and teacher_entropy against what they are in float64."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from fastssl.evaluation import (
    alignment,
    feature_std,
    measures,
    rankme,
    teacher_entropy,
    uniformity,
)


def effective_rank(features):
    values = torch.linalg.svdvals(features.double())
    share = values / values.sum()
    return torch.exp(-(share * share.clamp_min(1e-300).log()).sum()).item()


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (7, 20), (20, 20), (101, 13)])
@pytest.mark.parametrize("chunk", [1, 8, 4096])
def test_rankme_in_chunks(monkeypatch, shape, chunk):
    monkeypatch.setattr(measures, "_CHUNK", chunk)
    features = torch.randn(shape) @ torch.diag(torch.logspace(0, -6, shape[1])) + 0.1
    assert rankme(features) == pytest.approx(effective_rank(features), rel=1e-9)


def test_rankme_sees_singular_values_that_a_gram_matrix_loses():
    left, right = torch.linalg.qr(torch.randn(2, 64, 64, dtype=torch.float64)).Q
    values = torch.full((64,), 1e-10, dtype=torch.float64)
    values[0] = 1.0
    features = left * values @ right
    share = values / values.sum()
    entropy = -(share * share.log()).sum().item()
    assert math.log(rankme(features)) == pytest.approx(entropy, rel=1e-4)
    gram = torch.linalg.eigvalsh(features.T @ features).clamp_min(0).sqrt()
    wrong = gram / gram.sum()
    assert abs(torch.special.entr(wrong).sum().item() - entropy) > 1e-2 * entropy


def test_rankme_as_a_share():
    orthogonal = torch.linalg.qr(torch.randn(50, 8)).Q
    assert rankme(orthogonal, normalized=True) == pytest.approx(1)
    assert rankme(torch.ones(50, 8), normalized=True) == pytest.approx(1 / 8, abs=1e-4)
    # Six samples in eight dimensions, of which centring takes one.
    few = torch.linalg.qr(torch.randn(8, 8)).Q[:6]
    assert rankme(few - few.mean(0), normalized=True) == pytest.approx(1)
    assert rankme(few, normalized=True) == pytest.approx(6 / 5)
    with pytest.raises(ValueError, match="features must have at least 2 rows"):
        rankme(torch.ones(1, 8), normalized=True)


def test_rankme_of_nothing():
    assert rankme(torch.zeros(5, 3)) == 1
    with pytest.raises(ValueError, match="features must have at least 1 rows"):
        rankme(torch.ones(0, 8))


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_alignment(alpha):
    x, y = torch.randn(30, 6), torch.randn(30, 6)
    cosine = (normalize(x, dim=1) * normalize(y, dim=1)).sum(1).double()
    expected = (2 - 2 * cosine).pow(alpha / 2).mean().item()
    assert alignment(x, y, alpha=alpha) == pytest.approx(expected, rel=1e-5)
    assert alignment(x, 3 * x, alpha=alpha) == pytest.approx(0, abs=1e-6)
    assert alignment(x, -x, alpha=alpha) == pytest.approx(2**alpha)


@pytest.mark.parametrize("chunk", [1, 7, 4096])
@pytest.mark.parametrize("t", [0.5, 2.0])
def test_uniformity(monkeypatch, chunk, t):
    monkeypatch.setattr(measures, "_CHUNK", chunk)
    x = torch.randn(31, 6)
    distance = torch.pdist(normalize(x.double(), dim=1))
    expected = torch.exp(-t * distance.square()).mean().log().item()
    assert uniformity(x, t=t) == pytest.approx(expected, rel=1e-9)


def test_uniformity_at_the_edges():
    for collapsed in (torch.ones(20, 5), torch.zeros(20, 5)):
        assert uniformity(collapsed) == pytest.approx(0, abs=1e-9)
    assert uniformity(torch.eye(16)) == pytest.approx(-4)
    assert uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-8)
    # exp(-100) is less than what the diagonal's 1 are known to.
    far = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(far, t=25.0) == pytest.approx(-100)
    with pytest.raises(ValueError, match="x must have at least 2 rows over all ranks, got 1"):
        uniformity(torch.ones(1, 5))


@pytest.mark.parametrize("center", [None, torch.randn(11), torch.randn(1, 11)])
@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_teacher_entropy(monkeypatch, center, chunk):
    monkeypatch.setattr(measures, "_CHUNK", chunk)
    logits = torch.randn(23, 11)
    shifted = logits.double() if center is None else logits.double() - center
    distribution = torch.distributions.Categorical(logits=shifted / 0.5)
    mean = torch.distributions.Categorical(probs=distribution.probs.mean(0))
    got = teacher_entropy(logits, 0.5, center)
    assert got.per_sample == pytest.approx(distribution.entropy().mean().item(), rel=1e-6)
    assert got.of_mean == pytest.approx(mean.entropy().item(), rel=1e-6)


def test_teacher_entropy_tells_the_collapses_apart():
    one = teacher_entropy(torch.tensor([[9.0, 0.0, 0.0, 0.0]]).repeat(8, 1))
    assert one.per_sample == pytest.approx(0) and one.of_mean == pytest.approx(0)
    none = teacher_entropy(torch.zeros(8, 4).bfloat16())
    assert none.per_sample == pytest.approx(math.log(4)) == none.of_mean
    good = teacher_entropy(9 * torch.eye(4))
    assert good.per_sample == pytest.approx(0) and good.of_mean == pytest.approx(math.log(4))
    # The center takes away what all samples share.
    centered = teacher_entropy(
        9 * torch.eye(4) + torch.arange(4) * 50, center=torch.arange(4) * 50.0
    )
    assert centered == good


def test_bad_input():
    x = torch.randn(4, 3)
    for call, error, message in (
        (lambda: alignment(x, x[:2]), ValueError, r"y must have shape \[N, D\] as x = \[4, 3\]"),
        (lambda: alignment(x, x, alpha=0), ValueError, "alpha must be positive, got 0"),
        (lambda: alignment(x, x / 0), ValueError, "y must be finite, got nan or inf"),
        (lambda: uniformity(x, t=-1), ValueError, "t must be positive, got -1"),
        (lambda: uniformity(x[0]), ValueError, "x must have 2 dimensions"),
        (lambda: teacher_entropy(x, 0.0), ValueError, "temperature must be positive"),
        (lambda: teacher_entropy(x, 0.1, x[:, 0]), ValueError, r"center must have shape \[K\]"),
        (lambda: teacher_entropy(x.long()), TypeError, "logits must be float32"),
        (lambda: feature_std(x[:0]), ValueError, "features must have at least 1 rows"),
        (lambda: rankme([x]), TypeError, "features must be a Tensor, got list"),
    ):
        with pytest.raises(error, match=message):
            call()
