"""masked_unfold: every backend against the formula and the masked convolution."""

import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastssl import functional as F
from fastssl.kernels.common.dispatch import OPS
from fastssl.kernels.masked_unfold import reference
from tests.kernels.util import (
    DTYPES,
    assert_close_to_truth,
    compiled_backends,
    device_of,
    gradients,
    to_double,
)
from tests.masked_convolution import masked_convolution, pixel_mask, unit_grid

BACKENDS = compiled_backends("masked_unfold")


@dataclass(frozen=True)
class Case:
    """Images [B, C, *S], the convolution and its mask units, and how many of them are kept."""

    shape: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    unit_size: tuple[int, ...]
    num_kept: int
    order: tuple[int, ...] | None = field(default=None)

    @property
    def geometry(self) -> dict:
        names = ("kernel_size", "stride", "padding", "unit_size")
        return {name: getattr(self, name) for name in names} | {"unit_order": self.order}

    def make_ids(self, index_dtype=torch.int32) -> torch.Tensor:
        num_units = math.prod(unit_grid(torch.empty(self.shape), *list(self.geometry.values())[:4]))
        rows = [torch.randperm(num_units)[: self.num_kept] for _ in range(self.shape[0])]
        return torch.stack(rows).to(index_dtype)


def shuffled(num_tokens: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(num_tokens)
    return tuple(torch.randperm(num_tokens, generator=generator).tolist())


CASES = {
    "patches": Case((3, 3, 16, 24), (8, 8), (8, 8), (0, 0), (1, 1), 2),
    "hiera": Case((2, 3, 32, 48), (7, 7), (4, 4), (3, 3), (4, 4), 3, shuffled(16)),
    "clip": Case((2, 3, 4, 16, 16), (3, 7, 7), (2, 4, 4), (1, 3, 3), (1, 2, 2), 4, shuffled(4)),
    "patches of clips": Case((2, 1, 4, 12, 8), (2, 4, 4), (2, 4, 4), (0, 0, 0), (1, 1, 1), 5),
    "all kept": Case((2, 3, 16, 16), (7, 7), (4, 4), (3, 3), (2, 2), 4),
    "nothing kept": Case((2, 3, 16, 16), (7, 7), (4, 4), (3, 3), (2, 2), 0),
    "gaps between windows": Case((1, 5, 17, 13), (3, 2), (5, 4), (1, 1), (1, 1), 7),
    "pixels left over": Case((2, 2, 19, 23), (7, 7), (4, 4), (0, 2), (2, 1), 5, (1, 0)),
    "one pixel": Case((1, 1, 1, 1), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "one unit": Case((2, 3, 11, 7), (5, 3), (2, 1), (2, 1), (6, 7), 1, shuffled(42)),
}
# The real geometries, on as few tokens as show every one of them.
REAL_CASES = {
    "vit_b_16": Case((2, 3, 224, 224), (16, 16), (16, 16), (0, 0), (1, 1), 49),
    "hiera": Case((1, 3, 224, 224), (7, 7), (4, 4), (3, 3), (8, 8), 7, shuffled(64)),
    "hiera video": Case(
        (1, 3, 16, 64, 64), (3, 7, 7), (2, 4, 4), (1, 3, 3), (1, 8, 8), 3, shuffled(64)
    ),
}


def run(case, ids_keep, backend, dtype=None):
    def call(images):
        ids = ids_keep.to(images.device)
        return F.masked_unfold(images, ids, **case.geometry, dtype=dtype, backend=backend)

    return call


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, dtype, backend, poisoned_memory):
    case = CASES[name]
    images, ids_keep = torch.randn(case.shape).to(device_of(backend), dtype), case.make_ids()
    eager_out = run(case, ids_keep, "reference")(images)
    grad = torch.randn(eager_out.shape, device=images.device)
    actual = gradients(run(case, ids_keep, backend), [images], grad)
    eager = gradients(run(case, ids_keep, "reference"), [images], grad)
    # The gradient as the op sees it: rounded to the dtype of the patches.
    grad = grad.to(dtype).double()
    truth = gradients(run(case, ids_keep, "reference"), [to_double(images)], grad)
    assert actual[0].dtype == dtype and torch.equal(actual[0], eager_out)
    assert_close_to_truth("dimages", actual[1][0], eager[1][0], truth[1][0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REAL_CASES)
def test_real_sizes(name, backend, poisoned_memory):
    case = REAL_CASES[name]
    images, ids_keep = torch.randn(case.shape, device=device_of(backend)), case.make_ids()
    out = run(case, ids_keep, backend)(images)
    assert torch.equal(out, run(case, ids_keep, "reference")(images))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_formula_written_out(backend):
    case = Case((2, 2, 12, 8), (3, 5), (2, 2), (1, 2), (3, 2), 2, (1, 5, 2, 0, 4, 3))
    images = torch.arange(1.0, 2 * 2 * 12 * 8 + 1).view(case.shape)
    ids_keep = torch.tensor([[3, 0], [1, 2]])
    out = run(case, ids_keep, backend)(images.to(device_of(backend)))
    expected = torch.zeros(2, 2 * 6, 2 * 3 * 5)
    rows = itertools.product(range(2), range(2), range(6), range(2), range(3), range(5))
    for b, i, j, c, qy, qx in rows:
        unit, local = int(ids_keep[b, i]), case.order[j]
        y = (unit // 2 * 3 + local // 2) * 2 - 1 + qy
        x = (unit % 2 * 2 + local % 2) * 2 - 2 + qx
        if 0 <= y < 12 and 0 <= x < 8 and y // 6 * 2 + x // 4 in ids_keep[b]:
            expected[b, i * 6 + j, (c * 3 + qy) * 5 + qx] = images[b, c, y, x]
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("name", CASES)
def test_product_is_the_masked_convolution(name, backend):
    case = CASES[name]
    images, ids_keep = torch.randn(case.shape), case.make_ids()
    weight = torch.randn(4, case.shape[1], *case.kernel_size)
    patches = run(case, ids_keep, backend)(images.to(device_of(backend)))
    geometry = {k: v for k, v in case.geometry.items() if k != "kernel_size"}
    conv = masked_convolution(images.double(), weight.double(), None, ids_keep, **geometry)
    product = patches.cpu().double() @ weight.flatten(1).double().T
    torch.testing.assert_close(product, conv, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", itertools.permutations(DTYPES, 2), ids=str)
def test_converts_in_the_same_pass(dtypes, backend):
    source, target = dtypes
    case = CASES["hiera"]
    images, ids_keep = torch.randn(case.shape).to(device_of(backend), source), case.make_ids()
    grad = torch.ones(2, 48, 147, device=images.device)
    out, (dimages,) = gradients(run(case, ids_keep, backend, target), [images], grad)
    expected = run(case, ids_keep, "reference")(images).to(target)
    assert out.dtype == target and dimages.dtype == source
    # The interpreter cuts float32 to bfloat16 where a GPU rounds.
    rtol = 2**-7 if backend == "triton" and target == torch.bfloat16 else 0
    torch.testing.assert_close(out, expected, rtol=rtol, atol=0)


def sliced(shape):
    larger = torch.randn(shape[0] + 1, shape[1] + 1, *(2 * size + 1 for size in shape[2:]))
    return larger[(slice(1, None), slice(1, None), *(slice(1, None, 2) for _ in shape[2:]))]


LAYOUTS = {
    "sliced": sliced,
    "channels last": lambda shape: torch.randn(shape).to(
        memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    ),
    "transposed": lambda shape: torch.randn(*shape[:-2], shape[-1], shape[-2]).mT,
    "one image for all": lambda shape: torch.randn(shape)[:1].expand(shape),
    "channels apart": lambda shape: torch.randn(shape[1], shape[0], *shape[2:]).transpose(0, 1),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["patches", "hiera", "clip"])
def test_reads_any_strides(name, layout, backend):
    case = CASES[name]
    images, ids_keep = LAYOUTS[layout](case.shape), case.make_ids()
    assert images.shape == case.shape
    out = run(case, ids_keep, backend)(images.to(device_of(backend)))
    assert torch.equal(out.cpu(), run(case, ids_keep, "reference")(images.contiguous()))


def test_strided_images_are_not_copied():
    case = CASES["hiera"]
    images, ids_keep = sliced(case.shape), case.make_ids()
    with torch.profiler.profile() as profile:
        run(case, ids_keep, "cpp")(images)
    names = {event.name for event in profile.events()}
    assert "fastssl::masked_unfold" in names
    assert not names & {"aten::copy_", "aten::clone", "aten::contiguous"}


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_dropped_pixels_are_never_seen(backend):
    """Not even a NaN times zero."""
    case = CASES["hiera"]
    images, ids_keep = torch.randn(case.shape), case.make_ids()
    units = unit_grid(images, case.kernel_size, case.stride, case.padding, case.unit_size)
    mask = pixel_mask(images, ids_keep, units, case.stride, case.unit_size)
    poisoned = torch.where(mask.bool(), images, torch.nan).to(device_of(backend))
    grad = torch.ones(2, 48, 147, device=poisoned.device)
    out, (dimages,) = gradients(run(case, ids_keep, backend), [poisoned], grad)
    assert torch.equal(out.cpu(), run(case, ids_keep, "reference")(images))
    assert (dimages[~mask.bool().expand_as(dimages)] == 0).all()
    assert (dimages[mask.bool().expand_as(dimages)] > 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_scalars_and_int64_ids(backend):
    case = CASES["patches"]
    images, ids_keep = (
        torch.randn(case.shape, device=device_of(backend)),
        case.make_ids(torch.int64),
    )
    out = F.masked_unfold(
        images, ids_keep.to(images.device), kernel_size=8, stride=[8, 8], backend=backend
    )
    assert torch.equal(out, run(case, ids_keep, "reference")(images))


@pytest.mark.parametrize("backend", BACKENDS)
def test_saves_nothing_but_the_ids(backend):
    case = CASES["hiera"]
    images = torch.randn(case.shape, device=device_of(backend), requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(case, case.make_ids(), backend)(images)
    assert sorted((t.dtype, tuple(t.shape)) for t in saved) == [
        (torch.int32, (2, 3)),
        (torch.int32, (16,)),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_give_the_same_bits(backend):
    case = CASES["hiera"]
    images, ids_keep = torch.randn(case.shape, device=device_of(backend)), case.make_ids()
    grad = torch.randn(2, 48, 147, device=images.device)
    first, second = (gradients(run(case, ids_keep, backend), [images], grad) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1][0], second[1][0])


def test_threads_give_the_same_bits():
    case = REAL_CASES["hiera"]
    images, ids_keep = torch.randn(case.shape), case.make_ids()
    grad = torch.randn(1, 7 * 64, 147)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients(run(case, ids_keep, "cpp"), [images], grad))
    finally:
        torch.set_num_threads(before)
    for out, (dimages,) in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(dimages, results[0][1][0])


@pytest.mark.parametrize("name", ["patches", "hiera", "clip", "pixels left over"])
def test_reference_gradcheck(name):
    case = CASES[name]
    ids_keep = case.make_ids()
    images = torch.randn(case.shape, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(run(case, ids_keep, "reference"), images, fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_opcheck(backend):
    device = device_of(backend)
    ids_keep = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32, device=device)
    order = torch.tensor([2, 0, 3, 1], dtype=torch.int32, device=device)
    images = torch.randn(2, 3, 1, 17, 16, device=device)[:, :, :, 1:].requires_grad_()
    geometry = ((1, 7, 7), (1, 4, 4), (0, 3, 3), (1, 2, 2))
    # Below the public function nothing loads the CPU library.
    assert OPS["masked_unfold"].reasons(images, ids_keep, torch.float32)[backend] is None
    args = (images, ids_keep, order, *geometry, torch.float32, backend)
    torch.library.opcheck(torch.ops.fastssl.masked_unfold, args)
    if backend != "reference":
        dout = torch.randn(2, 8, 147, device=device)
        args = (dout, ids_keep, order, (3, 1, 16, 16), *geometry, torch.float32, backend)
        torch.library.opcheck(torch.ops.fastssl.masked_unfold_backward, args)


class Unfold(torch.nn.Module):
    """The geometry as a model holds it; ints of a closure would become symbols where sizes do."""

    def __init__(self, case, backend):
        super().__init__()
        self.geometry, self.backend = case.geometry, backend

    def forward(self, images, ids_keep):
        return F.masked_unfold(images, ids_keep, **self.geometry, backend=self.backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic, backend):
    case = CASES["hiera"]
    images, ids_keep = torch.randn(case.shape, device=device_of(backend)), case.make_ids()
    grad = torch.randn(2, 48, 147, device=images.device)
    inputs = [images, ids_keep.to(images.device)]
    compiled = torch.compile(Unfold(case, backend), fullgraph=True, dynamic=dynamic)
    actual = gradients(compiled, inputs, grad)
    torch.testing.assert_close(actual, gradients(Unfold(case, "reference"), inputs, grad))


def test_reference_compiles_without_a_graph_break():
    case = CASES["patches"]
    images, ids_keep = torch.randn(case.shape), case.make_ids()
    grad = torch.randn(3, 2, 192)
    compiled = torch.compile(Unfold(case, "reference"), fullgraph=True, backend="aot_eager")
    actual = gradients(compiled, [images, ids_keep], grad)
    torch.testing.assert_close(
        actual, gradients(Unfold(case, "reference"), [images, ids_keep], grad)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_made_under_another_mode_serves_training(backend):
    """The order's tensor is kept for the process: a fake or an inference tensor must not be."""
    case = Case((1, 1, 12, 4), (4, 4), (4, 4), (0, 0), (3, 1), 1, (2, 0, 1))
    ids_keep = case.make_ids()
    with FakeTensorMode():
        fake = torch.empty(case.shape, device=device_of(backend))
        ids = torch.zeros(1, 1, dtype=torch.int32, device=fake.device)
        assert F.masked_unfold(fake, ids, **case.geometry, backend=backend).shape == (1, 3, 16)
    images = torch.randn(case.shape, device=device_of(backend))
    with torch.inference_mode():
        expected = run(case, ids_keep, backend)(images)
    out, (dimages,) = gradients(run(case, ids_keep, backend), [images], torch.ones_like(expected))
    assert torch.equal(out, expected) and torch.equal(dimages, torch.ones_like(images))


def test_float64_is_for_the_reference():
    case = CASES["patches"]
    images, ids_keep = torch.randn(case.shape), case.make_ids()
    assert run(case, ids_keep, None, torch.float64)(images).dtype == torch.float64
    with pytest.raises(ValueError, match="float64 patches are served by the reference only"):
        run(case, ids_keep, "cpp", torch.float64)(images)


@pytest.mark.parametrize("unit", [-1, 6])
def test_cpp_refuses_units_that_do_not_exist(unit):
    case = CASES["patches"]
    ids_keep = torch.full((3, 2), unit, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=rf"ids_keep must be in \[0, 6\), got {unit}"):
        run(case, ids_keep, "cpp")(torch.zeros(case.shape))


BAD = {
    "images must have 4 or 5 dimensions, got shape (2, 3, 16)": {"images": torch.zeros(2, 3, 16)},
    "images must be float32 or bfloat16 or float16 or float64, got uint8": {
        "images": torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    },
    "images must be at least 1 x 3 (kernel_size - 2 * padding), got 0 x 16": {
        "images": torch.zeros(2, 3, 0, 16),
        "kernel_size": (7, 9),
    },
    "the grid of tokens must be divisible by unit_size = 2 x 2, got 4 x 5 tokens from images of "
    "16 x 17": {"images": torch.zeros(2, 3, 16, 17)},
    "ids_keep must be a Tensor, got list": {"ids_keep": [[0], [1]]},
    "ids_keep must be int32 or int64, got float32": {"ids_keep": torch.zeros(2, 1)},
    "ids_keep must have shape [B, K] = [2, any], got [3, 1]": {
        "ids_keep": torch.zeros(3, 1, dtype=torch.int32)
    },
    "ids_keep must name at most the 4 units of an image, got 5 per row": {
        "ids_keep": torch.zeros(2, 5, dtype=torch.int32)
    },
    "kernel_size must be an int or 2 ints, got (7, 7, 7)": {"kernel_size": (7, 7, 7)},
    "kernel_size must be at least 1, got 0": {"kernel_size": (7, 0)},
    "stride must be an int, got float": {"stride": 4.0},
    "padding must be at least 0, got -1": {"padding": -1},
    "unit_size must be at least 1, got 0": {"unit_size": 0},
    "unit_order must be a tuple of ints, got str": {"unit_order": "0123"},
    "unit_order must be a permutation of range(4), got (0, 1, 2, 2)": {"unit_order": (0, 1, 2, 2)},
    "dtype must be float32 or bfloat16 or float16 or float64 or None, got torch.int32": {
        "dtype": torch.int32
    },
    "backend must be one of cpp, triton, reference": {"backend": "magic"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    good = {
        "images": torch.zeros(2, 3, 16, 16),
        "ids_keep": torch.zeros(2, 1, dtype=torch.int32),
        "kernel_size": 7,
        "stride": 4,
        "padding": 3,
        "unit_size": 2,
    }
    F.masked_unfold(**good)
    with pytest.raises((TypeError, ValueError)) as error:
        F.masked_unfold(**{**good, **BAD[message]})
    assert message in str(error.value)


def test_specification_is_differentiable_twice():
    case = CASES["clip"]
    ids_keep = case.make_ids()
    images = torch.randn(case.shape, dtype=torch.float64, requires_grad=True)
    args = tuple(case.geometry.values())[:4]
    out = reference.masked_unfold(images, ids_keep, case.order, *args, torch.float64)
    (first,) = torch.autograd.grad(out.pow(3).sum(), images, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), images)
    (counts,) = torch.autograd.grad(run(case, ids_keep, "reference")(images).sum(), images)
    torch.testing.assert_close(second, 6 * images.detach() * counts)
