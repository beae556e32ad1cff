"""masked_patch_mse: every backend against the float64 formula, forward and backward."""

import pytest
import torch
from torch import Tensor

from fastssl import functional as F
from fastssl.kernels.masked_patch_mse import reference
from tests.kernels.util import (
    DTYPES,
    assert_close_to_truth,
    compiled_backends,
    device_of,
    gradients,
    to_double,
)

BACKENDS = compiled_backends("masked_patch_mse")
# Images [B, C, *S] and patch size: one pixel, primes, other numbers of channels, ViT-B, ViT-H,
# Hiera's image, mae_st's and Hiera's clips.
CASES = [
    ((1, 2, 1, 1), (1, 1)),
    ((3, 3, 10, 21), (5, 7)),
    ((2, 5, 6, 9), (2, 3)),
    ((2, 1, 8, 8), (4, 4)),
    ((2, 3, 64, 32), (16, 16)),
    ((1, 3, 28, 42), (14, 14)),
    ((1, 3, 32, 32), (32, 32)),
    ((1, 3, 4, 32, 32), (2, 16, 16)),
    ((1, 3, 2, 16, 24), (1, 8, 8)),
]


def make_inputs(shape, patch_size, dtype=torch.float32, device="cpu", image_dtype=torch.float32):
    images = (torch.randn(shape) * 2 + 1).to(device, image_dtype)
    rows = reference.patchify(images, patch_size, "hwc")
    pred = torch.randn(rows.shape).to(device, dtype)
    # Every kind of weight, and at least one token in the loss.
    mask = torch.randint(0, 2, rows.shape[:2]).float() * torch.rand(rows.shape[:2])
    mask[0, 0] = 0.5
    return pred, images, mask.to(device)


def run(patch_size, backend, norm=True, layout="hwc"):
    def call(pred: Tensor, images: Tensor, mask: Tensor) -> Tensor:
        return F.masked_patch_mse(
            pred,
            images,
            mask,
            patch_size=patch_size,
            norm_pix_loss=norm,
            patch_layout=layout,
            backend=backend,
        )

    return call


def pred_gradients(function, inputs, scale=1.5):
    """The loss and [dpred]; images and mask are constants."""
    pred, images, mask = inputs
    grad = torch.tensor(scale, device=pred.device)
    return gradients(lambda pred: function(pred, images, mask), [pred], grad)


