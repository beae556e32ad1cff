"""barlow_twins, vicreg and covariance_loss, which share common/gram.py: every backend against the
reference in float64, alone and in groups."""

import pytest
import torch

from fastssl import functional as F
from tests.kernels.gram_cases import (
    SHAPES,
    assert_matches_float64,
    assert_ranks_equal_one_process,
    make_views,
)
from tests.kernels.util import (
    DTYPES,
    backends_on_ranks,
    compiled_backends,
    device_of,
)

# Views, and the numbers that the op takes after them.
OPS = {
    "barlow_twins": (2, (5e-3, 1e-5)),
    "vicreg": (2, (25.0, 25.0, 1.0, 1e-4)),
    "covariance_loss": (1, ()),
}
BACKENDS = compiled_backends("barlow_twins")
ALL = ["reference", *BACKENDS]
WORLDS = [1, 2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.fixture(params=OPS)
def name(request):
    return request.param


@pytest.fixture
def number(name):
    """Of views."""
    return OPS[name][0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(name, number, shape, dtype, backend, poisoned_memory):
    views = make_views(number, shape, dtype, device_of(backend))
    assert_matches_float64(name, views, backend)


@pytest.mark.parametrize("shape", [(256, 2048), (1024, 256)], ids=str)
def test_real_sizes(name, number, shape):
    assert_matches_float64(name, make_views(number, shape), "cpp")


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)], ids=str)
def test_gradcheck_of_the_reference(name, number, shape):
    views = [view.requires_grad_() for view in make_views(number, shape, torch.float64)]
    function = getattr(F, name)
    assert torch.autograd.gradcheck(lambda *z: function(*z, backend="reference"), views)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("kind", ["large", "small", "all equal", "equal rows", "one row"])
@pytest.mark.parametrize("shape", [(6, 11), (11, 6)], ids=str)
def test_extreme_inputs_are_finite(name, number, kind, shape, backend):
    views = make_views(number, shape, device=device_of(backend))
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
    loss = getattr(F, name)(*leaves, backend=backend)
    grads = torch.autograd.grad(loss, leaves)
    assert all(torch.isfinite(value).all() for value in (loss, *grads))
    truth = getattr(F, name)(*(view.double() for view in views), backend="reference")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(67, 131), (131, 67)], ids=str)
def test_runs_give_the_same_bits(name, number, shape, backend):
    def run():
        leaves = [view.requires_grad_() for view in views]
        loss = getattr(F, name)(*leaves, backend=backend)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    views = make_views(number, shape, device=device_of(backend))
    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)], ids=str)
def test_opcheck(name, number, shape, backend):
    views = make_views(number, shape, device=device_of(backend))
    views = [view.requires_grad_() for view in views]
    arguments = (*views, *OPS[name][1], "", backend)
    torch.library.opcheck(getattr(torch.ops.fastssl, name), arguments)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)], ids=str)
def test_compiles_without_a_graph_break(name, number, shape, backend):
    function = getattr(F, name)

    def call(*z):
        return function(*z, backend=backend)

    views = make_views(number, shape, device=device_of(backend))
    views = [view.requires_grad_() for view in views]
    torch.compiler.reset()
    loss, expected = torch.compile(call, fullgraph=True)(*views), call(*views)
    torch.testing.assert_close(loss, expected)
    for pair in zip(*(torch.autograd.grad(x, views) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize("backend", ALL)
def test_autocast_leaves_the_features_alone(name, number, backend):
    function = getattr(F, name)
    views = make_views(number, (9, 17), device=device_of(backend))
    with torch.autocast(views[0].device.type, dtype=torch.bfloat16):
        actual = function(*views, backend=backend)
    torch.testing.assert_close(actual, function(*views, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_features(name, number, backend):
    views = [view.t() for view in make_views(number, (17, 9), device=device_of(backend))]
    assert_matches_float64(name, views, backend)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("width", [5, 23])
@pytest.mark.parametrize("backend", backends_on_ranks("barlow_twins"))
def test_ranks_equal_one_process(gloo_pool, name, number, backend, width, world_size):
    assert_ranks_equal_one_process(gloo_pool, name, number, backend, width, world_size)


@pytest.mark.parametrize("width", [5, 23])
def test_compiles_on_ranks(gloo_pool, name, number, width):
    assert_ranks_equal_one_process(gloo_pool, name, number, None, width, 2, compiled=True)
