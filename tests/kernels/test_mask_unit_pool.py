"""mask_unit_pool: every backend against the eager formula, bit for bit, forward and backward.

Nothing is added or rounded, so a backend is right only where it gives the formula's very bits.
"""

import pytest
import torch

from fastssl import functional as F
from fastssl.kernels.mask_unit_pool import reference
from tests.kernels.util import (
    DTYPES,
    assert_close_to_truth,
    compiled_backends,
    device_of,
    gradients,
)

BACKENDS = compiled_backends("mask_unit_pool")
# B, units, unit_size, q_stride, C: primes, ones, whole units, the longest groups, no images, no
# tokens, and the poolings of Hiera-T.
SHAPES = [
    (1, 1, 2, 2, 1),
    (3, 2, 15, 3, 37),
    (2, 5, 7, 7, 13),
    (1, 2, 128, 64, 129),
    (0, 2, 4, 2, 5),
    (2, 0, 4, 2, 5),
    (1, 19, 64, 4, 192),
    (2, 19, 16, 4, 384),
]


def run(shape, backend):
    unit_size, q_stride = shape[2:4]

    def call(x):
        return F.mask_unit_pool(x, unit_size=unit_size, q_stride=q_stride, backend=backend)

    return call


def make_inputs(shape, dtype, device):
    """x and the gradient of the result."""
    B, units, unit_size, q_stride, C = shape
    x = torch.randn(B, units * unit_size, C).to(device, dtype)
    return x, torch.randn(B, units * unit_size // q_stride, C).to(device, dtype)


def assert_same(actual, expected):
    """The same bits, dtype and shape; any NaN equals any other."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    real = ~expected.isnan()
    assert torch.equal(actual.signbit()[real], expected.signbit()[real])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_formula(shape, dtype, backend, poisoned_memory):
    x, grad = make_inputs(shape, dtype, device_of(backend))
    actual, (dx,) = gradients(run(shape, backend), [x], grad)
    eager, (eager_dx,) = gradients(run(shape, "reference"), [x], grad)
    truth, (true_dx,) = gradients(run(shape, "reference"), [x.double()], grad)
    assert_close_to_truth("out", actual, eager, truth, atol=0.0)
    assert_close_to_truth("dx", dx, eager_dx, true_dx, atol=0.0)
    assert_same(actual, eager)
    assert_same(dx, eager_dx)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_formula_written_out(backend):
    shape = (2, 2, 6, 3, 4)
    x, grad = make_inputs(shape, torch.float32, device_of(backend))
    out, (dx,) = gradients(run(shape, backend), [x], grad)
    expected = torch.zeros_like(x)
    for b in range(2):
        for unit in range(2):
            for i in range(2):
                tokens = [6 * unit + 2 * r + i for r in range(3)]
                for c in range(4):
                    winner = max(tokens, key=lambda n: x[b, n, c].item())
                    assert out[b, 2 * unit + i, c] == x[b, winner, c]
                    expected[b, winner, c] = grad[b, 2 * unit + i, c]
    assert_same(dx, expected)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_equals_torch_max_within_units(backend):
    shape = (2, 3, 16, 4, 24)
    x, grad = make_inputs(shape, torch.float32, device_of(backend))
    out, (dx,) = gradients(run(shape, backend), [x], grad)
    expected, (expected_dx,) = gradients(
        lambda x: x.unflatten(1, (-1, 4, 4)).max(2).values.flatten(1, 2), [x], grad
    )
    assert_same(out, expected)
    assert_same(dx, expected_dx)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_maximum_gets_the_gradient(dtype, backend):
    """Columns of four members in one group; the member that must win stands beside each."""
    inf, nan, tiny = float("inf"), float("nan"), torch.finfo(dtype).smallest_normal
    # Triton's interpreter reads subnormal bfloat16 numbers as zeros; compiled kernels do not.
    if backend != "triton" or torch.cuda.is_available():
        tiny /= 4
    columns = [
        ([1, 2, 2, 1], 1),
        ([3, 3, 3, 3], 0),
        ([-2, -1, -1, -3], 1),
        ([-0.0, 0.0, -0.0, 0.0], 0),
        ([-1, 0.0, -0.0, 0.0], 1),
        ([-1, -0.0, 0.0, 0.0], 1),
        ([-tiny, 0.0, tiny, tiny], 2),
        ([-inf, -inf, -inf, -inf], 0),
        ([-inf, torch.finfo(dtype).min, -inf, -inf], 1),
        ([torch.finfo(dtype).max, inf, inf, 1], 1),
        ([1, nan, inf, nan], 1),
        ([nan, 5, nan, inf], 0),
        ([inf, -inf, 0.0, -nan], 3),
    ]
    # 5 copies: vectors and what is left over of them.
    values = torch.tensor([values for values, _ in columns] * 5, dtype=torch.float64)
    winners = torch.tensor([winner for _, winner in columns] * 5, device=device_of(backend))
    # [B = 1, N = 4, C]
    x = values.T[None].to(device_of(backend), dtype)
    grad = torch.arange(1, x.shape[2] + 1, device=x.device).to(dtype)[None, None]
    out, (dx,) = gradients(run((1, 1, 4, 4), backend), [x], grad)
    expected = torch.zeros_like(x[0]).scatter(0, winners[None], grad[0])
    assert_same(out, x.gather(1, winners[None, None]))
    assert_same(dx[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_different_values_of_either_sign(dtype, backend):
    """Ties, zeros of both signs, infinities and NaN at random places."""
    shape = (2, 7, 18, 9, 67)
    values = [-float("inf"), -1.0, -0.0, 0.0, 1.0, float("inf"), float("nan"), -float("nan")]
    table = torch.tensor(values, dtype=dtype, device=device_of(backend))
    # NaN seldom, else every maximum is one.
    weights = torch.tensor([1.0, 1, 1, 1, 0.2, 0.1, 0.1, 0.1])
    x = table[torch.multinomial(weights, 2 * 126 * 67, True).to(table.device)].view(2, 126, 67)
    grad = make_inputs(shape, dtype, x.device)[1]
    actual = gradients(run(shape, backend), [x], grad)
    expected = gradients(run(shape, "reference"), [x], grad)
    assert expected[0].isnan().any() and (expected[0] == 0).any()
    assert_same(actual[0], expected[0])
    assert_same(actual[1][0], expected[1][0])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_without_pooling_x_is_returned(backend):
    x = torch.randn(2, 6, 5, device=device_of(backend))
    assert F.mask_unit_pool(x, unit_size=3, q_stride=1, backend=backend) is x


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_that_are_not_contiguous(backend):
    shape = (3, 2, 8, 4, 10)
    x, grad = make_inputs(shape, torch.float32, device_of(backend))
    strided = x.transpose(0, 2).contiguous().transpose(0, 2)
    expanded = grad[:, :1].expand_as(grad)
    actual, (dx,) = gradients(run(shape, backend), [strided], expanded)
    expected, (expected_dx,) = gradients(run(shape, "reference"), [x], expanded.contiguous())
    assert_same(actual, expected)
    assert_same(dx, expected_dx)


@pytest.mark.parametrize("backend", BACKENDS)
def test_saves_one_byte_per_maximum_and_only_for_a_gradient(backend):
    shape = (2, 3, 8, 4, 16)
    x, _ = make_inputs(shape, torch.bfloat16, device_of(backend))
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        without = run(shape, backend)(x)
        assert saved == [] and not without.requires_grad
        out = run(shape, backend)(x.requires_grad_())
    assert [(t.dtype, t.shape) for t in saved] == [(torch.uint8, out.shape)]
    with torch.no_grad():
        assert_same(run(shape, backend)(x), out)
    assert_same(without, out.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_give_the_same_bits(backend):
    shape = SHAPES[-1]
    x, grad = make_inputs(shape, torch.bfloat16, device_of(backend))
    first, second = (gradients(run(shape, backend), [x], grad) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1][0], second[1][0])


def test_cpp_does_not_depend_on_the_threads():
    """Enough rows for several threads."""
    shape = (4, 19, 64, 4, 192)
    x, grad = make_inputs(shape, torch.bfloat16, "cpu")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(gradients(run(shape, "cpp"), [x], grad))
    finally:
        torch.set_num_threads(before)
    expected = gradients(run(shape, "reference"), [x], grad)
    for out, (dx,) in results:
        assert_same(out, expected[0])
        assert_same(dx, expected[1][0])


def test_reference_gradcheck():
    x = torch.randn(2, 12, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference.mask_unit_pool(x, 6, 3), x)


def test_float64_is_served_by_the_reference():
    x = torch.randn(2, 12, 3, dtype=torch.float64)
    out = F.mask_unit_pool(x, unit_size=6, q_stride=3)
    assert_same(out, reference.mask_unit_pool(x, 6, 3))
    with pytest.raises(ValueError, match="float64 is served by the reference only"):
        F.mask_unit_pool(x, unit_size=6, q_stride=3, backend="cpp")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_opcheck(backend):
    x, grad = make_inputs((2, 3, 6, 3, 5), torch.float32, device_of(backend))
    op = torch.ops.fastssl.mask_unit_pool
    torch.library.opcheck(op, (x, 6, 3, False, backend))
    torch.library.opcheck(op, (x.requires_grad_(), 6, 3, True, backend))
    argmax = reference.argmax(x.detach(), 6, 3)
    torch.library.opcheck(torch.ops.fastssl.mask_unit_pool_backward, (grad, argmax, 6, 3, backend))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_the_registered_op_equals_the_formula(backend):
    """Its reference backend, too, which the public function does not call."""
    x, grad = make_inputs((2, 3, 6, 3, 5), torch.float32, device_of(backend))

    def call(x):
        return torch.ops.fastssl.mask_unit_pool(x, 6, 3, x.requires_grad, backend)[0]

    actual, (dx,) = gradients(call, [x], grad)
    expected, (expected_dx,) = gradients(lambda x: reference.mask_unit_pool(x, 6, 3), [x], grad)
    assert_same(actual, expected)
    assert_same(dx, expected_dx)
    with pytest.raises(ValueError, match="saves must be True where x wants a gradient"):
        torch.ops.fastssl.mask_unit_pool(x.requires_grad_(), 6, 3, False, backend)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_compiles_without_a_graph_break(backend):
    shape = (2, 3, 6, 3, 5)
    x, grad = make_inputs(shape, torch.float32, device_of(backend))
    compiled = torch.compile(run(shape, backend), fullgraph=True)
    actual, expected = (gradients(f, [x], grad) for f in (compiled, run(shape, "reference")))
    assert_same(actual[0], expected[0])
    assert_same(actual[1][0], expected[1][0])


BAD = {
    "x must have 3 dimensions, got shape (4, 8)": {"x": torch.zeros(4, 8)},
    "x must be a Tensor, got list": {"x": [1.0]},
    "x must be float32 or bfloat16 or float16 or float64, got int64": {
        "x": torch.zeros(2, 8, 3, dtype=torch.int64)
    },
    "unit_size must be an int, got float": {"unit_size": 4.0},
    "unit_size must be at least 1, got 0": {"unit_size": 0},
    "x must hold whole units of unit_size = 3 tokens, got 8 tokens": {"unit_size": 3},
    "q_stride must be at least 1 and at most 64, got 0": {"q_stride": 0},
    "q_stride must be at least 1 and at most 64, got 65": {"q_stride": 65},
    "unit_size must be divisible by q_stride = 3, got 4": {"q_stride": 3},
    "backend must be one of cpp, triton, reference for mask_unit_pool, got 'magic'": {
        "backend": "magic"
    },
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    good = {"x": torch.zeros(2, 8, 3), "unit_size": 4, "q_stride": 2}
    F.mask_unit_pool(**good)
    with pytest.raises((TypeError, ValueError)) as error:
        F.mask_unit_pool(**{**good, **BAD[message]})
    assert message in str(error.value)
