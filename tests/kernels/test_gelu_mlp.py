"""gelu_mlp: every backend against the float64 formula, forward and backward."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastssl import functional as F
from fastssl.kernels.common import products
from fastssl.kernels.gelu_mlp import reference
from tests.kernels.util import (
    ATOL,
    DTYPES,
    assert_close_to_truth,
    compiled_backends,
    device_of,
    gradients,
    to_double,
)

BACKENDS = compiled_backends("gelu_mlp")
# Leading dimensions, K, H, N: primes, ones, no batch dimension, no rows, and rows and columns
# beyond a block of either backend.
SHAPES = [
    ((2, 13), 37, 61, 11),
    ((1,), 1, 1, 1),
    ((), 24, 96, 40),
    ((0, 3), 16, 32, 16),
    ((71,), 40, 519, 24),
]
NAMES = ("dx", "dfc1_weight", "dfc1_bias", "dfc2_weight", "dfc2_bias")


def make_inputs(shape, device, dtype=torch.float32):
    rows, K, H, N = shape
    values = (
        torch.randn(*rows, K),
        torch.randn(H, K) / K**0.5,
        torch.randn(H),
        torch.randn(N, H) / H**0.5,
        torch.randn(N),
    )
    return tuple(value.to(device, dtype) for value in values)


def run(backend, autocast=None):
    """F.gelu_mlp, under autocast to a dtype if any."""

    def call(*inputs):
        with torch.autocast(inputs[0].device.type, autocast, enabled=autocast is not None):
            return F.gelu_mlp(*inputs, backend=backend)

    return call


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("parameters", ["float32", "same"])
def test_against_float64(parameters, shape, dtype, backend, poisoned_memory):
    """Parameters in float32 under autocast, and all in one dtype without."""
    own = torch.float32 if parameters == "float32" else dtype
    autocast = dtype if own != dtype else None
    inputs = make_inputs(shape, device_of(backend), own)
    grad = torch.randn(*shape[0], shape[3], device=inputs[0].device)
    actual = gradients(run(backend, autocast), inputs, grad)
    eager = gradients(run("reference", autocast), inputs, grad)
    truth = gradients(run("reference"), [to_double(value) for value in inputs], grad.to(dtype))
    assert actual[0].dtype == dtype
    assert [g.dtype for g in actual[1]] == [own] * 5
    # One element may be lucky in eager, so a unit in the last place is allowed besides.
    atol = max(ATOL[dtype], torch.finfo(dtype).eps)
    assert_close_to_truth("y", actual[0], eager[0], truth[0], atol)
    for name, *grads in zip(NAMES, actual[1], eager[1], truth[1], strict=True):
        assert_close_to_truth(name, *grads, atol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_and_its_slope_over_their_whole_range(dtype, backend):
    """With x of width 1 and weights of 1 the op is GELU itself, and dx its slope."""
    device = device_of(backend)
    x = torch.cat([torch.linspace(-9, 9, 4001), torch.tensor([-1e4, -60.0, 60.0, 1e4])])
    x = x.to(device, dtype)[:, None].requires_grad_()
    one = torch.ones(1, 1, device=device, dtype=dtype)
    y = F.gelu_mlp(x, one, None, one, None, backend=backend)
    y.backward(torch.ones_like(y))
    exact = x.detach().double().requires_grad_()
    expected = torch.nn.functional.gelu(exact)
    expected.sum().backward()
    rounding = torch.finfo(dtype).eps / 2
    # Half a unit in the last place, and what bfloat16's polynomials leave.
    value, slope = (2e-5, 9e-5) if dtype == torch.bfloat16 else (1e-6, 1e-6)
    if backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16:
        rounding *= 2  # the interpreter cuts instead of rounding
    torch.testing.assert_close(y.double(), expected, rtol=rounding, atol=value)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=rounding, atol=slope)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay(dtype, backend):
    device = device_of(backend)
    x = torch.tensor([math.nan, math.inf], device=device, dtype=dtype)[:, None].requires_grad_()
    one = torch.ones(1, 1, device=device, dtype=dtype)
    y = F.gelu_mlp(x, one, None, one, None, backend=backend)
    y.sum().backward()
    assert y[0].isnan() and y[1] == math.inf
    assert x.grad[0].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", range(5))
def test_without_biases_and_only_wanted_gradients(wanted, backend):
    inputs = make_inputs(((6,), 16, 40, 8), device_of(backend))
    call = run(backend, torch.bfloat16)
    leaves = [value.clone().requires_grad_() for value in inputs]
    whole = torch.autograd.grad(call(*leaves).float().sum(), leaves)
    leaf = leaves[wanted]
    detached = [value if value is leaf else value.detach() for value in leaves]
    (alone,) = torch.autograd.grad(call(*detached).float().sum(), leaf)
    torch.testing.assert_close(alone, whole[wanted], rtol=0, atol=0)
    if wanted in (0, 1, 3):
        for value in (detached, leaves):
            value[2] = value[4] = None
        expected = run("reference", torch.bfloat16)(*leaves)
        torch.testing.assert_close(call(*leaves), expected, rtol=2e-2, atol=2e-2)
        (alone,) = torch.autograd.grad(call(*detached).float().sum(), leaf)
        (expected,) = torch.autograd.grad(expected.float().sum(), leaf)
        torch.testing.assert_close(alone, expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_gives_the_same(backend):
    inputs = make_inputs(((2, 5), 16, 40, 8), device_of(backend))
    call = run(backend, torch.bfloat16)
    with_gradients = call(*(value.requires_grad_() for value in inputs))
    with torch.no_grad():
        assert torch.equal(call(*inputs), with_gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_under_autocast_keeps_float32(backend):
    inputs = make_inputs(((9,), 16, 24, 8), device_of(backend))
    grad = torch.randn(9, 8, device=inputs[0].device)
    expected = gradients(run(backend), inputs, grad)[1]
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        actual = gradients(run(backend), inputs, grad)[1]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_give_the_same_bits(dtype, backend):
    inputs = make_inputs(((100,), 16, 300, 24), device_of(backend), dtype)
    grad = torch.randn(100, 24, device=inputs[0].device)
    first, second = (gradients(run(backend), inputs, grad) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_cpp_does_not_depend_on_threads():
    h, grad, bias = torch.randn(1000, 520).bfloat16(), torch.randn(1000, 520), torch.randn(520)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            dh, out = grad.bfloat16(), torch.empty_like(h)
            parts, sums = torch.empty(32, 520), torch.empty(520)
            torch.ops.fastssl_csrc.gelu_mlp_bwd(h, bias, dh, out, parts, sums)
            results.append((dh, out, sums))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_saves_the_hidden_layer_once():
    """h, and nothing else of its size; under autocast the casts of x and, where the products do
    not read the weights as they are, of these."""
    inputs = [v.requires_grad_() for v in make_inputs(((50,), 8, 64, 8), "cpu")]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run("cpp", torch.bfloat16)(*inputs)
    shapes = sorted(tuple(t.shape) for t in saved)
    assert shapes == sorted([(50, 8), (50, 64), (64, 8), (64,), (8, 64)])
    casts = sum(not products.is_operand(w, torch.bfloat16, "cpp") for w in (inputs[1], inputs[3]))
    assert sum(t.dtype == torch.bfloat16 for t in saved) == 2 + casts


def test_reference_gradcheck():
    inputs = [v.requires_grad_() for v in make_inputs(((2, 3), 5, 7, 4), "cpu", torch.float64)]
    torch.autograd.gradcheck(lambda *args: reference.gelu_mlp(*args, torch.float64), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    device = device_of(backend)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [v.requires_grad_() for v in make_inputs(((2, 5), 8, 16, 6), device, dtype)]
        torch.library.opcheck(torch.ops.fastssl.gelu_mlp, (*inputs, torch.bfloat16, True, backend))
    inputs = make_inputs(((2, 5), 8, 16, 6), device, torch.bfloat16)
    x, fc1_weight, fc1_bias, fc2_weight, _ = inputs
    torch.library.opcheck(torch.ops.fastssl.gelu_mlp, (*inputs, torch.bfloat16, False, backend))
    dy = torch.randn(2, 5, 6, device=device, dtype=torch.bfloat16)
    h = torch.randn(10, 16, device=device, dtype=torch.bfloat16)
    for dtypes in ((torch.float32,) * 5, (None, torch.bfloat16, None, None, None)):
        arguments = (dy, x, h, fc1_weight, fc1_bias, fc2_weight, x.shape, *dtypes, backend)
        torch.library.opcheck(torch.ops.fastssl.gelu_mlp_backward, arguments)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_compiles_without_a_graph_break(backend):
    inputs = make_inputs(((2, 5), 8, 16, 6), device_of(backend))
    grad = torch.randn(2, 5, 6, device=inputs[0].device)
    compiled = torch.compile(run(backend, torch.bfloat16), fullgraph=True)
    actual = gradients(compiled, inputs, grad)
    expected = gradients(run("reference", torch.bfloat16), inputs, grad)
    torch.testing.assert_close(actual, expected, rtol=5e-2, atol=5e-2)


def test_flops():
    inputs = [v.requires_grad_() for v in make_inputs(((2, 5), 8, 16, 6), "cpu")]
    with FlopCounterMode(display=False) as counter:
        run("cpp", torch.bfloat16)(*inputs).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 10 * 16 * (8 + 6)


BAD = {
    "x must be a Tensor, got list": {"x": [1.0]},
    "fc1_weight must have shape [N, K] = [any, 8], got [16, 7]": {"fc1_weight": torch.zeros(16, 7)},
    "fc1_bias must have shape [N] = [16], got [8]": {"fc1_bias": torch.zeros(8)},
    "fc2_weight must have shape [N, K] = [any, 16], got [8, 12]": {
        "fc2_weight": torch.zeros(8, 12)
    },
    "fc2_weight must be torch.float32 like x without autocast, got torch.bfloat16": {
        "fc2_weight": torch.zeros(8, 16, dtype=torch.bfloat16)
    },
    "fc2_bias must have shape [N] = [8], got [16]": {"fc2_bias": torch.zeros(16)},
    "backend must be one of cpp, triton, reference": {"backend": "magic"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    good = {
        "x": torch.zeros(4, 8),
        "fc1_weight": torch.zeros(16, 8),
        "fc1_bias": torch.zeros(16),
        "fc2_weight": torch.zeros(8, 16),
        "fc2_bias": torch.zeros(8),
    }
    with pytest.raises((TypeError, ValueError)) as error:
        F.gelu_mlp(**{**good, **BAD[message]})
    assert message in str(error.value)
