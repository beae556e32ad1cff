"""linear: every backend against the float64 formula, forward and backward, under autocast."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastssl import functional as F
from fastssl.kernels.common import products
from fastssl.kernels.linear import reference
from tests.kernels.util import (
    ATOL,
    assert_close_to_truth,
    compiled_backends,
    device_of,
    gradients,
    to_double,
)

BACKENDS = compiled_backends("linear")
HALVES = [torch.bfloat16, torch.float16]
# Leading dimensions, K, N: primes, one of everything, no batch dimension, no rows, either side the
# wider one, and a projection of a Hiera.
SHAPES = [
    ((2, 13), 37, 11),
    ((1,), 1, 1),
    ((), 24, 40),
    ((0, 3), 16, 8),
    ((71,), 129, 200),
    ((3, 64), 96, 288),
]


def make_inputs(shape, device, dtype=torch.float32):
    rows, K, N = shape
    values = torch.randn(*rows, K), torch.randn(N, K) / K**0.5, torch.randn(N)
    return tuple(value.to(device, dtype) for value in values)


def run(backend, autocast=None):
    """F.linear, under autocast to a dtype if any."""

    def call(x, weight, bias=None):
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            return F.linear(x, weight, bias, backend=backend)

    return call


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("parameters", ["float32", "same"])
def test_against_float64(parameters, shape, dtype, backend, poisoned_memory):
    """Parameters in float32 under autocast, and all in one dtype without."""
    own = torch.float32 if parameters == "float32" else dtype
    autocast = dtype if parameters == "float32" else None
    inputs = make_inputs(shape, device_of(backend), own)
    grad = torch.randn(*shape[0], shape[2], device=inputs[0].device)
    actual = gradients(run(backend, autocast), inputs, grad)
    eager = gradients(run("reference", autocast), inputs, grad)
    truth = gradients(run("reference"), [to_double(value) for value in inputs], grad.to(dtype))
    assert actual[0].dtype == dtype
    assert [g.dtype for g in actual[1]] == [own] * 3
    # One element may be lucky in eager, so a unit in the last place is allowed besides.
    atol = max(ATOL[dtype], torch.finfo(dtype).eps)
    assert_close_to_truth("y", actual[0], eager[0], truth[0], atol)
    names = ("dx", "dweight", "dbias")
    for name, *grads in zip(names, actual[1], eager[1], truth[1], strict=True):
        assert_close_to_truth(name, *grads, atol)


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        (torch.float32, "reference"),
        (torch.float64, "reference"),
        *(pytest.param(torch.float32, *b.values, marks=b.marks) for b in BACKENDS),
    ],
)
def test_without_autocast_it_is_torchs(dtype, backend):
    inputs = make_inputs(((5,), 7, 3), device_of(backend), dtype)
    grad = torch.randn(5, 3, device=inputs[0].device)
    actual, expected = (
        gradients(f, inputs, grad) for f in (run(backend), torch.nn.functional.linear)
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_bias_and_only_wanted_gradients(backend):
    x, weight, bias = make_inputs(((6,), 16, 8), device_of(backend))
    call = run(backend, torch.bfloat16)
    expected = torch.nn.functional.linear(x.bfloat16(), weight.bfloat16())
    torch.testing.assert_close(call(x, weight), expected, rtol=2e-2, atol=2e-2)
    both = [x.requires_grad_(), weight.requires_grad_()]
    whole = torch.autograd.grad(call(x, weight).float().sum(), both)
    for leaf, expected in zip(both, whole, strict=True):
        detached = [value if value is leaf else value.detach() for value in both]
        (alone,) = torch.autograd.grad(call(*detached, bias).float().sum(), leaf)
        torch.testing.assert_close(alone, expected, rtol=0, atol=0)
    dbias = torch.autograd.grad(
        call(x.detach(), weight.detach(), bias.requires_grad_()).float().sum(), bias
    )
    torch.testing.assert_close(dbias[0], torch.full_like(bias, 6.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_gradient_is_summed_in_float32(backend):
    """A bfloat16 sum of 4096 ones would stop at 256."""
    device = device_of(backend)
    x = torch.zeros(4096, 8, device=device)
    weight, bias = torch.zeros(4, 8, device=device), torch.zeros(4, device=device)
    bias.requires_grad_()
    run(backend, torch.bfloat16)(x, weight, bias).backward(
        torch.ones(4096, 4, device=device, dtype=torch.bfloat16)
    )
    assert bias.grad.dtype == torch.float32
    assert torch.equal(bias.grad, torch.full_like(bias, 4096.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_under_another_autocast(backend):
    inputs = make_inputs(((9,), 16, 8), device_of(backend))
    grad = torch.randn(9, 8, device=inputs[0].device)
    expected = gradients(run(backend, torch.bfloat16), inputs, grad)[1]
    with torch.autocast(inputs[0].device.type, torch.float16):
        actual = gradients(run(backend, torch.bfloat16), inputs, grad)[1]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_give_the_same_bits(backend):
    inputs = make_inputs(((200,), 64, 96), device_of(backend))
    grad = torch.randn(200, 96, device=inputs[0].device)
    first, second = (gradients(run(backend, torch.bfloat16), inputs, grad) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("columns", [8, 1500])
def test_cpp_column_sums_do_not_depend_on_threads(columns):
    x = torch.randn(1000, columns).bfloat16()
    threads = torch.get_num_threads()
    try:
        sums = []
        for count in (1, 3):
            torch.set_num_threads(count)
            sums.append(products.column_sums(x, "cpp"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*sums)
    torch.testing.assert_close(sums[0], x.float().sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("to", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("source", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (13, 37), (8, 200), (130, 64)], ids=str)
def test_cpp_casts_and_transposes_like_torch(shape, source, to):
    x = torch.randn(shape).to(source)
    out, turned = torch.empty(shape, dtype=to), torch.empty(shape[::-1], dtype=to)
    torch.ops.fastssl_csrc.linear_cast(x, out)
    torch.ops.fastssl_csrc.linear_transpose(x, turned)
    assert torch.equal(out, x.to(to))
    assert torch.equal(turned, x.t().to(to))


def test_reference_gradcheck():
    inputs = [v.requires_grad_() for v in make_inputs(((2, 3), 5, 4), "cpu", torch.float64)]
    torch.autograd.gradcheck(lambda *args: reference.linear(*args, torch.float64), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    device = device_of(backend)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [v.requires_grad_() for v in make_inputs(((2, 5), 8, 6), device, dtype)]
        arguments = (*inputs, torch.bfloat16, backend)
        torch.library.opcheck(torch.ops.fastssl.linear, arguments)
    x, weight, _ = make_inputs(((2, 5), 8, 6), device, torch.bfloat16)
    dy = torch.randn(2, 5, 6, device=device, dtype=torch.bfloat16)
    for dtypes in (
        (torch.float32,) * 3,
        (None, torch.bfloat16, None),
        (torch.bfloat16, None, None),
    ):
        arguments = (dy, x, weight, x.shape, *dtypes, backend)
        torch.library.opcheck(torch.ops.fastssl.linear_backward, arguments)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_compiles_without_a_graph_break(backend):
    inputs = make_inputs(((2, 5), 8, 6), device_of(backend))
    grad = torch.randn(2, 5, 6, device=inputs[0].device)
    compiled = torch.compile(run(backend, torch.bfloat16), fullgraph=True)
    actual = gradients(compiled, inputs, grad)
    expected = gradients(run("reference", torch.bfloat16), inputs, grad)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def test_flops():
    x, weight, bias = (v.requires_grad_() for v in make_inputs(((2, 5), 8, 6), "cpu"))
    with FlopCounterMode(display=False) as counter:
        run("cpp", torch.bfloat16)(x, weight, bias).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 10 * 8 * 6


BAD = {
    "x must be a Tensor, got list": {"x": [1.0]},
    "x must have at least 1 dimension": {"x": torch.zeros(())},
    "x must be float32 or bfloat16 or float16 or float64, got int64": {
        "x": torch.zeros(4, 8, dtype=torch.int64)
    },
    "weight must have shape [N, K] = [any, 8], got [6, 7]": {"weight": torch.zeros(6, 7)},
    "weight must be torch.float32 like x without autocast, got torch.bfloat16": {
        "weight": torch.zeros(6, 8, dtype=torch.bfloat16)
    },
    "bias must have shape [N] = [6], got [8]": {"bias": torch.zeros(8)},
    "backend must be one of cpp, triton, reference": {"backend": "magic"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    good = {"x": torch.zeros(4, 8), "weight": torch.zeros(6, 8)}
    with pytest.raises((TypeError, ValueError)) as error:
        F.linear(**{**good, **BAD[message]})
    assert message in str(error.value)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("rows, width", [(3, 0), (0, 8), (0, 0)])
def test_nothing_to_multiply_leaves_the_bias(rows, width, backend):
    x, weight = torch.randn(rows, width), torch.randn(4, width)
    bias = torch.tensor([1.0, 2.0, 3.0, 4.0])
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, weight, bias, backend=backend)
    assert torch.equal(y, bias.bfloat16().expand(rows, 4))
