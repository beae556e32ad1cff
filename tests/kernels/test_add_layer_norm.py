"""add_layer_norm: every backend against the float64 formula, forward and backward."""

import pytest
import torch
from torch.nn import functional as nnF
from torch.utils.flop_counter import FlopCounterMode

from fastssl import functional as F
from fastssl.kernels.add_layer_norm import op, reference
from tests.kernels.util import (
    DTYPES,
    assert_close_to_truth,
    compiled_backends,
    device_of,
    to_double,
)

BACKENDS = compiled_backends("add_layer_norm")
# Ones, primes, neither a whole vector nor a whole block, and one value past a power of two.
SHAPES = [(1, 1, 1), (3, 5, 7), (2, 13, 37), (5, 129), (2, 3, 4, 33), (7, 11, 257)]
# Widths of Hiera, ViT and their decoders; more rows than one chunk of column sums.
REAL = [
    (4, 40, 96),
    (2, 25, 192),
    (2, 5, 384),
    (2, 50, 768),
    (3, 7, 512),
    (2, 5, 144),
    (2, 3, 1152),
]
# branch, gamma, scale; which of dresidual and dnormed come.
FORMS = {
    "all": (True, True, True, True, True),
    "gamma": (True, True, False, True, True),
    "scale": (True, False, True, True, True),
    "add": (True, False, False, True, True),
    "add, normed unused": (True, False, False, True, False),
    "all, normed unused": (True, True, True, True, False),
    "all, residual unused": (True, True, True, False, True),
    "norm": (False, False, False, True, True),
    "norm, residual unused": (False, False, False, False, True),
}
NAMES = ("x", "branch", "weight", "bias", "gamma")


def make_inputs(shape, dtype, device, form="all", branch_dtype=None):
    """x, branch, weight, bias, gamma, scale, and the gradients of both results."""
    has_branch, has_gamma, has_scale, *comes = FORMS[form]
    B, D = shape[0], shape[-1]
    x, branch, *grads = (torch.randn(shape).to(device, dtype) for _ in range(4))
    weight, bias, gamma = (torch.randn(D).to(device, dtype) for _ in range(3))
    scale = (torch.arange(B) % 3 > 0).to(device, torch.float32) / 0.75
    branch = branch.to(branch_dtype or dtype) if has_branch else None
    inputs = (x, branch, weight, bias, gamma if has_gamma else None, scale if has_scale else None)
    return inputs, [grad if want else None for grad, want in zip(grads, comes, strict=True)]


