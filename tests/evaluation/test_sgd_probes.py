"""sgd_probe and attentive_probe: against torch's own SGD, and on planted problems."""

import math

import pytest
import torch
from torch import nn

from fastssl.data.loader import epoch_permutation
from fastssl.evaluation import SGDOptions, attentive_probe, sgd_probe
from fastssl.evaluation import sgd_probes as module


def clusters(num, seed, classes=5, dim=8, spread=0.7):
    generator = torch.Generator().manual_seed(seed)
    centres = spread * torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (num,), generator=generator)
    return centres[labels] + torch.randn(num, dim, generator=generator), labels


def marked_tokens(num, seed, num_tokens=9, dim=16, classes=4):
    """The last dimension marks one token; its class is the label, that of the others is noise."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1.5 * torch.randn(classes, dim - 1, generator=torch.Generator().manual_seed(99))
    of_token = torch.randint(classes, (num, num_tokens), generator=generator)
    noise = 0.3 * torch.randn(num, num_tokens, dim - 1, generator=generator)
    marked = torch.randint(num_tokens, (num,), generator=generator)
    mark = nn.functional.one_hot(marked, num_tokens).float().unsqueeze(2)
    tokens = torch.cat([centres[of_token] + noise, mark], dim=2)
    return tokens, of_token[torch.arange(num), marked]


@pytest.mark.parametrize("standardize", [True, False])
def test_the_training_is_that_of_torch(standardize):
    """One rate after the other, by torch.optim.SGD and its cosine."""
    (x, y), (x_test, y_test) = clusters(110, 0), clusters(300, 1)
    options = SGDOptions(
        (0.3, 0.01, 0.1), epochs=3, batch_size=32, held_out=0.2, seed=7, standardize=standardize
    )
    result = sgd_probe(x, y, x_test, y_test, options)
    assert list(result.test) == list(result.held_out) == [0.3, 0.01, 0.1]
    if standardize:
        mean, std = x.mean(0), x.std(0, correction=0)
        x, x_test = (x - mean) / std, (x_test - mean) / std
    order = epoch_permutation(110, seed=7, epoch=0)
    kept, learned = order[:22], order[22:]
    for lr in options.lrs:
        model = nn.Linear(8, 5)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
        for epoch in (1, 2, 3):
            for batch in learned[epoch_permutation(88, seed=7, epoch=epoch)].split(32):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
                scheduler.step()
        expected = 100 * (model(x_test).argmax(1) == y_test).double().mean().item()
        held_out = 100 * (model(x[kept]).argmax(1) == y[kept]).double().mean().item()
        assert 30 < expected < 95, "a case with errors in it"
        # One sample of 300 may fall on the other side of a boundary.
        assert result.test[lr] == pytest.approx(expected, abs=100 / 300 + 1e-6)
        assert result.held_out[lr] == pytest.approx(held_out, abs=1e-9)


def test_the_rate_is_chosen_on_the_held_out_part():
    (x, y), (x_test, y_test) = clusters(200, 0), clusters(200, 1)
    options = SGDOptions((1.0, 1e-6, 0.03), epochs=2, batch_size=20)
    result = sgd_probe(x, y, x_test, y_test, options)
    best = max(result.held_out.values())
    assert result.best_lr == min(lr for lr in options.lrs if result.held_out[lr] == best)
    assert result.accuracy == result.test[result.best_lr]
    # Whatever the test set says, the choice stays, and so does what was learned.
    other = sgd_probe(x, y, x_test, (y_test + 1) % 5, options)
    assert (other.best_lr, other.held_out) == (result.best_lr, result.held_out)
    assert other.accuracy < result.accuracy


def test_the_held_out_part_is_not_learned():
    """With every held-out label wrong nothing about the test accuracies changes."""
    (x, y), (x_test, y_test) = clusters(100, 0), clusters(200, 1)
    options = SGDOptions((0.1, 0.01), epochs=2, batch_size=30)
    kept = epoch_permutation(100, seed=0, epoch=0)[:10]
    changed = y.clone()
    changed[kept] = (changed[kept] + 1) % 5
    result = sgd_probe(x, y, x_test, y_test, options)
    other = sgd_probe(x, changed, x_test, y_test, options)
    assert other.test == result.test and other.held_out != result.held_out


def test_separable_and_random():
    far = {"spread": 20.0}
    assert sgd_probe(*clusters(200, 0, **far), *clusters(100, 1, **far)).accuracy == 100
    nothing = {"spread": 0.0}
    result = sgd_probe(*clusters(1000, 0, **nothing), *clusters(1000, 1, **nothing))
    # 1000 draws at 1 in 5: a standard deviation of 1.3 points.
    assert all(accuracy == pytest.approx(20, abs=5) for accuracy in result.test.values())


def test_more_dimensions_than_samples_and_constant_features():
    far = {"dim": 40, "spread": 9.0}
    assert sgd_probe(*clusters(9, 0, **far), *clusters(50, 1, **far)).accuracy > 60
    features, labels = torch.ones(40, 3), torch.arange(40) % 4
    blind = sgd_probe(features, labels, features, labels)
    assert set(blind.test.values()) == {25}


def test_a_rate_that_diverges_is_never_right_and_leaves_the_others_alone():
    (x, y), (x_test, y_test) = clusters(100, 0), clusters(100, 1)
    options = SGDOptions((0.01, 1e38), epochs=4, batch_size=20)
    result = sgd_probe(1e3 * x, y, x_test, y_test, options)
    assert result.test[1e38] == result.held_out[1e38] == 0
    alone = sgd_probe(1e3 * x, y, x_test, y_test, SGDOptions((0.01,), epochs=4, batch_size=20))
    assert result.best_lr == 0.01 and result.accuracy == alone.accuracy > 0


def test_deterministic_seeded_and_usable_under_no_grad():
    train, test = clusters(100, 0), clusters(400, 1)
    options = SGDOptions((0.3,), epochs=2, batch_size=10)
    first = sgd_probe(*train, *test, options)
    torch.manual_seed(5)
    with torch.no_grad():
        assert sgd_probe(*train, *test, options) == first
    other = sgd_probe(*train, *test, SGDOptions((0.3,), epochs=2, batch_size=10, seed=1))
    assert other.test != first.test


@pytest.mark.parametrize("num_heads", [1, 4])
def test_attention_finds_the_token_that_the_mean_hides(num_heads):
    train, test = marked_tokens(400, 0), marked_tokens(400, 1)
    options = SGDOptions((0.03, 0.1, 0.3), epochs=16, batch_size=64)
    result = attentive_probe(*train, *test, options, num_heads=num_heads)
    assert result.accuracy > 98
    mean = sgd_probe(train[0].mean(1), train[1], test[0].mean(1), test[1], options)
    assert max(mean.test.values()) < 60


def test_attention_over_one_token_starts_as_the_linear_probe():
    (x, y), (x_test, y_test) = clusters(60, 0), clusters(60, 1)
    # One step: the query and the values move only once the classifier has left zero.
    options = SGDOptions((0.1, 0.5), epochs=1, batch_size=64)
    result = attentive_probe(x[:, None], y, x_test[:, None], y_test, options, num_heads=2)
    assert result == sgd_probe(x, y, x_test, y_test, options)


def test_the_pooling_is_multi_head_cross_attention():
    """Of projected keys and values, token by token, as torch has it."""
    generator = torch.Generator().manual_seed(0)
    (L, B, T, D, H, C) = (3, 5, 7, 12, 4, 6)
    shapes = ((L, H, D // H), (L, H, D // H, D), (L, H, D // H, D), (L, C, D), (L, C))
    parameters = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    x = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    got = module._attentive_heads(parameters, x)
    for query, key, value, weight, bias, logits in zip(*parameters, got, strict=True):
        q = query[None, :, None].expand(B, -1, -1, -1)
        k, v = (torch.einsum("btd,hed->bhte", x, w) for w in (key, value))
        pooled = nn.functional.scaled_dot_product_attention(q, k, v).flatten(1)
        torch.testing.assert_close(logits, pooled @ weight.T + bias)


def test_gradients_of_the_rates_are_their_own():
    """Two rates alone and together learn the same."""
    train, test = marked_tokens(100, 0), marked_tokens(100, 1)
    both = attentive_probe(*train, *test, SGDOptions((0.1, 0.3), epochs=3), num_heads=2)
    for lr in (0.1, 0.3):
        one = attentive_probe(*train, *test, SGDOptions((lr,), epochs=3), num_heads=2)
        assert one.test[lr] == pytest.approx(both.test[lr], abs=1 + 1e-6)


def test_bad_options():
    for change, message in (
        ({"lrs": ()}, "lrs must be different learning rates"),
        ({"lrs": (0.1, 0.1)}, "lrs must be different learning rates"),
        ({"lrs": (0.1, math.nan)}, "lrs must be positive, got nan"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"held_out": 0.0}, r"held_out must be in \(0, 1\), got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            SGDOptions(**change)


def test_bad_input():
    train, test = marked_tokens(8, 0), marked_tokens(8, 1)
    with pytest.raises(ValueError, match="num_heads must divide D = 16, got 3"):
        attentive_probe(*train, *test, num_heads=3)
    with pytest.raises(ValueError, match="train_features must have 3 dimensions"):
        attentive_probe(train[0].mean(1), train[1], *test)
    with pytest.raises(ValueError, match="beside the held-out ones over all ranks, got 1"):
        sgd_probe(train[0][:1, 0], train[1][:1], test[0][:, 0], test[1])
