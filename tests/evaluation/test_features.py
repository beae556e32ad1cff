"""extract_features, the label-free measures and evaluate as a whole."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.data import build_datasets
from fastssl.data.crops import Request
from fastssl.data.transforms import normalize
from fastssl.evaluation import evaluate, extract_features, feature_std, rankme


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Evaluation datasets of six noise pictures, each of a colour of its own."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(6):
        colour = rng.integers(60, 196, 3)
        pixels = np.clip(colour + rng.normal(0, 20, (40, 60, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{i}.png")
    return build_datasets(str(root), image_size=8, eval_crops=10)[1]


def colour_features(images):
    return images.mean(dim=(2, 3))


@pytest.mark.parametrize(("batch_size", "num_workers"), [(7, 0), (60, 0), (256, 0), (16, 1)])
def test_features_in_order(halves, batch_size, num_workers):
    learn = halves[0]
    whole = learn[Request(torch.arange(60))]
    expected = colour_features(normalize(whole.images, learn.mean, learn.std))
    features, labels = extract_features(colour_features, learn, batch_size, num_workers=num_workers)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    assert torch.equal(labels, torch.arange(6).repeat_interleave(10))


def test_features_are_float32_without_a_graph(halves):
    weight = torch.ones(3, requires_grad=True)
    features, _ = extract_features(lambda x: (colour_features(x) * weight).bfloat16(), halves[0])
    assert features.dtype == torch.float32 and not features.requires_grad


def test_evaluate(halves):
    got = evaluate(colour_features, *halves)
    assert set(got) == {"knn", "linear", "rankme", "feature_std"}
    assert got["knn"] > 95 and got["linear"] > 95
    few = evaluate(colour_features, *halves, labels_per_class=[1, 3])
    assert set(few) == {*got, "low_shot_1", "low_shot_3"}
    assert 50 < few["low_shot_1"] <= few["low_shot_3"], "six colours, told by one picture each"
    # Features that know nothing of the image: one in six.
    blind = evaluate(lambda x: torch.ones(len(x), 4), *halves)
    assert blind["knn"] == blind["linear"] == pytest.approx(100 / 6)
    assert blind["feature_std"] == pytest.approx(0, abs=1e-6)
    assert blind["rankme"] == pytest.approx(1)


def test_features_that_are_not_finite(halves):
    got = evaluate(lambda x: colour_features(x) * math.inf, *halves, labels_per_class=[1])
    assert all(math.isnan(value) for value in got.values()) and len(got) == 5


def test_rankme_counts_directions():
    generator = torch.Generator().manual_seed(0)
    orthogonal = torch.linalg.qr(torch.randn(50, 8, generator=generator)).Q
    assert rankme(orthogonal) == pytest.approx(8)
    assert rankme(orthogonal[:, :3] @ orthogonal[:8, :3].T.contiguous()) < 3.001
    assert rankme(torch.ones(50, 8)) == pytest.approx(1, abs=1e-4)
    # Singular values 3 and 1: exp(-(0.75 log 0.75 + 0.25 log 0.25)).
    two = orthogonal[:, :2] * torch.tensor([3.0, 1.0])
    assert rankme(two) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))


def test_feature_std():
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(20000, 16, generator=generator)
    assert feature_std(spread) == pytest.approx(1, abs=0.02)
    assert feature_std(spread * 1000) == pytest.approx(feature_std(spread))
    assert feature_std(torch.ones(50, 16)) == pytest.approx(0, abs=1e-9)
    assert feature_std(torch.ones(50, 16) + 0.01 * spread[:50]) < 0.02


def extracted(dataset, batch_size):
    return extract_features(colour_features, dataset, batch_size)


@pytest.mark.parametrize("batch_size", [7, 1, 100])
def test_ranks_share_a_dataset(gloo_pool, halves, batch_size):
    """Also where one has no share of a batch."""
    features, labels = extracted(halves[0], batch_size)
    for others, other_labels in gloo_pool.run(extracted, 2, halves[0], batch_size):
        torch.testing.assert_close(others, features)
        assert torch.equal(other_labels, labels)
