"""Methods of contrast: what they compute, alone and in several processes."""

import pytest
import torch
from torch.nn.functional import normalize

from tests.methods.checks import TINY_VIT, Case, build, check_all, check_processes, make_batch

SIMCLR = Case("simclr", {"hidden_dim": 12, "output_dim": 6, "temperature": 0.5}, accumulates=False)
CASES = {
    "simclr": SIMCLR,
    "simclr_vit": Case(
        "simclr",
        {"hidden_dim": 12, "output_dim": 6},
        model="VisionTransformer",
        model_args=TINY_VIT,
        accumulates=False,
    ),
    "simclr_batch_norm": Case(
        "simclr",
        {"hidden_dim": 12, "output_dim": 6},
        model_args={"batch_norm": True},
        accumulates=False,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_alone(name):
    check_all(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_processes_equal_one(gloo_pool, name):
    check_processes(gloo_pool, CASES[name])


def test_simclr_is_its_formula():
    """-log(exp(s[i, j] / t) / sum over k != i of exp(s[i, k] / t)), meaned over both orders."""
    method = build(SIMCLR).double()
    batch = make_batch(SIMCLR, dtype=torch.float64)
    loss = method(batch)["loss"]
    loss.backward()
    grads = {name: p.grad.clone() for name, p in method.named_parameters()}
    method.zero_grad()

    z = normalize(method.head(torch.cat([method.model(view) for view in batch.views])), dim=1)
    similarity = (z @ z.T / 0.5).exp()
    n = len(batch)
    expected = 0.0
    for i in range(2 * n):
        others = similarity[i].sum() - similarity[i, i]
        expected = expected - (similarity[i, (i + n) % (2 * n)] / others).log() / (2 * n)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in method.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)


@pytest.mark.parametrize("number", [1, 3])
def test_simclr_wants_two_views(number):
    with pytest.raises(ValueError, match=f"must make 2 views of a sample for simclr, got {number}"):
        build(Case("simclr", views=[{"number": number}]))
