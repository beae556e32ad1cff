"""masked_patch_embed: the masked image's convolution at the kept tokens, with its gradients."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastssl import functional as F
from tests.kernels.util import assert_close_to_truth, compiled_backends, device_of, gradients
from tests.masked_convolution import masked_convolution

BACKENDS = ["reference", *compiled_backends("masked_unfold")]
ORDER = tuple(torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist())
# Images, kernel, units kept of all, and the geometry: MAE, Hiera on images and on clips.
CASES = {
    "vit": ((3, 3, 32, 48), (16, 16), 3, 6, {"stride": (16, 16), "padding": (0, 0)}),
    "hiera": (
        (2, 3, 32, 48),
        (7, 7),
        3,
        6,
        {"stride": (4, 4), "padding": (3, 3), "unit_size": (4, 4), "unit_order": ORDER},
    ),
    "hiera video": (
        (2, 3, 4, 32, 16),
        (3, 7, 7),
        2,
        4,
        {"stride": (2, 4, 4), "padding": (1, 3, 3), "unit_size": (1, 4, 4), "unit_order": ORDER},
    ),
}


def make_inputs(name, device="cpu"):
    shape, kernel_size, num_kept, num_units, geometry = CASES[name]
    images, bias = torch.randn(shape), torch.randn(11)
    weight = torch.randn(11, shape[1], *kernel_size) / math.sqrt(shape[1] * math.prod(kernel_size))
    ids = torch.stack([torch.randperm(num_units)[:num_kept] for _ in range(shape[0])]).int()
    return [images.to(device), weight.to(device), bias.to(device)], ids.to(device), geometry


def embed(ids_keep, geometry, backend=None):
    def call(images, weight, bias):
        return F.masked_patch_embed(images, weight, bias, ids_keep, **geometry, backend=backend)

    return call


def convolve(ids_keep, geometry):
    geometry = {"unit_size": (1,) * len(geometry["stride"]), **geometry}

    def call(images, weight, bias):
        return masked_convolution(images, weight, bias, ids_keep, **geometry)

    return call


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_against_the_float64_convolution(name, backend, poisoned_memory):
    inputs, ids_keep, geometry = make_inputs(name, device_of(backend))
    convolution = convolve(ids_keep, geometry)
    eager_out = convolution(*inputs)
    grad = torch.randn_like(eager_out)
    actual = gradients(embed(ids_keep, geometry, backend), inputs, grad)
    eager = gradients(convolution, inputs, grad)
    truth = gradients(convolution, [value.double() for value in inputs], grad)
    assert_close_to_truth("out", actual[0], eager[0], truth[0])
    names = ("dimages", "dweight", "dbias")
    for label, *grads in zip(names, actual[1], eager[1], truth[1], strict=True):
        assert_close_to_truth(label, *grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_bf16_autocast(name, backend):
    inputs, ids_keep, geometry = make_inputs(name, device_of(backend))
    grad = torch.randn_like(convolve(ids_keep, geometry)(*inputs))

    def under_autocast(function):
        def call(*args):
            with torch.autocast(inputs[0].device.type, torch.bfloat16):
                return function(*args)

        return call

    out, grads = gradients(under_autocast(embed(ids_keep, geometry, backend)), inputs, grad)
    eager = gradients(under_autocast(convolve(ids_keep, geometry)), inputs, grad)
    doubles = [value.double() for value in inputs]
    truth = gradients(convolve(ids_keep, geometry), doubles, grad.bfloat16().double())
    assert out.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in grads)
    assert_close_to_truth("out", out, eager[0], truth[0])
    names = ("dimages", "dweight", "dbias")
    for label, *values in zip(names, grads, eager[1], truth[1], strict=True):
        assert_close_to_truth(label, *values, atol=2**-8)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_a_graph_break(autocast):
    inputs, ids_keep, geometry = make_inputs("hiera")
    grad = torch.randn(2, 48, 11)

    def step(images, weight, bias):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return F.masked_patch_embed(images, weight, bias, ids_keep, **geometry)

    compiled = gradients(torch.compile(step, fullgraph=True), inputs, grad)
    eager = gradients(step, inputs, grad)
    assert compiled[0].dtype == (torch.bfloat16 if autocast else torch.float32)
    torch.testing.assert_close(compiled, eager)


def test_dtypes_without_autocast():
    """The product runs in the weight's dtype; float64 weights keep theirs even under autocast."""
    (images, weight, bias), ids_keep, geometry = make_inputs("hiera")
    call = embed(ids_keep, geometry)
    out = call(images, weight.bfloat16(), bias.bfloat16())
    expected = call(images.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    assert call(images.bfloat16(), weight, bias).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        out = call(images, weight.double(), bias.double())
    assert torch.equal(out, call(images.double(), weight.double(), bias.double()))


def test_without_bias():
    (images, weight, bias), ids_keep, geometry = make_inputs("vit")
    call = embed(ids_keep, geometry)
    with_bias = call(images, weight, bias)
    torch.testing.assert_close(call(images, weight, None) + bias, with_bias)


def test_only_visible_patches_are_multiplied():
    inputs, ids_keep, geometry = make_inputs("vit")
    with FlopCounterMode(display=False) as counter:
        embed(ids_keep, geometry)(*inputs)
    assert counter.get_total_flops() == 2 * (3 * 3) * (3 * 16 * 16) * 11


def test_saves_nothing_but_the_patches_for_the_weight():
    (images, weight, bias), ids_keep, geometry = make_inputs("hiera")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        embed(ids_keep, geometry)(images, weight.requires_grad_(), bias)
    assert [tuple(t.shape) for t in saved if t.is_floating_point()] == [(2 * 48, 147)]


BAD = {
    "images must have 4 or 5 dimensions, got shape (3, 32, 48)": {"images": torch.zeros(3, 32, 48)},
    "weight must have 4 dimensions, got shape (11, 3, 1, 7, 7)": {
        "weight": torch.zeros(11, 3, 1, 7, 7)
    },
    "weight must have shape [D, C, *kernel_size] = [any, 3, 7, 7], got [11, 4, 7, 7]": {
        "weight": torch.zeros(11, 4, 7, 7)
    },
    "bias must have shape [D] = [11], got [12]": {"bias": torch.zeros(12)},
    "bias must be a Tensor, got float": {"bias": 0.0},
    "ids_keep must have shape [B, K] = [2, any]": {"ids_keep": torch.zeros(1, 3).int()},
    "the grid of tokens must be divisible by unit_size = 5 x 5, got 8 x 12": {"unit_size": 5},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    (images, weight, bias), ids_keep, geometry = make_inputs("hiera")
    good = {"images": images, "weight": weight, "bias": bias, "ids_keep": ids_keep, **geometry}
    with pytest.raises((TypeError, ValueError)) as error:
        F.masked_patch_embed(**{**good, **BAD[message]})
    assert message in str(error.value)
