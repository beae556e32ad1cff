"""linear_probe_accuracy against scikit-learn's logistic regression."""

import pytest
import torch

from fastssl.evaluation import linear_probe_accuracy


def clusters(num, seed, classes=7, dim=24, spread=0.7):
    centres = spread * torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(num) % classes
    noise = torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))
    return centres[labels] + noise, labels


@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_agrees_with_scikit_learn(c):
    linear_model = pytest.importorskip("sklearn.linear_model")
    (x, y), (x_test, y_test) = clusters(140, 0), clusters(350, 1)
    mean, std = x.mean(0), x.std(0, correction=0)
    model = linear_model.LogisticRegression(C=c, max_iter=5000, tol=1e-8)
    model.fit(((x - mean) / std).numpy(), y.numpy())
    expected = 100 * model.score(((x_test - mean) / std).numpy(), y_test.numpy())
    assert 50 < expected < 99, "a case with errors in it"
    # One sample of 350 may fall on the other side of a boundary.
    got = linear_probe_accuracy(x, y, x_test, y_test, c=c)
    assert got == pytest.approx(expected, abs=100 / 350 + 1e-6)


def test_separable_and_random_features():
    far = {"spread": 20.0}
    assert linear_probe_accuracy(*clusters(70, 0, **far), *clusters(70, 1, **far)) == 100
    nothing = {"spread": 0.0, "classes": 5}
    accuracy = linear_probe_accuracy(*clusters(1000, 0, **nothing), *clusters(1000, 1, **nothing))
    # 1000 draws at 1 in 5: a standard deviation of 1.3 points.
    assert accuracy == pytest.approx(20, abs=5)


def test_scale_shift_and_constant_features_do_not_matter():
    (x, y), (x_test, y_test) = clusters(140, 0), clusters(350, 1)
    base = linear_probe_accuracy(x, y, x_test, y_test)
    scale, shift = torch.logspace(-2, 2, 24), torch.linspace(-5, 5, 24)

    def changed(features):
        constant = torch.full((len(features), 1), 0.1)
        return torch.cat([features * scale + shift, constant], dim=1)

    got = linear_probe_accuracy(changed(x), y, changed(x_test), y_test)
    assert got == pytest.approx(base, abs=100 / 350 + 1e-6)


def test_deterministic_and_usable_under_no_grad():
    train, test = clusters(140, 0), clusters(350, 1)
    first = linear_probe_accuracy(*train, *test)
    torch.manual_seed(5)
    with torch.no_grad():
        assert linear_probe_accuracy(*train, *test) == first
    bf16 = linear_probe_accuracy(train[0].bfloat16(), train[1], test[0].bfloat16(), test[1])
    assert bf16 == pytest.approx(first, abs=3)