def run(inputs, grads, backend, function=F.add_layer_norm, **settings):
    """Outputs and the gradients of all but scale by name, None where there is no path."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs[:5]]
    x, branch, weight, bias, gamma = leaves
    results = function(
        x, branch, weight, bias, gamma=gamma, scale=inputs[5], backend=backend, **settings
    )
    pairs = [(out, g.to(out.dtype)) for out, g in zip(results, grads, strict=True) if g is not None]
    wanted = [leaf for leaf in leaves if leaf is not None]
    outputs, coming = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, coming, allow_unused=True))
    return results, {
        name: None if leaf is None else next(found)
        for name, leaf in zip(NAMES, leaves, strict=True)
    }


def assert_all_close_to_truth(inputs, grads, backend, atol=None, **settings):
    double = [to_double(t) for t in inputs]
    doubles = [to_double(g) for g in grads]
    actual = run(inputs, grads, backend, **settings)
    eager = run(inputs, grads, "reference", **settings)
    truth = run(double, doubles, "reference")
    for i, name in enumerate(("residual", "normed")):
        assert actual[0][i].dtype == eager[0][i].dtype
        assert_close_to_truth(name, actual[0][i], eager[0][i], truth[0][i], atol)
    for name in NAMES:
        found = [results[1][name] for results in (actual, eager, truth)]
        assert (found[0] is None) == (found[1] is None), f"d{name}"
        if found[0] is not None:
            assert found[0].dtype == found[1].dtype
            assert_close_to_truth(f"d{name}", *found, atol)
    return actual


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + REAL, ids=str)
def test_against_float64(shape, dtype, backend, poisoned_memory):
    # A single column has no variance, and 1 / sqrt(eps) = 1000 multiplies the products' rounding.
    atol = 1e-4 if shape[-1] == 1 and dtype == torch.float32 else None
    inputs, grads = make_inputs(shape, dtype, device_of(backend))
    assert_all_close_to_truth(inputs, grads, backend, atol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forms_against_float64(dtype, form, backend, poisoned_memory):
    assert_all_close_to_truth(*make_inputs((3, 17, 72), dtype, device_of(backend), form), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["all", "add", "norm"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_float32_stream_with_half_branches(half, form, backend, poisoned_memory):
    """As under autocast: float32 x, half branch, half normed."""
    inputs, grads = make_inputs((3, 17, 96), torch.float32, device_of(backend), form, half)
    results, found = assert_all_close_to_truth(inputs, grads, backend, dtype=half)
    assert results[0].dtype == torch.float32 and results[1].dtype == half
    assert found["x"].dtype == torch.float32
    if inputs[1] is not None:
        assert found["branch"].dtype == half


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_stream_with_a_wider_branch(backend):
    """The residual takes the wider dtype, x its gradient in its own."""
    device = device_of(backend)
    for x_dtype, branch_dtype in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
    ):
        inputs, grads = make_inputs((2, 5, 24), x_dtype, device, "all", branch_dtype)
        results, found = assert_all_close_to_truth(inputs, grads, backend, dtype=torch.float32)
        assert results[0].dtype == torch.float32
        assert (found["x"].dtype, found["branch"].dtype) == (x_dtype, branch_dtype)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_formula_written_out(backend):
    (x, branch, weight, bias, gamma, scale), _ = make_inputs(
        (3, 4, 6), torch.float32, device_of(backend)
    )
    residual, normed = F.add_layer_norm(
        x, branch, weight, bias, 0.25, gamma=gamma, scale=scale, backend=backend
    )
    for b in range(3):
        for n in range(4):
            row = x[b, n] + branch[b, n] * gamma * scale[b]
            torch.testing.assert_close(residual[b, n], row)
            centered = row - row.mean()
            std = (centered.square().mean() + 0.25).sqrt()
            torch.testing.assert_close(normed[b, n], centered / std * weight + bias)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_without_a_branch_residual_is_x(backend):
    (x, _, weight, bias, *_), _ = make_inputs((3, 4, 6), torch.float32, device_of(backend))
    residual, normed = F.add_layer_norm(x, None, weight, bias, backend=backend)
    assert residual is x
    torch.testing.assert_close(normed, nnF.layer_norm(x, (6,), weight, bias, 1e-6))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_autocast_gives_its_dtype(backend):
    device = device_of(backend)
    (x, branch, weight, bias, *_), _ = make_inputs((2, 3, 40), torch.float32, device, "add")
    with torch.autocast(device.type, torch.bfloat16):
        results = F.add_layer_norm(x, branch.bfloat16(), weight, bias, backend=backend)
        wide = F.add_layer_norm(x, None, weight, bias, dtype=torch.float32, backend=backend)
    assert results[0].dtype == torch.float32 and results[1].dtype == torch.bfloat16
    assert wide[1].dtype == torch.float32
    eager = x + branch.bfloat16()
    torch.testing.assert_close(results[0], eager)
    eager = nnF.layer_norm(eager, (40,), weight, bias, 1e-6).bfloat16()
    torch.testing.assert_close(results[1], eager, rtol=2**-7, atol=1e-6)
    plain = F.add_layer_norm(x, branch.bfloat16(), weight, bias, backend=backend)
    assert plain[1].dtype == torch.float32


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_rows_without_variance(backend):
    """A constant row is normalised to zeros, and its gradient stays finite."""
    inputs, grads = make_inputs((2, 4, 48), torch.float32, device_of(backend), "add")
    x, branch, weight, bias, *_ = inputs
    x[0], branch[0] = 3.0, 0.0
    results, found = run(inputs, grads, backend)
    torch.testing.assert_close(results[1][0], bias.expand(4, 48))
    g = grads[1][0] * weight
    expected = grads[0][0] + (g - g.mean(-1, keepdim=True)) * 1e3
    torch.testing.assert_close(found["x"][0], expected, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mean", [1e4, -3e6])
def test_a_large_mean_costs_no_variance(mean, backend):
    """E[x^2] - E[x]^2 would lose every digit; values of x are exact multiples of 2^-2."""
    (x, _, weight, bias, *_), grads = make_inputs(
        (2, 8, 192), torch.float32, device_of(backend), "norm"
    )
    x = (x * 16).round() / 4 + mean
    assert_all_close_to_truth((x, None, weight, bias, None, None), grads, backend, atol=1e-5)
    normed = F.add_layer_norm(x, None, weight, bias, backend=backend)[1]
    truth = nnF.layer_norm(x.double(), (192,), weight.double(), bias.double(), 1e-6)
    # The mean itself is known to half a unit in its last place.
    resolution = abs(mean) * 2**-24 / x.double().std(-1).min().item()
    error = ((normed - truth) / weight.double()).abs().max().item()
    assert error <= 2 * resolution + 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_samples_pass_through(backend):
    inputs, grads = make_inputs((3, 5, 40), torch.float32, device_of(backend))
    results, found = run(inputs, grads, backend)
    assert inputs[5][0] == 0
    assert torch.equal(results[0][0], inputs[0][0])
    assert (found["branch"][0] == 0).all() and (found["branch"][1] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_wanted_gradients(backend):
    (x, branch, weight, bias, gamma, scale), grads = make_inputs(
        (2, 40, 24), torch.float32, device_of(backend)
    )
    tensors = {"x": x, "branch": branch, "weight": weight, "bias": bias, "gamma": gamma}
    full = run((*tensors.values(), scale), grads, backend)[1]
    for name, tensor in tensors.items():
        leaf = tensor.clone().requires_grad_()
        results = F.add_layer_norm(**{**tensors, name: leaf}, scale=scale, backend=backend)
        needed = [(out, g) for out, g in zip(results, grads, strict=True) if out.requires_grad]
        outputs, coming = zip(*needed, strict=True)
        (found,) = torch.autograd.grad(outputs, [leaf], coming)
        torch.testing.assert_close(found, full[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_saved(backend):
    """The branch is kept for gamma's gradient alone, and nothing of its size is copied."""
    inputs, _ = make_inputs((2, 40, 24), torch.float32, device_of(backend))
    x, branch, weight, bias, gamma, scale = (t.clone().requires_grad_() for t in inputs)
    scale = scale.detach()
    for wants_gamma in (False, True):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            residual, _ = F.add_layer_norm(
                x,
                branch,
                weight,
                bias,
                gamma=gamma if wants_gamma else gamma.detach(),
                scale=scale,
                backend=backend,
            )
        large = {t.data_ptr() for t in saved if t.numel() == x.numel()}
        assert large == {residual.data_ptr(), *([branch.data_ptr()] if wants_gamma else [])}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_scale_takes_the_reference(backend):
    inputs, _ = make_inputs((2, 3, 8), torch.float32, device_of(backend))
    x, branch, weight, bias, gamma, scale = inputs
    scale = scale.clone().requires_grad_()
    residual, _ = F.add_layer_norm(x, branch, weight, bias, gamma=gamma, scale=scale)
    residual.sum().backward()
    torch.testing.assert_close(scale.grad, (branch * gamma).sum((1, 2)))
    with pytest.raises(ValueError, match="scale requires a gradient"):
        F.add_layer_norm(x, branch, weight, bias, gamma=gamma, scale=scale, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_empty_batches(backend):
    device = device_of(backend)
    inputs, grads = make_inputs((2, 6, 24), torch.float32, device)
    expected = run(inputs, grads, backend)
    strided = [torch.stack([t, t], -1)[..., 0] for t in inputs]
    actual = run(strided, [g.transpose(0, 1).contiguous().transpose(0, 1) for g in grads], backend)
    assert all(torch.equal(a, b) for a, b in zip(actual[0], expected[0], strict=True))
    assert all(torch.equal(actual[1][name], expected[1][name]) for name in NAMES)
    inputs, grads = make_inputs((0, 6, 24), torch.float32, device)
    results, found = run(inputs, grads, backend)
    assert results[0].shape == results[1].shape == found["branch"].shape == (0, 6, 24)
    assert all((found[name] == 0).all() for name in ("weight", "bias", "gamma"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_give_the_same_bits(backend):
    inputs, grads = make_inputs((5, 41, 96), torch.float32, device_of(backend))
    first, second = (run(inputs, grads, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert all(torch.equal(first[1][name], second[1][name]) for name in NAMES)


def test_the_number_of_threads_does_not_change_a_bit():
    """More rows than the chunks' number times their least size, so that chunks grow."""
    rows = op.CHUNK_ROWS * op.MAX_CHUNKS // 8 + 5
    inputs, grads = make_inputs((8, rows, 20), torch.float32, "cpu")
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(run(inputs, grads, "cpp"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][0], other[0], strict=True))
        assert all(torch.equal(results[0][1][name], other[1][name]) for name in NAMES)
    truth = run([to_double(t) for t in inputs], [to_double(g) for g in grads], "reference")[1]
    for name in NAMES[2:]:
        error = (results[0][1][name] - truth[name]).abs().max() / truth[name].abs().max()
        assert error < 1e-6, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_beside_the_results_is_written(backend):
    """Rows that end in the middle of a vector: their neighbours, written earlier, stay right."""
    inputs, grads = make_inputs((1, 64, 19), torch.float32, device_of(backend))
    whole = run(inputs, grads, backend)
    alone = run(
        [t[:, 7:8] if t is not None and t.dim() == 3 else t for t in inputs],
        [g[:, 7:8] for g in grads],
        backend,
    )
    for a, b in zip(whole[0], alone[0], strict=True):
        assert torch.equal(a[:, 7:8], b)
    assert torch.equal(whole[1]["branch"][:, 7:8], alone[1]["branch"])


@pytest.mark.parametrize("form", ["all", "add", "norm"])
def test_reference_gradcheck(form):
    inputs, _ = make_inputs((2, 3, 5), torch.float64, "cpu", form)
    tensors = [None if t is None else t.double().requires_grad_() for t in inputs]
    present = [t for t in tensors if t is not None]

    def call(*given):
        given = iter(given)
        full = [None if t is None else next(given) for t in tensors]
        return reference.add_layer_norm(*full, 1e-2, torch.float64)

    torch.autograd.gradcheck(call, present)
    torch.autograd.gradgradcheck(call, present)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("form", ["all", "add", "norm, residual unused"])
def test_opcheck(form, backend):
    inputs, grads = make_inputs((2, 3, 24), torch.float32, device_of(backend), form)
    x, branch, weight, bias, gamma, scale = inputs
    for tensor in (x, branch, weight, bias, gamma):
        if tensor is not None:
            tensor.requires_grad_()
    args = (*inputs, 1e-6, torch.bfloat16, backend)
    torch.library.opcheck(torch.ops.fastssl.add_layer_norm, args)
    if backend != "reference":
        with torch.no_grad():
            residual, normed, stats = torch.ops.fastssl.add_layer_norm(*args)
        residual = x.detach() if branch is None else residual
        args = (grads[0], grads[1].to(normed.dtype), residual, stats, weight.detach())
        args = (*args, None if gamma is None else branch.detach())
        args = (*args, None if gamma is None else gamma.detach(), scale)
        args = (*args, None if branch is None else branch.dtype, form != "add", backend)
        torch.library.opcheck(torch.ops.fastssl.add_layer_norm_backward, args)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("form", FORMS)
def test_compiles_without_a_graph_break(form, backend):
    inputs, grads = make_inputs((2, 3, 24), torch.float32, device_of(backend), form)
    torch.compiler.reset()
    compiled = torch.compile(F.add_layer_norm, fullgraph=True)
    results, found = run(inputs, grads, backend, compiled)
    expected, gradients = run(inputs, grads, "reference")
    torch.testing.assert_close(results, expected)
    for name in NAMES:
        # AOT autograd gives zeros where there is no path.
        if gradients[name] is None:
            assert found[name] is None or (found[name] == 0).all()
        else:
            torch.testing.assert_close(found[name], gradients[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_under_autocast(backend):
    device = device_of(backend)
    inputs, grads = make_inputs((2, 3, 24), torch.float32, device, "add", torch.bfloat16)

    def call(*args, **kwargs):
        with torch.autocast(device.type, torch.bfloat16):
            return F.add_layer_norm(*args, **kwargs)

    actual = run(inputs, grads, backend, torch.compile(call, fullgraph=True))
    expected = run(inputs, grads, backend, call)
    assert actual[0][1].dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected)


def test_counts_no_flops():
    inputs, grads = make_inputs((2, 3, 24), torch.float32, "cpu")
    with FlopCounterMode(display=False) as counter:
        run(inputs, grads, "cpp")
    assert counter.get_total_flops() == 0


def test_float64_takes_the_reference():
    inputs, grads = make_inputs((2, 3, 24), torch.float64, "cpu")
    results, _ = run(inputs, grads, None)
    assert results[1].dtype == torch.float64
    with pytest.raises(ValueError, match="float64 is served by the reference only"):
        run(inputs, grads, "cpp")


def test_triton_refuses_rows_that_no_program_holds():
    D = op.MAX_TRITON_COLUMNS + 1
    with pytest.raises(ValueError, match=f"D is {D}, a program holds at most {D - 1}"):
        F.add_layer_norm(torch.zeros(1, D), None, torch.ones(D), torch.zeros(D), backend="triton")


BAD = {
    "x must be a Tensor, got list": {"x": [1.0]},
    "x must be float32 or bfloat16": {"x": torch.zeros(2, 4, 8, dtype=torch.int32)},
    "x must have shape [B, ..., D] with D at least 1, got [2, 0]": {"x": torch.zeros(2, 0)},
    "branch must have shape as x = [2, 4, 8], got [2, 1, 8]": {"branch": torch.zeros(2, 1, 8)},
    "branch must be a Tensor, got float": {"branch": 1.0},
    "weight must be a Tensor, got NoneType": {"weight": None},
    "weight must have shape [D] = [8], got [7]": {"weight": torch.zeros(7)},
    "bias must have 1 dimensions": {"bias": torch.zeros(1, 8)},
    "gamma must have shape [D] = [8], got [4]": {"gamma": torch.zeros(4)},
    "scale must have shape [B] = [2], got [4]": {"scale": torch.zeros(4)},
    "scale must have 1 dimensions, got shape (2, 1, 1)": {"scale": torch.zeros(2, 1, 1)},
    "scale needs x of shape [B, ..., D], got [8]": {
        "x": torch.zeros(8),
        "branch": torch.zeros(8),
        "scale": torch.zeros(8),
    },
    "gamma must be None where branch is None": {"branch": None, "gamma": torch.zeros(8)},
    "scale must be None where branch is None": {"branch": None, "scale": torch.zeros(2)},
    "eps must be a float, got str": {"eps": "1e-6"},
    "eps must be at least 0, got -1": {"eps": -1},
    "dtype must be a floating-point dtype or None, got torch.int32": {"dtype": torch.int32},
    "backend must be one of cpp, triton, reference": {"backend": "magic"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    good = {
        "x": torch.zeros(2, 4, 8),
        "branch": torch.zeros(2, 4, 8),
        "weight": torch.ones(8),
        "bias": torch.zeros(8),
    }
    with pytest.raises((TypeError, ValueError)) as error:
        F.add_layer_norm(**{**good, **BAD[message]})
    assert message in str(error.value)