def assert_right(inputs, patch_size, backend, norm, layout):
    actual = pred_gradients(run(patch_size, backend, norm, layout), inputs)
    eager = pred_gradients(run(patch_size, "reference", norm, layout), inputs)
    truth = pred_gradients(
        run(patch_size, "reference", norm, layout), [to_double(value) for value in inputs]
    )
    assert actual[0].dtype == torch.float32
    assert actual[1][0].dtype == inputs[0].dtype
    assert_close_to_truth("loss", actual[0], eager[0], truth[0])
    assert_close_to_truth("dpred", actual[1][0], eager[1][0], truth[1][0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["hwc", "chw"])
@pytest.mark.parametrize("norm", [False, True], ids=["pixels", "norm"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, norm, layout, dtype, backend, poisoned_memory):
    inputs = make_inputs(*case, dtype, device_of(backend))
    assert_right(inputs, case[1], backend, norm, layout)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("image_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_images_of_another_dtype(backend, image_dtype):
    case = ((2, 3, 10, 15), (5, 5))
    inputs = make_inputs(*case, torch.float32, device_of(backend), image_dtype)
    assert_right(inputs, case[1], backend, True, "hwc")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("norm", [False, True], ids=["pixels", "norm"])
@pytest.mark.parametrize("layout", ["hwc", "chw"])
def test_formula_written_out(backend, norm, layout):
    """A clip, token by token and value by value."""
    pred, clips, mask = make_inputs((2, 3, 4, 4, 6), (2, 2, 3), device=device_of(backend))
    expected = 0.0
    for b in range(2):
        for n in range(8):
            t, h, w = n // 4 * 2, n // 2 % 2 * 2, n % 2 * 3
            patch = clips[b, :, t : t + 2, h : h + 2, w : w + 3]
            values = []
            if layout == "hwc":
                for frame in range(2):
                    for y in range(2):
                        for x in range(3):
                            values += patch[:, frame, y, x].tolist()
            else:
                values = patch.flatten().tolist()
            target = torch.tensor(values, dtype=torch.float64)
            if norm:
                target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6).sqrt()
            expected += mask[b, n].item() * (pred[b, n].cpu().double() - target).square().mean()
    loss = run((2, 2, 3), backend, norm, layout)(pred, clips, mask)
    expected = (expected / mask.cpu().double().sum()).float()
    torch.testing.assert_close(loss.cpu(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["hwc", "chw"])
@pytest.mark.parametrize("view", ["every second frame", "channels last", "flipped axes", "cropped"])
def test_images_with_any_strides(backend, layout, view):
    patch_size = (1, 4, 4)
    shape = {"every second frame": (2, 3, 4, 8, 12)}.get(view, (2, 3, 2, 8, 12))
    clips = torch.randn(shape, device=device_of(backend))
    if view == "every second frame":
        images = clips[:, :, ::2]
    elif view == "channels last":
        images = clips.to(memory_format=torch.channels_last_3d)
    elif view == "flipped axes":
        images = clips.transpose(3, 4).contiguous().transpose(3, 4)
    else:
        images = torch.nn.functional.pad(clips, (1, 2, 3, 1))[..., 3:11, 1:13]
    assert not images.is_contiguous()
    pred, _, mask = make_inputs(images.shape, patch_size, device=images.device)
    actual = pred_gradients(run(patch_size, backend, True, layout), (pred, images, mask))
    expected = pred_gradients(
        run(patch_size, backend, True, layout), (pred, images.contiguous(), mask)
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_predictions_with_any_strides(backend):
    """A decoder's output without its class token is a view, and is read where it lies."""
    pred, images, mask = make_inputs((2, 3, 8, 8), (4, 4), device=device_of(backend))
    with_class_token = torch.cat([torch.full_like(pred[:, :1], torch.nan), pred], dim=1)
    expected = pred_gradients(run(4, backend), (pred, images, mask))
    actual = pred_gradients(run(4, backend), (with_class_token[:, 1:], images, mask))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    columns_apart = pred.transpose(1, 2).contiguous().transpose(1, 2)
    actual = pred_gradients(run(4, backend), (columns_apart, images, mask))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_constant_patches(backend):
    """Variance 0: the target is 0, not NaN."""
    pred, images, mask = make_inputs((2, 3, 8, 8), (4, 4), device=device_of(backend))
    images = torch.full_like(images, 0.1)
    loss, (dpred,) = pred_gradients(run(4, backend), (pred, images, mask), scale=1.0)
    expected = (pred.square().mean(-1) * mask).sum() / mask.sum()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    weight = 2 * mask.unsqueeze(-1) / (mask.sum() * pred.shape[2])
    torch.testing.assert_close(dpred, pred * weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_offset_keeps_the_variance(backend):
    """At 1e4 plus noise, E[x^2] - E[x]^2 in float32 would lose every digit of the variance."""
    pred, images, mask = make_inputs((2, 3, 32, 32), (16, 16), device=device_of(backend))
    images = images + 1e4
    assert_right((pred, images, mask), (16, 16), backend, True, "hwc")
    truth = run(16, "reference")(pred.double(), images.double(), mask.double())
    loss = run(16, backend)(pred, images, mask)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("norm", [False, True], ids=["pixels", "norm"])
def test_an_empty_mask_gives_zeros(backend, norm, poisoned_memory):
    pred, images, mask = make_inputs((2, 3, 8, 8), (4, 4), device=device_of(backend))
    loss, (dpred,) = pred_gradients(run(4, backend, norm), (pred, images, torch.zeros_like(mask)))
    assert loss.item() == 0
    assert torch.equal(dpred, torch.zeros_like(pred))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_gives_zero(backend):
    inputs = (torch.zeros(0, 4, 48), torch.zeros(0, 3, 8, 8), torch.zeros(0, 4))
    inputs = [value.to(device_of(backend)) for value in inputs]
    loss, (dpred,) = pred_gradients(run(4, backend), inputs)
    assert loss.item() == 0
    assert dpred.shape == (0, 4, 48)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_outside_the_loss_are_not_read(backend, poisoned_memory):
    pred, images, _ = make_inputs((1, 3, 8, 8), (4, 4), device=device_of(backend))
    mask = torch.tensor([[1, 0, 1, 1]], device=pred.device)
    expected = pred_gradients(run(4, backend), (pred, images, mask))
    pred[0, 1] = torch.nan
    images[..., :4, 4:] = torch.nan
    actual = pred_gradients(run(4, backend), (pred, images, mask))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16], ids=str)
def test_mask_dtypes(backend, dtype):
    pred, images, mask = make_inputs((2, 3, 8, 8), (4, 4), device=device_of(backend))
    mask = mask != 0
    expected = run(4, "reference")(pred, images, mask.float())
    torch.testing.assert_close(run(4, backend)(pred, images, mask.to(dtype)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_give_the_same_bits(backend):
    inputs = make_inputs((4, 3, 64, 64), (16, 16), torch.bfloat16, device_of(backend))
    first, second = (pred_gradients(run(16, backend), inputs) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1][0], second[1][0])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_cpp_bits_do_not_depend_on_threads(threads):
    inputs = make_inputs((5, 3, 64, 64), (16, 16))
    before = torch.get_num_threads()
    expected = pred_gradients(run(16, "cpp"), inputs)
    try:
        torch.set_num_threads(threads)
        actual = pred_gradients(run(16, "cpp"), inputs)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1][0], expected[1][0])


@pytest.mark.parametrize("layout", ["hwc", "chw"])
def test_reference_gradcheck(layout):
    pred, images, mask = make_inputs((2, 2, 4, 6), (2, 3))
    floats = [pred.double().requires_grad_(), images.double().requires_grad_()]
    torch.autograd.gradcheck(
        lambda pred, images: reference.masked_patch_mse(pred, images, mask, (2, 3), True, layout),
        floats,
    )


def test_images_that_require_a_gradient_go_to_the_reference():
    pred, images, mask = make_inputs((2, 3, 8, 8), (4, 4))
    images.requires_grad_()
    with pytest.raises(ValueError, match="images require a gradient"):
        run(4, "cpp")(pred, images, mask)
    loss = run(4, None)(pred, images, mask)
    expected = reference.masked_patch_mse(pred, images, mask, (4, 4), True, "hwc")
    assert torch.equal(loss, expected)
    actual, wanted = (torch.autograd.grad(value, images)[0] for value in (loss, expected))
    assert torch.equal(actual, wanted)
    assert wanted.abs().max() > 0
    with torch.no_grad():
        torch.testing.assert_close(run(4, "cpp")(pred, images, mask), expected)


def test_float64_is_computed_in_float64():
    pred, images, mask = make_inputs((2, 3, 8, 8), (4, 4))
    loss = run(4, None)(pred.double(), images, mask)
    assert loss.dtype == torch.float64


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_autocast_leaves_the_statistics_alone(backend):
    pred, images, mask = make_inputs((2, 3, 8, 8), (4, 4), torch.bfloat16, device_of(backend))
    expected = pred_gradients(run(4, backend), (pred, images, mask))
    with torch.autocast(pred.device.type, torch.bfloat16):
        actual = pred_gradients(run(4, backend), (pred, images, mask))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("norm", [False, True], ids=["pixels", "norm"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_opcheck(backend, norm):
    pred, images, mask = make_inputs((2, 3, 1, 8, 8), (1, 4, 4), device=device_of(backend))
    arguments = ((1, 4, 4), norm, "hwc", backend)
    # The public function loads the library that the op's backend lives in.
    run(4, backend, norm)(pred, images[:, :, 0], mask)
    args = (pred.requires_grad_(), images, mask, *arguments)
    torch.library.opcheck(torch.ops.fastssl.masked_patch_mse, args)
    if backend != "reference":
        _, stats, inv_total = torch.ops.fastssl.masked_patch_mse(*args)
        args = (torch.ones((), device=pred.device), pred.detach(), images, mask, stats, inv_total)
        torch.library.opcheck(torch.ops.fastssl.masked_patch_mse_backward, (*args, *arguments))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_compiles_without_a_graph_break(backend):
    inputs = make_inputs((2, 3, 8, 8), (4, 4), device=device_of(backend))
    compiled = torch.compile(run(4, backend), fullgraph=True)
    actual, expected = (pred_gradients(f, inputs) for f in (compiled, run(4, "reference")))
    torch.testing.assert_close(actual, expected)


BAD = {
    "pred must have 3 dimensions, got shape (4, 48)": {"pred": torch.zeros(4, 48)},
    "pred must have shape [B, N, p] = [2, 4, 48], got [2, 4, 47]": {"pred": torch.zeros(2, 4, 47)},
    "pred must have shape [B, N, p] = [2, 4, 48], got [2, 5, 48]": {"pred": torch.zeros(2, 5, 48)},
    "images must have 4 or 5 dimensions": {"images": torch.zeros(3, 8, 8)},
    "images must be float32": {"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)},
    "images must have a spatial size divisible by patch_size (3, 3), got (8, 8)": {"patch_size": 3},
    "patch_size must be at least 1 in each of 2 dimensions, got (4, 4, 4)": {
        "patch_size": (4, 4, 4)
    },
    "patch_size must be at least 1 in each of 2 dimensions, got 0": {"patch_size": 0},
    "patch_size must be an int or a sequence of ints, got (4.0, 4)": {"patch_size": (4.0, 4)},
    "patch_size must be an int or a sequence of ints, got 4.0": {"patch_size": 4.0},
    "mask must have shape [B, N] = [2, 4], got [2, 3]": {"mask": torch.zeros(2, 3)},
    "mask must be a Tensor, got NoneType": {"mask": None},
    "patch_layout must be 'hwc' or 'chw', got 'cwh'": {"patch_layout": "cwh"},
    "norm_pix_loss needs at least 2 values per patch": {
        "pred": torch.zeros(2, 4, 1),
        "images": torch.zeros(2, 1, 2, 2),
        "patch_size": 1,
        "norm_pix_loss": True,
    },
    "backend must be one of cpp, triton, reference": {"backend": "magic"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    good = {
        "pred": torch.zeros(2, 4, 48),
        "images": torch.zeros(2, 3, 8, 8),
        "mask": torch.ones(2, 4),
        "patch_size": 4,
    }
    with pytest.raises((TypeError, ValueError)) as error:
        F.masked_patch_mse(**{**good, **BAD[message]})
    assert message in str(error.value)
