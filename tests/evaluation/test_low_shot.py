"""low_shot_split and low_shot_accuracy."""

import statistics

import pytest
import torch
from torch.nn.functional import normalize

from fastssl.evaluation import linear_probe_accuracy, low_shot_accuracy, low_shot_split

# Classes of 1, 2, ..., 40 samples, but none of class 3, in a mixed order.
SIZES = {label: size for size, label in enumerate([7, 0, 5, 2, 6, 1, 4], start=1)} | {8: 40, 9: 100}
LABELS = torch.cat([torch.full((n,), label) for label, n in SIZES.items()])
LABELS = LABELS[torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0))]


def clusters(num, seed, classes=5, dim=7, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (num,), generator=generator)
    return centres[labels] + noise * torch.randn(num, dim, generator=generator), labels


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ({"per_class": 1}, lambda n: 1),
        ({"per_class": 5}, lambda n: min(n, 5)),
        ({"fraction": 0.01}, lambda n: 1),
        ({"fraction": 0.1}, lambda n: max(1, round(0.1 * n))),
        ({"fraction": 1.0}, lambda n: n),
    ],
)
def test_number_of_each_class(how, wanted):
    chosen = low_shot_split(LABELS, **how)
    assert torch.equal(chosen, chosen.unique()), "sorted, each once"
    counts = LABELS[chosen].bincount(minlength=10).tolist()
    assert counts == [wanted(SIZES[label]) if label in SIZES else 0 for label in range(10)]


def test_seeds_choose_differently_and_evenly():
    labels = torch.zeros(20, dtype=torch.int64)
    splits = torch.stack([low_shot_split(labels, per_class=5, seed=seed) for seed in range(400)])
    assert torch.equal(low_shot_split(labels, per_class=5, seed=3), splits[3])
    # 400 draws at 1 in 4: a standard deviation of 8.7.
    assert (splits.flatten().bincount(minlength=20) - 100).abs().max() < 40


def test_a_split_is_of_the_samples_not_of_their_order():
    ids = torch.arange(len(LABELS)) * 3 + 11
    expected = ids[low_shot_split(LABELS, fraction=0.3, seed=4, ids=ids)].sort().values
    for seed in range(3):
        order = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(seed))
        chosen = low_shot_split(LABELS[order], fraction=0.3, seed=4, ids=ids[order])
        assert torch.equal(ids[order][chosen].sort().values, expected)
        assert torch.equal(chosen, chosen.sort().values)
    places = torch.arange(len(LABELS))
    by_place = low_shot_split(LABELS, fraction=0.3, seed=4)
    assert torch.equal(by_place, low_shot_split(LABELS, fraction=0.3, seed=4, ids=places))


def test_accuracies_are_those_of_the_splits():
    train, test = clusters(300, 0), clusters(200, 1)
    got = low_shot_accuracy(*train, *test, per_class=3, seeds=(0, 5))
    linear, prototype = [], []
    for seed in (0, 5):
        chosen = low_shot_split(train[1], per_class=3, seed=seed)
        x, y = train[0][chosen], train[1][chosen]
        linear.append(linear_probe_accuracy(x, y, *test))
        means = torch.stack([normalize(x, dim=1)[y == label].mean(0) for label in range(5)])
        predicted = (normalize(test[0], dim=1) @ normalize(means, dim=1).T).argmax(1)
        prototype.append(100 * (predicted == test[1]).double().mean().item())
    for name, values in (("linear", linear), ("prototype", prototype)):
        assert got[name].values == pytest.approx(values)
        assert got[name].mean == pytest.approx(statistics.mean(values))
        assert (
            got[name].std == pytest.approx(abs(values[0] - values[1]) / 2**0.5) and values[0] < 95
        )


def test_separable_random_and_constant():
    far = low_shot_accuracy(
        *clusters(100, 0, noise=0.01), *clusters(50, 1, noise=0.01), per_class=1
    )
    assert far["linear"].values == far["prototype"].values == (100, 100, 100)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2000, 16, generator=generator), torch.arange(2000) % 5
    chance = low_shot_accuracy(x[:1000], y[:1000], x[1000:], y[1000:], fraction=0.1)
    # 1000 draws at 1 in 5: a standard deviation of 1.3 points.
    assert all(abs(spread.mean - 20) < 5 for spread in chance.values())
    blind = low_shot_accuracy(torch.ones(20, 3), y[:20], torch.ones(20, 3), y[:20], per_class=2)
    assert all(spread.values == (20, 20, 20) for spread in blind.values())


def test_one_seed_has_no_spread():
    spread = low_shot_accuracy(*clusters(50, 0), *clusters(50, 1), fraction=0.1, seeds=(2,))
    assert spread["linear"].std != spread["linear"].std
    assert spread["linear"].values == (spread["linear"].mean,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({}, ValueError, "one of per_class and fraction must be given, got None and None"),
        ({"per_class": 1, "fraction": 0.1}, ValueError, "must be given, got 1 and 0.1"),
        ({"per_class": 0}, ValueError, "per_class must be at least 1, got 0"),
        ({"per_class": 0.1}, TypeError, "per_class must be an int, got float"),
        ({"fraction": 0.0}, ValueError, r"fraction must be in \(0, 1\], got 0.0"),
        ({"fraction": 10}, ValueError, r"fraction must be in \(0, 1\], got 10"),
        ({"per_class": 1, "ids": LABELS}, ValueError, "ids must be all different"),
        ({"per_class": 1, "ids": LABELS[:3]}, ValueError, r"ids must have shape \[N\]"),
        ({"per_class": 1, "labels": LABELS - 1}, ValueError, "labels must be at least 0, got -1"),
        ({"per_class": 1, "labels": LABELS.int()}, TypeError, "labels must be int64, got int32"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        low_shot_split(**{"labels": LABELS} | change)


def test_no_seeds():
    with pytest.raises(ValueError, match="seeds must be at least one, got none"):
        low_shot_accuracy(*clusters(50, 0), *clusters(50, 1), fraction=0.1, seeds=())
