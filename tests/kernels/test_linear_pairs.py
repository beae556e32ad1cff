"""The CPU library's own products of bfloat16 pairs, under linear and gelu_mlp: against float64,
with parts of panels, blocks and turns in every dimension."""

import resource
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastssl import functional as F
from fastssl.kernels.common import libraries, products
from tests.kernels.util import gradients

pytestmark = pytest.mark.skipif(
    libraries.bf16_unit() == "none", reason="needs a processor with AVX-512 BF16"
)
CSRC = torch.ops.fastssl_csrc
# M, N, K: a row, less and more than a block of rows; whole and broken panels; a depth of several
# turns; rows enough for several parts and chunks, also of a narrow weight's gradient; no rows.
SHAPES = [
    *((1, 2, 2), (13, 30, 34), (15, 32, 64), (29, 66, 100), (97, 288, 96), (33, 144, 1602)),
    *((1100, 34, 38), (400, 96, 770), (65, 1538, 48), (0, 32, 64), (517, 20, 900)),
]
# Weights whose gradient is summed in parts of the rows: whole lines stored past the caches and
# not, the least rows and one less, most parts with a last row of its own, most columns and more.
NARROW = [
    *((2083, 70, 129), (1024, 64, 96), (1023, 64, 96), (8193, 5, 32)),
    *((1031, 512, 320), (1031, 512, 352)),
]
TYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def operands(shape, weight_dtype):
    M, N, K = shape
    torch.manual_seed(sum(shape))
    x, dy = torch.randn(M, K).bfloat16(), torch.randn(M, N).bfloat16()
    return x, dy, torch.randn(N, K).to(weight_dtype), torch.randn(N)


def product(x, weight, transposed, bias, threads, dtype):
    columns = weight.shape[1 if transposed else 0]
    # What is not written stays a NaN, and what is written past the end is seen.
    out = torch.full((x.shape[0] * columns + 64,), torch.nan, dtype=dtype)
    inside = out[: x.shape[0] * columns].view(x.shape[0], columns)
    CSRC.linear_product(x, weight, transposed, bias, threads, inside)
    assert out[inside.numel() :].isnan().all()
    return inside


def assert_close(actual, expected, dtype):
    """Within the rounding of the result and of a sum in float32."""
    eps = torch.finfo(torch.float32).eps * 64
    eps += torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    scale = expected.abs().max().clamp_min(1.0) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected, rtol=eps, atol=float(eps * scale))


