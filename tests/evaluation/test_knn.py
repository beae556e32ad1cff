"""knn_accuracy against a formula written out per sample."""

import math

import pytest
import torch

from fastssl.evaluation import knn_accuracy


def by_hand(train, train_labels, test, test_labels, k, temperature):
    correct = 0
    for x, label in zip(test.tolist(), test_labels.tolist(), strict=True):
        scored = []
        for y, other in zip(train.tolist(), train_labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(x, y, strict=True))
            scored.append((dot / math.hypot(*x) / math.hypot(*y), other))
        votes = {}
        for similarity, other in sorted(scored, reverse=True)[:k]:
            votes[other] = votes.get(other, 0.0) + math.exp(similarity / temperature)
        correct += max(votes, key=votes.get) == label
    return 100 * correct / len(test)


def clusters(num, noise, seed, classes=5, dim=7):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(num) % classes
    return centres[labels] + noise * torch.randn(num, dim, generator=generator), labels


@pytest.mark.parametrize("k", [1, 3, 20, 61])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_agrees_with_the_formula(k, temperature):
    train, test = clusters(61, 1.0, seed=0), clusters(43, 1.0, seed=1)
    expected = by_hand(*train, *test, k, temperature)
    assert 30 < expected < 95, "a case with errors in it"
    assert knn_accuracy(*train, *test, k=k, temperature=temperature) == pytest.approx(expected)


def test_chunks_do_not_matter(monkeypatch):
    train, test = clusters(61, 1.0, seed=0), clusters(43, 1.0, seed=1)
    whole = knn_accuracy(*train, *test)
    monkeypatch.setattr("fastssl.evaluation.knn._CHUNK", 8)
    assert knn_accuracy(*train, *test) == whole


def test_separable_and_random_features():
    assert knn_accuracy(*clusters(100, 0.01, seed=0), *clusters(50, 0.01, seed=1)) == 100
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(2000, 16, generator=generator), torch.arange(2000) % 5
    accuracy = knn_accuracy(features[:1000], labels[:1000], features[1000:], labels[1000:])
    # 1000 draws at 1 in 5: a standard deviation of 1.3 points.
    assert accuracy == pytest.approx(20, abs=5)


def test_weights_decide():
    """Two neighbours of label 1 against a nearer one of label 0."""
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels = torch.tensor([0, 1, 1])
    query, wanted = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    # exp(1 / T) against 2 exp(0.6 / T): the nearer wins below T = 0.4 / log 2.
    assert knn_accuracy(train, labels, query, wanted, temperature=0.5) == 100
    assert knn_accuracy(train, labels, query, wanted, temperature=0.65) == 0


def test_only_directions_matter_and_any_temperature_is_finite():
    train, test = clusters(61, 1.0, seed=0), clusters(43, 1.0, seed=1)
    scale = torch.logspace(-3, 3, 61).unsqueeze(1)
    assert knn_accuracy(train[0] * scale, train[1], *test) == knn_accuracy(*train, *test)
    one = knn_accuracy(*train, *test, k=1)
    assert knn_accuracy(*train, *test, k=20, temperature=1e-4) == one
    assert knn_accuracy(train[0].bfloat16(), train[1], test[0].bfloat16(), test[1]) > 30


def test_fewer_samples_than_neighbours():
    train, test = clusters(10, 0.01, seed=0), clusters(10, 0.01, seed=1)
    assert knn_accuracy(*train, *test, k=20) == 100
