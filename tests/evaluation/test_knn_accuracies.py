"""knn_accuracies against scikit-learn and brute force, at ties and at the edges."""

import numpy as np
import pytest
import torch

from fastssl.evaluation import knn, knn_accuracies, knn_accuracy


def clusters(num, seed, classes=5, dim=7, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (num,), generator=generator)
    return centres[labels] + noise * torch.randn(num, dim, generator=generator), labels


TRAIN, TEST = clusters(211, 0), clusters(97, 1)


def test_agrees_with_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    got = knn_accuracies(*TRAIN, *TEST, ks=(1, 7, 20), temperature=0.2)
    for k, accuracy in got.items():
        model = neighbors.KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.2)
        )
        model.fit(TRAIN[0].double().numpy(), TRAIN[1].numpy())
        expected = 100 * model.score(TEST[0].double().numpy(), TEST[1].numpy())
        assert 30 < expected < 95, "a case with errors in it"
        assert accuracy == pytest.approx(expected)


def test_several_k_are_those_of_one_each_in_any_order():
    got = knn_accuracies(*TRAIN, *TEST, ks=(20, 1, 500, 1), temperature=1.0)
    assert list(got) == [20, 1, 500]
    assert len(set(got.values())) == 3, "a case where k matters"
    for k, accuracy in got.items():
        assert knn_accuracy(*TRAIN, *TEST, k=k, temperature=1.0) == accuracy


@pytest.mark.parametrize("chunks", [(1, 53), (8, 13), (97, 211), (1024, 4)])
def test_chunks_do_not_matter(monkeypatch, chunks):
    expected = knn_accuracies(*TRAIN, *TEST, ks=(5, 20))
    near = knn._nearest(TRAIN[0], TEST[0], 20, torch.float64, "")
    monkeypatch.setattr(knn, "_CHUNK", chunks[0])
    monkeypatch.setattr(knn, "_TRAIN_CHUNK", chunks[1])
    assert knn_accuracies(*TRAIN, *TEST, ks=(5, 20)) == expected
    assert torch.equal(knn._nearest(TRAIN[0], TEST[0], 20, torch.float64, ""), near)


def test_the_similarities_kept_are_the_largest(monkeypatch):
    monkeypatch.setattr(knn, "_TRAIN_CHUNK", 16)
    keys = knn._nearest(TRAIN[0], TEST[0], 20, torch.float64, "")
    unit = [torch.nn.functional.normalize(x.double(), dim=1) for x in (TRAIN[0], TEST[0])]
    similarity, place = (unit[1] @ unit[0].T).topk(20)
    torch.testing.assert_close((keys >> 31).double() / 2**31, similarity, atol=1e-9, rtol=0)
    assert torch.equal(2**31 - 1 - (keys & (2**31 - 1)), place)


def test_the_earliest_of_equal_neighbours_counts(monkeypatch):
    """Copies of one sample whose labels differ, over several chunks."""
    train = torch.tensor([[1.0, 2.0, 3.0]]).repeat(50, 1)
    labels = torch.arange(50) % 7
    query = torch.tensor([[3.0, 2.0, 1.0]])
    for chunk in (3, 8192):
        monkeypatch.setattr(knn, "_TRAIN_CHUNK", chunk)
        for roll in (0, 3, 5):
            rolled = labels.roll(-roll)
            assert knn_accuracies(train, rolled, query, torch.tensor([roll]), ks=(1,)) == {1: 100}


def test_the_smallest_of_labels_with_equal_votes_wins():
    train = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    query = torch.ones(1, 3)
    for labels in ([4, 2, 3], [2, 3, 4], [3, 4, 2]):
        assert knn_accuracy(train, torch.tensor(labels), query, torch.tensor([2])) == 100


def test_constant_and_zero_features():
    labels = torch.arange(60) % 4
    for features in (torch.ones(60, 5), torch.zeros(60, 5)):
        got = knn_accuracies(features, labels, features, labels, ks=(1, 20, 100))
        assert got == {1: 25, 20: 25, 100: 25}


def test_random_labels_are_chance():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2000, 16, generator=generator)
    labels = torch.randint(5, (2000,), generator=generator)
    got = knn_accuracies(features[:1000], labels[:1000], features[1000:], labels[1000:])
    assert list(got) == [10, 20]
    # 1000 draws at 1 in 5: a standard deviation of 1.3 points.
    assert all(abs(accuracy - 20) < 5 for accuracy in got.values())


def test_low_precision():
    # bfloat16 features are what they are, and a float32 product moves no neighbour here.
    low = [TRAIN[0].bfloat16(), TRAIN[1], TEST[0].bfloat16(), TEST[1]]
    exact = [TRAIN[0].bfloat16().double(), TRAIN[1], TEST[0].bfloat16().double(), TEST[1]]
    assert knn_accuracies(*low) == knn_accuracies(*exact)
    assert knn_accuracies(*TRAIN, *TEST, dtype=torch.float32) == knn_accuracies(*TRAIN, *TEST)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"train_features": TRAIN[0][0]}, ValueError, "train_features must have 2 dimensions"),
        ({"test_features": TEST[0][:, :3]}, ValueError, r"test_features must have shape"),
        ({"test_labels": TEST[1][:5]}, ValueError, r"test_labels must have shape \[N\] = \[97\]"),
        ({"train_labels": TRAIN[1].float()}, TypeError, "train_labels must be int64, got float32"),
        ({"train_labels": TRAIN[1] - 1}, ValueError, "train_labels must be at least 0, got -1"),
        ({"test_features": TEST[0] / 0}, ValueError, "test_features must be finite"),
        ({"ks": ()}, ValueError, "ks must have at least one"),
        ({"ks": (5, 0)}, ValueError, "ks must be at least 1, got 0"),
        ({"ks": (2.0,)}, TypeError, "ks must be an int, got float"),
        ({"dtype": torch.float16}, ValueError, "dtype must be torch.float32 or torch.float64"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
        (
            {"train_features": TRAIN[0][:0], "train_labels": TRAIN[1][:0]},
            ValueError,
            "train_features must have at least one row",
        ),
    ],
)
def test_bad_input(change, error, message):
    names = ("train_features", "train_labels", "test_features", "test_labels")
    arguments = dict(zip(names, (*TRAIN, *TEST), strict=True)) | change
    with pytest.raises(error, match=message):
        knn_accuracies(**arguments)
