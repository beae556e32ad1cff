"""ema_update: every backend against the float64 formula."""

import pytest
import torch

from fastssl import functional as F
from tests.kernels.util import (
    DTYPES,
    assert_close_to_truth,
    compiled_backends,
    device_of,
)

BACKENDS = compiled_backends("ema_update")
# A scalar, one element, nothing, primes, exactly one chunk and one more, and a layer of a ViT-B.
SHAPES = [(), (1,), (0, 3), (7, 13), (16384,), (16385,), (3, 768, 16, 16), (40009,)]
# Either side of the point where lerp changes its form.
MOMENTA = [0.996, 0.3]


def make_inputs(dtypes, device, shapes=SHAPES):
    return [[torch.randn(s).to(device, dtype) for s in shapes] for dtype in dtypes]


def run(targets, sources, momentum, backend):
    """The updated targets; the given ones stay."""
    targets = [t.clone() for t in targets]
    F.ema_update(targets, sources, momentum=momentum, backend=backend)
    return targets


def as_tensor(momentum, device):
    return torch.tensor(momentum, device=device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("source_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype, source_dtype, momentum, is_tensor, backend):
    device = device_of(backend)
    targets, sources = make_inputs((dtype, source_dtype), device)
    given = as_tensor(momentum, device) if is_tensor else momentum
    actual = run(targets, sources, given, backend)
    eager = run(targets, sources, given, "reference")
    for i, target in enumerate(targets):
        truth = momentum * target.double() + (1 - momentum) * sources[i].double()
        assert actual[i].dtype == dtype
        assert_close_to_truth(f"targets[{i}]", actual[i], eager[i], truth)


def test_reference_takes_float64():
    targets, sources = make_inputs((torch.float64, torch.float64), "cpu")
    for given in (0.996, torch.tensor(0.996, dtype=torch.float64)):
        updated = run(targets, sources, given, None)
        for target, source, new in zip(targets, sources, updated, strict=True):
            torch.testing.assert_close(new, 0.996 * target + 0.004 * source, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_the_ends_are_exact(backend):
    device = device_of(backend)
    targets, sources = make_inputs((torch.float32, torch.bfloat16), device)
    for is_tensor in (False, True):
        zero, one, some = (as_tensor(m, device) if is_tensor else m for m in (0.0, 1.0, 0.9))
        copied, kept = run(targets, sources, zero, backend), run(targets, sources, one, backend)
        still = run(targets, targets, some, backend)
        for i, target in enumerate(targets):
            assert torch.equal(copied[i], sources[i].float())
            assert torch.equal(kept[i], target)
            assert torch.equal(still[i], target), "equal tensors stay what they are"


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_give_the_same_bits_whatever_the_neighbours(backend):
    targets, sources = make_inputs((torch.float32, torch.float32), device_of(backend))
    first, second = (run(targets, sources, 0.99, backend) for _ in range(2))
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        alone = run(targets[i : i + 1], sources[i : i + 1], 0.99, backend)
        assert torch.equal(a, b) and torch.equal(a, alone[0])


def test_the_number_of_threads_does_not_change_a_bit():
    targets, sources = make_inputs((torch.float32, torch.bfloat16), "cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(run(targets, sources, 0.99, "cpp"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_beside_the_targets_is_written(backend):
    """Views at odd addresses into one buffer, with a guard between them."""
    device = device_of(backend)
    counts, guard = (5, 16384, 16391, 3), 7
    buffer = torch.full((sum(counts) + guard * (len(counts) + 1),), 77.0, device=device)
    targets, begin = [], guard
    for count in counts:
        targets.append(buffer[begin : begin + count])
        begin += count + guard
    sources = [torch.randn(count + 1, device=device)[1:] for count in counts]
    F.ema_update(targets, sources, momentum=0.25, backend=backend)
    for target, source in zip(targets, sources, strict=True):
        torch.testing.assert_close(target, 0.25 * 77 + 0.75 * source)
    assert (buffer == 77).sum() == guard * (len(counts) + 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dense_layout_of_both_is_taken_as_it_is(backend):
    device = device_of(backend)
    target, source = (
        torch.randn(4, 3, 5, 7, device=device).to(memory_format=torch.channels_last)
        for _ in range(2)
    )
    expected = 0.9 * target + 0.1 * source
    F.ema_update(
        [target, target.new_zeros(2, 3).t()],
        [source, torch.ones(2, 3, device=device).t()],
        momentum=0.9,
        backend=backend,
    )
    torch.testing.assert_close(target, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_layouts_are_the_references(backend):
    device = device_of(backend)
    target, source = torch.randn(6, 4, device=device), torch.randn(4, 6, device=device).t()
    expected = 0.9 * target + 0.1 * source
    with pytest.raises(ValueError, match=r"targets\[0\] of strides \(4, 1\) and sources\[0\]"):
        F.ema_update([target], [source], momentum=0.9, backend=backend)
    F.ema_update([target], [source], momentum=0.9)
    torch.testing.assert_close(target, expected)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_parameters_of_a_graph_are_updated_without_one(backend):
    device = device_of(backend)
    target = torch.nn.Parameter(torch.zeros(3, device=device))
    source = torch.nn.Parameter(torch.ones(3, device=device))
    version = target._version
    F.ema_update([target], [source * 2], momentum=0.5, backend=backend)
    assert torch.equal(target.detach(), torch.ones(3, device=device))
    assert target.is_leaf and target.grad_fn is None
    assert target._version > version, "autograd must notice a use of the old value"


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_opcheck(backend):
    device = device_of(backend)
    targets, sources = make_inputs((torch.float32, torch.bfloat16), device, [(3, 5), (7,)])
    for momentum in ((0.9, None), (1.0, torch.tensor(0.9, device=device))):
        torch.library.opcheck(torch.ops.fastssl.ema_update, (targets, sources, *momentum, backend))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_compiles_without_a_graph_break(backend):
    targets, sources = make_inputs(
        (torch.float32, torch.bfloat16), device_of(backend), [(3, 5), (7,)]
    )

    def call(targets, sources):
        moved = [t * 2 for t in targets]
        F.ema_update(moved, sources, momentum=0.9, backend=backend)
        F.ema_update(targets, sources, momentum=0.8, backend=backend)
        return [m + 1 for m in moved]

    actual = torch.compile(call, fullgraph=True)(first := [t.clone() for t in targets], sources)
    expected = call(second := [t.clone() for t in targets], sources)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(first, second)


def test_nothing_to_do():
    F.ema_update([], [], momentum=0.5)


BAD = {
    "sources must be as many as targets, 1, got 2 tensors": {"sources": [torch.zeros(2)] * 2},
    "targets[0] must be a Tensor, got float": {"targets": [1.0]},
    "sources[0] must be float32 or bfloat16": {"sources": [torch.zeros(2, dtype=torch.int64)]},
    "sources[0] must have the shape of targets[0], [2], got [3]": {"sources": [torch.zeros(3)]},
    "momentum must be in [0, 1], got 1.5": {"momentum": 1.5},
    "momentum must be in [0, 1], got nan": {"momentum": float("nan")},
    "momentum must be a float or a Tensor, got str": {"momentum": "0.9"},
    "momentum must have 0 dimensions, got shape (1,)": {"momentum": torch.ones(1)},
    "sources[0] must be on cpu, got meta": {"sources": [torch.zeros(2, device="meta")]},
    "backend must be one of cpp, triton, reference": {"backend": "magic"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    good = {"targets": [torch.zeros(2)], "sources": [torch.zeros(2)], "momentum": 0.9}
    with pytest.raises((TypeError, ValueError)) as error:
        F.ema_update(**{**good, **BAD[message]})
    assert message in str(error.value)


def test_a_graph_captures_only_what_it_has_met(monkeypatch):
    """A replay would copy the table of addresses from memory that others have by then."""
    from fastssl.kernels.ema_update import triton_kernel

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before a CUDA graph captures it, got 2 pairs"):
        triton_kernel._table(torch.device("cuda", 0), (4, 4), ((0, 64, 16), (128, 192, 16)))
