"""covariance_loss: every backend against its published formula, alone and in groups."""

import pytest
import torch

from fastssl import functional as F
from tests.kernels.gram_cases import (
    SHAPES,
    assert_matches_float64,
    assert_ranks_equal_one_process,
    make_views,
)
from tests.kernels.util import DTYPES, compiled_backends, device_of

BACKENDS = compiled_backends("covariance_loss")
ALL = ["reference", *BACKENDS]
WORLDS = [1, 2, pytest.param(4, marks=pytest.mark.slow)]


def published(z):
    covariance = torch.cov(z.T)
    covariance.fill_diagonal_(0)
    return covariance.pow(2).sum() / z.shape[1]


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)], ids=str)
def test_reference_is_the_published_definition(shape):
    views = make_views(1, shape, torch.float64)
    expected = published(*views)
    torch.testing.assert_close(F.covariance_loss(*views), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, backend, poisoned_memory):
    views = make_views(1, shape, dtype, device_of(backend))
    assert_matches_float64("covariance_loss", views, backend)


@pytest.mark.skipif("cpp" not in [p.values[0] for p in BACKENDS], reason="no cpp backend")
@pytest.mark.parametrize("shape", [(256, 2048), (1024, 256)], ids=str)
def test_real_sizes(shape):
    assert_matches_float64("covariance_loss", make_views(1, shape), "cpp")


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)], ids=str)
def test_gradcheck_of_the_reference(shape):
    views = [view.requires_grad_() for view in make_views(1, shape, torch.float64)]
    assert torch.autograd.gradcheck(lambda *z: F.covariance_loss(*z, backend="reference"), views)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("kind", ["large", "small", "all equal", "equal rows", "one row"])
@pytest.mark.parametrize("shape", [(6, 11), (11, 6)], ids=str)
def test_extreme_inputs_are_finite(kind, shape, backend):
    views = make_views(1, shape, device=device_of(backend))
    for view in views:
        if kind in ("large", "small"):
            view *= 1e4 if kind == "large" else 1e-12
        elif kind == "all equal":
            view.fill_(3.0)
        else:
            view[:] = view[0].clone()
    if kind == "one row":
        views = [view[:1] for view in views]
    leaves = [view.clone().requires_grad_() for view in views]
    loss = F.covariance_loss(*leaves, backend=backend)
    grads = torch.autograd.grad(loss, leaves)
    assert all(torch.isfinite(value).all() for value in (loss, *grads))
    truth = F.covariance_loss(*(view.double() for view in views), backend="reference")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(67, 131), (131, 67)], ids=str)
def test_runs_give_the_same_bits(shape, backend):
    def run():
        leaves = [view.requires_grad_() for view in views]
        loss = F.covariance_loss(*leaves, backend=backend)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    views = make_views(1, shape, device=device_of(backend))
    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)], ids=str)
def test_opcheck(shape, backend):
    views = [view.requires_grad_() for view in make_views(1, shape, device=device_of(backend))]
    torch.library.opcheck(torch.ops.fastssl.covariance_loss, (*views, "", backend))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)], ids=str)
def test_compiles_without_a_graph_break(shape, backend):
    def call(*z):
        return F.covariance_loss(*z, backend=backend)

    views = [view.requires_grad_() for view in make_views(1, shape, device=device_of(backend))]
    torch.compiler.reset()
    loss, expected = torch.compile(call, fullgraph=True)(*views), call(*views)
    torch.testing.assert_close(loss, expected)
    for pair in zip(*(torch.autograd.grad(x, views) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize("backend", ALL)
def test_autocast_leaves_the_features_alone(backend):
    views = make_views(1, (9, 17), device=device_of(backend))
    with torch.autocast(views[0].device.type, dtype=torch.bfloat16):
        actual = F.covariance_loss(*views, backend=backend)
    torch.testing.assert_close(actual, F.covariance_loss(*views, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_features(backend):
    views = [view.t() for view in make_views(1, (17, 9), device=device_of(backend))]
    assert_matches_float64("covariance_loss", views, backend)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("width", [5, 23])
@pytest.mark.parametrize("backend", ALL)
def test_ranks_equal_one_process(gloo_pool, backend, width, world_size):
    assert_ranks_equal_one_process(gloo_pool, "covariance_loss", 1, backend, width, world_size)


@pytest.mark.parametrize("width", [5, 23])
def test_compiles_on_ranks(gloo_pool, width):
    assert_ranks_equal_one_process(gloo_pool, "covariance_loss", 1, None, width, 2, compiled=True)


BAD = {
    "z must have 2 dimensions, got shape (4,)": {"z": torch.zeros(4)},
    "z must have at least one row and one column, got [0, 5]": {"z": torch.zeros(0, 5)},
    "z must be a Tensor, got list": {"z": [1.0]},
    "backend must be one of cpp, triton, reference": {"backend": "magic"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    arguments = {"z": torch.zeros(3, 5), **BAD[message]}
    with pytest.raises((TypeError, ValueError)) as error:
        F.covariance_loss(**arguments)
    assert message in str(error.value)
