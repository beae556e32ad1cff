"""random_masking: every backend against stable argsort, to the last index."""

import pytest
import torch

from fastssl import functional as F
from tests.kernels.util import DEVICE, DTYPES, compiled_backends, device_of

BACKENDS = compiled_backends("random_masking")
ALL = ["reference", *BACKENDS]
# B, N, len_keep: ones, primes, nothing kept, all kept, ViT-B, many tiles.
SHAPES = [(1, 1, 1), (3, 13, 5), (2, 64, 0), (2, 65, 65), (5, 196, 49), (1, 521, 130)]
SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1.0, -1.0]


def run(backend, noise, len_keep):
    return F.random_masking(noise.to(device_of(backend)), len_keep, backend=backend)


def assert_is_argsort(actual, noise, len_keep):
    """Against torch.sort in float64, which holds every value of the smaller types."""
    ids_keep, ids_restore, mask = (value.cpu() for value in actual)
    order = torch.sort(noise.cpu().double(), dim=1, stable=True).indices
    ranks = torch.empty_like(order)
    ranks.scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    assert ids_keep.dtype == ids_restore.dtype == torch.int32 and mask.dtype == torch.float32
    assert torch.equal(ids_keep, order[:, :len_keep].int())
    assert torch.equal(ids_restore, ranks.int())
    assert torch.equal(mask, (ranks >= len_keep).float())


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_stable_argsort(shape, dtype, backend, poisoned_memory):
    B, N, len_keep = shape
    # bf16 and fp16 noise of 196 tokens is full of ties.
    noise = torch.rand(B, N).to(dtype)
    assert_is_argsort(run(backend, noise, len_keep), noise, len_keep)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_zeros_infinities_and_nan(dtype, backend):
    choice = torch.randint(len(SPECIAL), (4, 150))
    noise = torch.tensor(SPECIAL)[choice].to(dtype)
    assert_is_argsort(run(backend, noise, 40), noise, 40)
    # With a NaN of the other sign, subnormals of both signs and the largest numbers.
    tiny = torch.finfo(dtype).smallest_normal / 4
    values = [*SPECIAL, tiny, -tiny, torch.finfo(dtype).max, torch.finfo(dtype).min]
    noise = torch.tensor(values, dtype=dtype)
    noise = torch.cat([noise, noise[4:5].copysign(torch.tensor(-1.0, dtype=dtype)), noise])[None]
    assert_is_argsort(run(backend, noise, 3), noise, 3)


@pytest.mark.parametrize("backend", ALL)
def test_all_equal_keeps_the_first(backend):
    ids_keep, ids_restore, _ = run(backend, torch.full((2, 130), -2.5), 7)
    assert torch.equal(ids_keep.cpu(), torch.arange(7).int().expand(2, 7))
    assert torch.equal(ids_restore.cpu(), torch.arange(130).int().expand(2, 130))


def test_formula_written_out():
    ids_keep, ids_restore, mask = F.random_masking(torch.tensor([[0.3, 0.1, 0.9, 0.1, 0.0]]), 2)
    assert ids_keep.tolist() == [[4, 1]]
    assert ids_restore.tolist() == [[3, 1, 4, 2, 0]]
    assert mask.tolist() == [[1, 0, 1, 1, 0]]


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_float64_noise(backend):
    noise = torch.rand(3, 50, dtype=torch.float64)
    if backend == "reference":
        assert_is_argsort(F.random_masking(noise, 9), noise, 9)
    else:
        with pytest.raises(ValueError, match="float64 is served by the reference only"):
            F.random_masking(noise, 9, backend=backend)


def test_cpp_on_long_rows_and_many_threads():
    """The partition of rows among threads leaves no trace; N above Triton's limit."""
    noise = torch.rand(7, 5003)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert_is_argsort(F.random_masking(noise, 100, backend="cpp"), noise, 100)
    finally:
        torch.set_num_threads(threads)


def test_triton_gives_its_limit_as_the_reason():
    noise = torch.rand(1, 4097, device=DEVICE)
    with pytest.raises(ValueError, match="N = 4097 is above 4096"):
        F.random_masking(noise, 5, backend="triton")
    assert_is_argsort(F.random_masking(noise, 5), noise, 5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_longest_row_of_triton(backend):
    noise = torch.rand(1, 4096)
    assert_is_argsort(run(backend, noise, 1024), noise, 1024)


@pytest.mark.parametrize("backend", ALL)
def test_empty_and_strided(backend):
    for shape in ((0, 5), (3, 0)):
        noise = torch.rand(shape)
        assert_is_argsort(run(backend, noise, 0), noise, 0)
    noise = torch.rand(40, 6).t()
    assert_is_argsort(run(backend, noise, 9), noise, 9)


@pytest.mark.parametrize("backend", ALL)
def test_not_differentiable(backend):
    outputs = run(backend, torch.rand(2, 30).requires_grad_(), 9)
    assert not any(value.requires_grad for value in outputs)


@pytest.mark.parametrize("backend", ALL)
def test_opcheck(backend):
    noise = torch.rand(2, 30, device=device_of(backend))
    torch.library.opcheck(torch.ops.fastssl.random_masking, (noise, 9, backend))


@pytest.mark.parametrize("backend", ALL)
def test_compiles_without_a_graph_break(backend):
    compiled = torch.compile(lambda x: F.random_masking(x, 9, backend=backend), fullgraph=True)
    noise = torch.rand(2, 30, device=device_of(backend))
    assert_is_argsort(compiled(noise), noise, 9)


@pytest.mark.parametrize("backend", ALL)
def test_autocast_leaves_the_noise_alone(backend):
    """In bfloat16 these two would tie and the first one win."""
    noise = torch.tensor([[0.50001, 0.5]])
    device = device_of(backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ids_keep, _, _ = run(backend, noise, 1)
    assert ids_keep.tolist() == [[1]]


BAD = {
    "noise must have 2 dimensions, got shape (4,)": {"noise": torch.zeros(4)},
    "noise must be a Tensor, got list": {"noise": [1.0]},
    "noise must be float32 or bfloat16 or float16 or float64, got int64": {
        "noise": torch.zeros(2, 5, dtype=torch.int64)
    },
    "len_keep must be at least 0 and at most 5, got -1": {"len_keep": -1},
    "len_keep must be at least 0 and at most 5, got 6": {"len_keep": 6},
    "len_keep must be an int, got float": {"len_keep": 2.5},
    "backend must be one of cpp, triton, reference": {"backend": "magic"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises((TypeError, ValueError)) as error:
        F.random_masking(**{"noise": torch.zeros(2, 5), "len_keep": 2, **BAD[message]})
    assert message in str(error.value)