@pytest.mark.parametrize("out_dtype", TYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_against_float64(shape, weight_dtype, out_dtype, threads):
    x, dy, weight, bias = operands(shape, weight_dtype)
    rounded = weight.bfloat16().double()
    for with_bias in (None, bias):
        expected = x.double() @ rounded.t() + (0 if with_bias is None else bias.double())
        assert_close(product(x, weight, False, with_bias, threads, out_dtype), expected, out_dtype)
    actual = product(dy, weight, True, None, threads, out_dtype)
    assert_close(actual, dy.double() @ rounded, out_dtype)


@pytest.mark.parametrize("out_dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [*SHAPES, *NARROW, (31, 7, 3), (5, 1, 1), (385, 33, 130)], ids=str
)
def test_weight_gradient_against_float64(shape, out_dtype, threads):
    x, dy, weight, _ = operands(shape, out_dtype)
    for wants_sums in (True, False):
        parts, sums = products.new_parts(dy), torch.full(weight.shape[:1], torch.nan)
        wanted = (parts.fill_(torch.nan), sums) if wants_sums else (None, None)
        out = torch.full((weight.numel() + 64,), torch.nan, dtype=out_dtype)
        dweight = out[: weight.numel()].view_as(weight)
        CSRC.linear_weight_gradient(dy, x, *wanted, threads, dweight)
        assert out[weight.numel() :].isnan().all()
        assert_close(dweight, dy.double().t() @ x.double(), out_dtype)
        if wants_sums:
            assert_close(sums, dy.double().sum(0), torch.float32)


@pytest.mark.parametrize(
    "shape", [(400, 96, 770), (2083, 70, 130), (97, 288, 96), (8193, 64, 64)], ids=str
)
def test_results_do_not_depend_on_threads(shape):
    x, dy, weight, bias = operands(shape, torch.float32)
    results = []
    for threads in (1, 2, 5, 40):
        dweight, sums = torch.empty_like(weight), torch.empty_like(bias)
        CSRC.linear_weight_gradient(dy, x, products.new_parts(dy), sums, threads, dweight)
        results.append(
            (
                product(x, weight, False, bias, threads, torch.bfloat16),
                product(dy, weight, True, None, threads, torch.float32),
                dweight,
                sums,
            )
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_calls_from_several_threads_at_once():
    """Each has scratch memory of its own, which grows and shrinks with the sizes of its calls."""
    sizes = [(1100, 34, 38), (97, 288, 96), (2083, 70, 130), (33, 144, 1602)]
    tensors_of = {shape: operands(shape, torch.float32)[:3] for shape in sizes}
    begin = threading.Barrier(4)

    def call(shape):
        x, dy, weight = tensors_of[shape]
        dweight = torch.empty_like(weight)
        CSRC.linear_weight_gradient(dy, x, None, None, 2, dweight)
        return product(x, weight, False, None, 2, torch.float32), dweight

    expected = {shape: call(shape) for shape in sizes}

    def agrees(first):
        begin.wait(60)
        shapes = (sizes[first:] + sizes[:first]) * 100
        return all(all(map(torch.equal, call(shape), expected[shape])) for shape in shapes)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(agrees, range(4)))


def test_scratch_memory_is_kept_from_call_to_call():
    """Also beside calls that take more than is kept."""
    shapes = {"small": (4096, 768, 768), "large": (24576, 768, 768)}
    tensors_of = {name: operands(shape, torch.float32)[:3] for name, shape in shapes.items()}
    outputs = {name: torch.zeros_like(weight) for name, (_, _, weight) in tensors_of.items()}

    def faults(name):
        x, dy, _ = tensors_of[name]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        CSRC.linear_weight_gradient(dy, x, None, None, 1, outputs[name])
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults("small")
    for name in ("small", "large", "small"):
        found = faults(name)
        # 12 MB of fresh memory are 6 faults in huge pages, 3,000 in small ones.
        assert name == "large" or found < 5


def test_non_finite_values_stay_in_their_rows_and_columns():
    x, _, weight, _ = operands((30, 34, 66), torch.float32)
    x[3, 65], weight[33, 0] = torch.inf, torch.nan
    y = product(x, weight, False, None, 2, torch.bfloat16)
    broken = torch.zeros(30, 34, dtype=torch.bool)
    broken[3], broken[:, 33] = True, True
    assert torch.equal(~y.isfinite(), broken)


def test_bad_operands_are_refused():
    x, dy, weight, bias = operands((4, 6, 8), torch.float32)
    out = torch.empty(4, 6)
    bad = {
        "x must be bfloat16": (x.float(), weight, False, bias, 1, out),
        "weight must be float32 or bfloat16": (x, weight.half(), False, bias, 1, out),
        "even number of columns": (x[:, :7].contiguous(), weight, False, bias, 1, out),
        "do not fit": (x, weight, True, None, 1, out),
        "bias must have a float32 value per column": (x, weight, False, bias[:5], 1, out),
        "bias must have a float32": (x, weight, False, bias.half(), 1, out),
        "bias must be contiguous": (x, weight, False, torch.zeros(12)[::2], 1, out),
    }
    for message, arguments in bad.items():
        with pytest.raises(RuntimeError, match=message):
            CSRC.linear_product(*arguments)
    with pytest.raises(RuntimeError, match="do not fit"):
        CSRC.linear_weight_gradient(dy, x, None, None, 1, torch.empty(8, 6))


@pytest.mark.parametrize("kind", ["linear", "gelu_mlp"])
def test_strided_biases_and_inputs_of_another_half(kind, layers):
    """A float16 x under bfloat16 autocast gets a float16 gradient."""
    torch.manual_seed(0)
    weights = torch.randn(32, 16), torch.randn(16, 32)
    biases = torch.randn(64)[::2], torch.randn(1).expand(16)
    x, num_layers = torch.randn(9, 16).half(), 1 if kind == "linear" else 2
    parameters = [p for pair in zip(weights, biases, strict=True) for p in pair][: 2 * num_layers]
    grad = torch.randn(9, 32 if kind == "linear" else 16)
    own, torchs = (layers(unit, x, parameters, grad) for unit in ("dots", "tiles"))
    assert own[1][0].dtype == torch.float16
    for ours, theirs in zip((own[0], *own[1]), (torchs[0], *torchs[1]), strict=True):
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert ours.dtype == theirs.dtype and error < 1e-2


@pytest.fixture
def layers(monkeypatch):
    """F.linear and F.gelu_mlp's gradients, the library's products or torch's."""

    def run(unit, x, parameters, grad):
        monkeypatch.setattr(libraries, "bf16_unit", lambda: unit)
        with torch.autocast("cpu", torch.bfloat16):
            if len(parameters) == 2:
                return gradients(lambda *a: F.linear(*a, backend="cpp"), (x, *parameters), grad)
            return gradients(lambda *a: F.gelu_mlp(*a, backend="cpp"), (x, *parameters), grad)

    return run


@pytest.mark.parametrize("shape", [(50, 96, 64), (50, 98, 33)], ids=str)
@pytest.mark.parametrize("kind", ["linear", "gelu_mlp"])
def test_both_ways_of_multiplying_agree(kind, shape, layers):
    """torch's products serve processors with AMX, and layers of odd widths."""
    M, N, K = shape
    torch.manual_seed(0)
    parameters = [torch.randn(N, K) / K**0.5, torch.randn(N)]
    if kind == "gelu_mlp":
        parameters += [torch.randn(K, N) / N**0.5, torch.randn(K)]
    x, grad = torch.randn(M, K), torch.randn(M, K if kind == "gelu_mlp" else N)
    own, torchs = (layers(unit, x, parameters, grad) for unit in ("dots", "tiles"))
    for ours, theirs in zip((own[0], *own[1]), (torchs[0], *torchs[1]), strict=True):
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert ours.dtype == theirs.dtype and error < 1e-2


def test_weights_are_saved_as_they_are_and_their_gradient_is_not_rounded(layers):
    M, N, K = 64, 96, 128
    torch.manual_seed(0)
    x, weight, grad = torch.randn(M, K).bfloat16(), torch.randn(N, K), torch.randn(M, N).bfloat16()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, (_, dweight, _) = layers("dots", x, [weight, torch.randn(N)], grad)
    assert sorted((tuple(t.shape), t.dtype) for t in saved) == sorted(
        [((M, K), torch.bfloat16), ((N, K), torch.float32)], key=str
    )
    exact = grad.double().t() @ x.double()
    assert (dweight.double() - exact).norm() / exact.norm() < 1e-6
