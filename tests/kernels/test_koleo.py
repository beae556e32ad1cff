"""koleo: every backend against its published formula, alone and in groups."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastssl import functional as F
from fastssl.kernels.koleo import cpp_kernel
from tests.kernels.gram_cases import assert_matches_float64, assert_ranks_equal_one_process
from tests.kernels.util import (
    DTYPES,
    backends_on_ranks,
    compiled_backends,
    device_of,
)

BACKENDS = compiled_backends("koleo")
ALL = ["reference", *BACKENDS]
WORLDS = [1, 2, pytest.param(4, marks=pytest.mark.slow)]
# One row, one column, primes, several tiles of rows, columns and dimensions.
SHAPES = [(1, 7), (2, 1), (3, 5), (13, 7), (67, 131), (131, 67), (257, 3)]


def make_rows(shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape).to(device, dtype)


def loss_and_gradient(x, backend):
    leaf = x.detach().clone().requires_grad_()
    loss = F.koleo(leaf, backend=backend)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def published(x):
    """DINOv2's definition; its eps also stands inside the distance, 1e-8 that does not matter."""
    x = torch.nn.functional.normalize(x, dim=-1)
    dots = x @ x.T
    dots.fill_diagonal_(-1)
    distances = torch.nn.PairwiseDistance(2, eps=1e-8)(x, x[dots.argmax(dim=1)])
    return -torch.log(distances + 1e-8).mean()


def test_is_the_published_definition():
    x = torch.randn(13, 5, dtype=torch.float64, requires_grad=True)
    actual, expected = F.koleo(x), published(x)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    pair = [torch.autograd.grad(value, x)[0] for value in (actual, expected)]
    torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-7)


def test_gradcheck():
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(F.koleo, x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, backend, poisoned_memory):
    assert_matches_float64("koleo", [make_rows(shape, dtype, device_of(backend))], backend)


@pytest.mark.parametrize("shape", [(1031, 384), (512, 1024)], ids=str)
def test_real_sizes(shape):
    assert_matches_float64("koleo", [make_rows(shape)], "cpp")


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    "kind", ["duplicates", "all equal", "zeros", "a zero row", "one", "large", "small"]
)
def test_extreme_inputs_are_finite(kind, backend):
    x = make_rows((6, 4), device=device_of(backend))
    if kind == "duplicates":
        x[1] = x[0]
    elif kind in ("all equal", "zeros"):
        x[:] = 1.0 if kind == "all equal" else 0.0
    elif kind == "a zero row":
        x[2] = 0.0
    elif kind == "one":
        x = x[:1]
    else:
        x *= 1e4 if kind == "large" else 1e-4
    loss, grad = loss_and_gradient(x, backend)
    assert torch.isfinite(loss) and torch.isfinite(grad).all()
    if kind == "one":
        assert loss == 0 and not grad.any()
    if kind in ("all equal", "zeros"):
        torch.testing.assert_close(loss, -torch.tensor(1e-8, device=loss.device).log())
    expected, expected_grad = loss_and_gradient(x.double(), "reference")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    scale = expected_grad.abs().max().item()
    torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_ties_go_to_the_lowest_row(dtype, backend):
    """Signed unit vectors: every product is exact, and most rows have many equal neighbours."""
    generator = torch.Generator().manual_seed(7)
    axes, signs = torch.randint(0, 40, (300,), generator=generator), torch.ones(300)
    signs[torch.rand(300, generator=generator) < 0.5] = -1
    x = torch.zeros(300, 40)
    x[torch.arange(300), axes] = signs
    products = x @ x.T
    products.fill_diagonal_(-torch.inf)
    highest = products.amax(dim=1, keepdim=True)
    lowest = (products == highest).int().argmax(dim=1)
    # Lengths that are powers of 2 keep the unit rows exact.
    x *= 2.0 ** torch.randint(-3, 4, (300, 1), generator=generator)
    x = x.to(device_of(backend), dtype)
    if backend == "reference":
        unit = torch.nn.functional.normalize(x.float(), dim=1)
        distances = (unit - unit[lowest.to(x.device)]).norm(dim=1)
        loss = F.koleo(x, backend=backend)
        torch.testing.assert_close(loss, -(distances + 1e-8).log().mean())
        return
    nearest = torch.ops.fastssl.koleo(x, 1e-8, "", backend)[3]
    assert torch.equal(nearest.cpu(), lowest)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_the_neighbour_of_all(backend):
    x = torch.eye(67, 70) + 0.5
    x[31] = 1.0
    x = x.to(device_of(backend))
    assert (torch.ops.fastssl.koleo(x, 1e-8, "", backend)[3] == 31).sum() == 66
    assert_matches_float64("koleo", [x], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(67, 131), (300, 5)], ids=str)
def test_runs_give_the_same_bits(shape, backend):
    x = make_rows(shape, device=device_of(backend))
    first, second = (loss_and_gradient(x, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_threads_give_the_same_bits():
    x, before, results = make_rows((1100, 19)), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(loss_and_gradient(x, "cpp"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x = make_rows((6, 4), device=device_of(backend)).requires_grad_()
    torch.library.opcheck(torch.ops.fastssl.koleo, (x, 1e-8, "", backend))


@pytest.mark.parametrize("backend", ALL)
def test_compiles_without_a_graph_break(backend):
    def call(x):
        return F.koleo(x, backend=backend)

    x = make_rows((7, 5), device=device_of(backend)).requires_grad_()
    torch.compiler.reset()
    loss, expected = torch.compile(call, fullgraph=True)(x), call(x)
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(value, x)[0] for value in (loss, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", ALL)
def test_autocast_leaves_the_features_alone(backend):
    x = make_rows((9, 17), device=device_of(backend))
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        actual = F.koleo(x, backend=backend)
    torch.testing.assert_close(actual, F.koleo(x, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_features(backend):
    assert_matches_float64("koleo", [make_rows((17, 9), device=device_of(backend)).t()], backend)


class Sizes(TorchDispatchMode):
    """Elements of every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *(x.numel() for x in tensors)])
        return out


@pytest.mark.parametrize("count", [2048, 1024])
def test_products_are_never_stored(count):
    x = make_rows((2048, 8))
    unit, norm = cpp_kernel.normalize(x, 1e-8)
    with Sizes() as sizes:
        cpp_kernel.nearest(x, unit, norm, 0, count)
    assert sizes.largest == torch.get_num_threads() * cpp_kernel.BLOCK**2


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("backend", backends_on_ranks("koleo"))
def test_ranks_equal_one_process(gloo_pool, backend, world_size):
    kwargs = {"mean_of_ranks": True}
    assert_ranks_equal_one_process(gloo_pool, "koleo", 1, backend, 7, world_size, **kwargs)


def test_compiles_on_ranks(gloo_pool):
    kwargs = {"mean_of_ranks": True, "compiled": True}
    assert_ranks_equal_one_process(gloo_pool, "koleo", 1, None, 7, 2, **kwargs)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"x": torch.zeros(4)}, "x must have 2 dimensions, got shape (4,)"),
        ({"x": torch.zeros(0, 4)}, "x must have at least one row and one column, got [0, 4]"),
        ({"eps": 0}, "eps must be positive and finite, got 0"),
        ({"backend": "magic"}, "backend must be one of cpp, triton, reference for koleo"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises((TypeError, ValueError)) as error:
        F.koleo(**{"x": torch.zeros(3, 4), **arguments})
    assert message in str(error.value)
