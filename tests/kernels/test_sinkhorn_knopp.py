"""sinkhorn_knopp: every backend against the published definitions, alone and in groups."""

import pytest
import torch
import torch.distributed as dist

from benchmarks.measure import peak_extra_bytes
from fastssl import functional as F
from fastssl.kernels.common import collectives
from tests.kernels.util import (
    DEVICE,
    DTYPES,
    assert_close_to_truth,
    backends_on_ranks,
    compiled_backends,
    device_of,
)

BACKENDS = compiled_backends("sinkhorn_knopp")
# Real sizes are too much for Triton's interpreter.
COMPILED = [p for p in BACKENDS if p.values[0] == "cpp" or DEVICE.type == "cuda"]
ALL = ["reference", *BACKENDS]
# Numpy warns, in Triton's interpreter, of -max * factor = -inf.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")
# B, K: ones, primes, more samples than prototypes and fewer, several tiles of either.
SHAPES = [(1, 1), (1, 7), (13, 1), (7, 13), (67, 31), (21, 521), (5, 4099)]
REAL_SHAPES = [(2048, 4096), (512, 65536)]
# From one block to clusters of 16, with 8, 16 and 32 columns for a thread; several rows to a set.
CLUSTER_SHAPES = [(101, 72), (1500, 3000), (700, 12296), (33, 65536), (19, 131072), (17, 262144)]
# Results are float32 whatever the logits are.
ATOL = 1e-6


def swav(logits, temperature, num_iters):
    """SwAV's definition, on the exponentials as they are."""
    Q = (logits / temperature).exp().t()
    num_prototypes, batch = Q.shape
    Q = Q / Q.sum()
    for _ in range(num_iters):
        r = torch.ones(num_prototypes, dtype=Q.dtype) / num_prototypes
        c = torch.ones(batch, dtype=Q.dtype) / batch
        Q = Q * (r / Q.sum(dim=1))[:, None]
        Q = Q * (c / Q.sum(dim=0))[None, :]
    return (Q / Q.sum(dim=0, keepdim=True)).t()


def dinov2(logits, temperature, num_iters):
    """DINOv2's definition."""
    Q = (logits / temperature).exp().t()
    num_prototypes, batch = Q.shape
    Q = Q / Q.sum()
    for _ in range(num_iters):
        Q = Q / Q.sum(dim=1, keepdim=True) / num_prototypes
        Q = Q / Q.sum(dim=0, keepdim=True) / batch
    return (Q * batch).t()


def make_logits(shape, dtype=torch.float32, device="cpu", scale=0.3):
    return (torch.randn(shape) * scale).to(device, dtype)


def run(logits, backend, temperature=0.05, **kwargs):
    return F.sinkhorn_knopp(logits, temperature=temperature, backend=backend, **kwargs)


def assert_matches_float64(logits, backend, atol=ATOL, **kwargs):
    actual = run(logits, backend, **kwargs)
    eager = run(logits, "reference", **kwargs)
    truth = run(logits.double(), "reference", **kwargs)
    assert actual.dtype == torch.float32
    assert_close_to_truth("assignment", actual, eager, truth, atol)
    vectors = (run(x, b, materialize=False, **kwargs) for x, b in (
        (logits, backend), (logits, "reference"), (logits.double(), "reference")
    ))  # fmt: skip
    for name, *values in zip(("log_u", "log_v"), *vectors, strict=True):
        assert values[0].dtype == torch.float32
        assert_close_to_truth(name, *values, atol)
    return actual


@pytest.mark.parametrize("definition", [swav, dinov2])
@pytest.mark.parametrize("num_iters", [1, 2, 3, 10])
def test_reference_is_the_published_definition(definition, num_iters):
    logits = make_logits((37, 23), torch.float64)
    actual = run(logits, "reference", num_iters=num_iters)
    torch.testing.assert_close(actual, definition(logits, 0.05, num_iters), rtol=1e-10, atol=1e-14)
    log_u, log_v = run(logits, "reference", num_iters=num_iters, materialize=False)
    from_vectors = (logits / 0.05 + log_u + log_v[:, None]).exp()
    torch.testing.assert_close(from_vectors, actual, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("definition", [swav, dinov2])
def test_matches_the_published_definition(definition, backend):
    logits = make_logits((67, 31), device=device_of(backend))
    truth = definition(logits.double().cpu(), 0.05, 3)
    torch.testing.assert_close(run(logits, backend).double().cpu(), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, backend, poisoned_memory):
    actual = assert_matches_float64(make_logits(shape, dtype, device_of(backend)), backend)
    torch.testing.assert_close(actual.sum(dim=1), torch.ones_like(actual[:, 0]))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CLUSTER_SHAPES, ids=str)
def test_every_kind_of_cluster(shape, dtype, backend, poisoned_memory):
    assert_matches_float64(make_logits(shape, dtype, "cuda"), backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
def test_real_sizes(shape, backend):
    assert_matches_float64(make_logits(shape, device=device_of(backend)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_iters", [1, 2, 10])
def test_numbers_of_iterations(num_iters, backend):
    logits = make_logits((67, 31), device=device_of(backend))
    assert_matches_float64(logits, backend, num_iters=num_iters)


@pytest.mark.parametrize("backend", BACKENDS)
def test_formula_written_out(backend):
    """Two samples, two prototypes, one iteration: columns (1, 3) and (2, 2) to sum 1, then rows."""
    logits = torch.tensor([[1.0, 2.0], [3.0, 2.0]], device=device_of(backend)).log()
    actual = run(logits, backend, temperature=1.0, num_iters=1)
    expected = torch.tensor([[1 / 3, 2 / 3], [3 / 5, 2 / 5]], device=logits.device)
    torch.testing.assert_close(actual, expected)
    log_u, log_v = run(logits, backend, temperature=1.0, num_iters=1, materialize=False)
    torch.testing.assert_close(log_u.exp().cpu(), torch.tensor([1 / 4, 1 / 4]))
    torch.testing.assert_close(log_v.exp().cpu(), torch.tensor([4 / 3, 4 / 5]))


def extreme_logits(kind):
    logits = make_logits((29, 43), scale=1.0)
    if kind == "large":
        return logits.sign() * 1e4 + logits
    if kind == "far apart":
        return logits * 1e4
    if kind == "one dominated sample":
        logits[3] -= 1e4
    elif kind == "one dominated prototype":
        logits[:, 3] -= 1e4
    elif kind == "one dominating pair":
        logits[3, 5] = 1e4
    elif kind == "offset per sample":
        logits += torch.linspace(-1e4, 1e4, len(logits))[:, None]
    elif kind == "all equal":
        logits.fill_(-1e4)
    elif kind == "equal samples":
        logits[:] = logits[0]
    return logits


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("temperature", [1e-6, 0.04, 1.0, 1e6])
@pytest.mark.parametrize(
    "kind",
    ["large", "far apart", "one dominated sample", "one dominated prototype"]
    + ["one dominating pair", "offset per sample", "all equal", "equal samples"],
)
def test_extreme_logits(kind, temperature, backend):
    """Finite whatever comes; as exact as float32 scores allow."""
    logits = extreme_logits(kind).to(device_of(backend))
    actual = run(logits, backend, temperature=temperature)
    assert torch.isfinite(actual).all()
    torch.testing.assert_close(actual.sum(dim=1), torch.ones_like(actual[:, 0]))
    for vector in run(logits, backend, temperature=temperature, materialize=False):
        assert torch.isfinite(vector).all()
    truth = run(logits.double(), "reference", temperature=temperature)
    # Scores of size s are known to 2^-24 s each, and so are their sums after a few iterations.
    known = min(1.0, 8 * 2**-24 * (1 + logits.abs().max().item() / temperature))
    assert (actual - truth).abs().max() <= known


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_common_offsets_do_no_harm(backend):
    """A prototype's offset cancels: taken off before anything is rounded, it costs nothing."""
    logits = (make_logits((29, 43), scale=16.0).round() / 64).to(device_of(backend))
    offset = torch.linspace(-(2.0**13), 2.0**13, 43).round().to(logits.device)
    expected = run(logits, backend)
    torch.testing.assert_close(run(logits + offset, backend), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", ALL)
def test_all_equal_is_uniform(backend):
    for value in (0.0, 1e4, -1e4):
        actual = run(torch.full((5, 8), value, device=device_of(backend)), backend)
        torch.testing.assert_close(actual, torch.full_like(actual, 1 / 8))


@pytest.mark.parametrize("backend", ALL)
def test_forbidden_pairs(backend):
    """-inf forbids a pair, for a prototype all of them; nothing else changes."""
    logits = make_logits((11, 9), device=device_of(backend))
    logits[2, 4] = -torch.inf
    logits[:, 8] = -torch.inf
    actual = run(logits, backend)
    assert actual[2, 4] == 0 and (actual[:, 8] == 0).all()
    truth = dinov2(logits[:, :8].double().cpu(), 0.05, 3)
    torch.testing.assert_close(actual[:, :8].double().cpu(), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("count", [0, 1, 13, 50, 99])
def test_rows_beyond_the_count_are_ignored(count, backend, poisoned_memory):
    logits = make_logits((50, 31), device=device_of(backend))
    kept = logits[:count].clone()
    logits[count:] = torch.nan
    num_rows = torch.tensor(count, device=logits.device, dtype=torch.int32)
    actual = run(logits, backend, num_rows=num_rows)
    log_u, log_v = run(logits, backend, num_rows=num_rows, materialize=False)
    assert (actual[count:] == 0).all() and (log_v[count:] == 0).all()
    if count == 0:
        assert (log_u == 0).all()
        return
    torch.testing.assert_close(actual[:count], run(kept, backend))
    expected_u, expected_v = run(kept, backend, materialize=False)
    torch.testing.assert_close(log_u, expected_u)
    torch.testing.assert_close(log_v[:count], expected_v)


@pytest.mark.parametrize("backend", ALL)
def test_empty_batch(backend):
    logits = torch.empty(0, 5, device=device_of(backend))
    assert run(logits, backend).shape == (0, 5)
    log_u, log_v = run(logits, backend, materialize=False)
    assert log_u.tolist() == [0] * 5 and log_v.shape == (0,)


@pytest.mark.parametrize("backend", ALL)
def test_strided_logits(backend):
    logits = make_logits((31, 20), device=device_of(backend)).t()
    torch.testing.assert_close(run(logits, backend), run(logits.contiguous(), "reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_give_the_same_bits(backend):
    logits = make_logits((67, 531), device=device_of(backend))
    assert torch.equal(run(logits, backend), run(logits, backend))


def test_cpp_gives_the_same_bits_on_any_number_of_threads():
    logits = make_logits((203, 1031))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append((run(logits, "cpp"), *run(logits, "cpp", materialize=False)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_cpp_keeps_its_promise_on_memory():
    logits = make_logits((512, 1024))
    for materialize in (True, False):
        extra = peak_extra_bytes(
            lambda x, m=materialize: run(x, "cpp", materialize=m), [logits], logits.device
        )
        # Partial sums of 32 chunks, four rows per thread, seven vectors.
        assert extra <= 4 * 1024 * (32 + 4 * torch.get_num_threads() + 7)


@pytest.mark.parametrize("backend", ALL)
def test_not_differentiable(backend):
    logits = make_logits((6, 5), device=device_of(backend)).requires_grad_()
    assert not run(logits, backend).requires_grad
    assert not any(vector.requires_grad for vector in run(logits, backend, materialize=False))


@pytest.mark.parametrize("materialize", [True, False])
@pytest.mark.parametrize("backend", ALL)
def test_opcheck(backend, materialize):
    logits = make_logits((6, 5), device=device_of(backend))
    num_rows = torch.tensor(4, device=logits.device)
    for count in (None, num_rows):
        arguments = (logits, count, 0.05, 3, materialize, "", backend)
        torch.library.opcheck(torch.ops.fastssl.sinkhorn_knopp, arguments)


@pytest.mark.parametrize("backend", ALL)
def test_compiles_without_a_graph_break(backend):
    logits = make_logits((7, 13), device=device_of(backend))

    def both(x, count):
        return run(x, backend), *run(x, backend, num_rows=count, materialize=False)

    count = torch.tensor(5, device=logits.device)
    compiled = torch.compile(both, fullgraph=True)
    torch.testing.assert_close(compiled(logits, count), both(logits, count))


@pytest.mark.parametrize("backend", ALL)
def test_autocast_leaves_the_logits_alone(backend):
    logits = make_logits((7, 13), device=device_of(backend), scale=30.0)
    with torch.autocast(logits.device.type, dtype=torch.bfloat16):
        actual = run(logits, backend)
    assert torch.equal(actual, run(logits, backend))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_float64_logits(backend):
    logits = make_logits((7, 13), torch.float64)
    if backend == "reference":
        assert run(logits, None).dtype == torch.float64
    else:
        with pytest.raises(ValueError, match="float64 is served by the reference only"):
            run(logits, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values[0] != "cpp"])
def test_does_not_wait_for_the_gpu(backend):
    logits = make_logits((64, 128), device="cuda")
    num_rows = torch.tensor(50, device="cuda")
    run(logits, backend, num_rows=num_rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(logits, backend, num_rows=num_rows)
        run(logits, backend, num_rows=num_rows, materialize=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Rows of each rank: different numbers, none at all.
SPLITS = [(9, 5), (14, 0), pytest.param((3, 1, 0, 10), marks=pytest.mark.slow)]


def run_on_ranks(logits, split, backend, how):
    rank = dist.get_rank()
    own = logits.split(split)[rank]
    kwargs = {} if how == "num_rows" else {"group": dist.new_group(list(range(len(split))))}
    if how == "num_rows":
        own = torch.cat([own, torch.full((rank + 1, logits.shape[1]), torch.nan)])
        kwargs["num_rows"] = torch.tensor(split[rank])

    def both(x):
        return run(x, backend, **kwargs), *run(x, backend, materialize=False, **kwargs)

    if how == "compiled":
        # The tracing is what is tested, not the code that a compiler makes of it.
        torch.compiler.reset()
        both = torch.compile(both, fullgraph=True, backend="aot_eager")
    assignment, log_u, log_v = both(own)
    return assignment[: split[rank]], log_u, log_v[: split[rank]]


@pytest.mark.parametrize("how", ["group", "num_rows", "compiled"])
@pytest.mark.parametrize("backend", backends_on_ranks("sinkhorn_knopp"))
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_ranks_equal_one_process(gloo_pool, split, backend, how):
    logits = make_logits((14, 31))
    logits[2:5] += 1  # the ranks have different maxima
    results = gloo_pool.run(run_on_ranks, len(split), logits, split, backend, how)
    expected = run(logits.double(), "reference")
    expected_u, expected_v = run(logits.double(), "reference", materialize=False)
    limits = {"rtol": 0, "check_dtype": False}
    assignments, log_us, log_vs = zip(*results, strict=True)
    torch.testing.assert_close(torch.cat(assignments), expected, atol=1e-5, **limits)
    torch.testing.assert_close(torch.cat(log_vs), expected_v, atol=1e-4, **limits)
    for log_u in log_us:
        assert torch.equal(log_u, log_us[0])
        torch.testing.assert_close(log_u, expected_u, atol=2e-4, **limits)


def count_messages(logits, backend):
    sizes = []

    def count(name):
        original = getattr(collectives, name)

        def counted(x, group=None):
            sizes.append((name, tuple(x.shape)))
            return original(x, group)

        setattr(collectives, name, counted)
        return lambda: setattr(collectives, name, original)

    undo = [count("all_reduce_sum"), count("all_reduce_max")]
    run(logits, backend, num_iters=3)
    for function in undo:
        function()
    return sizes


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_what_travels_between_ranks(gloo_pool, backend):
    for sizes in gloo_pool.run(count_messages, 2, make_logits((6, 31)), backend):
        assert sizes == [("all_reduce_max", (31,))] + [("all_reduce_sum", (31,))] * 3


BAD = {
    "logits must have 2 dimensions, got shape (4,)": {"logits": torch.zeros(4)},
    "logits must be a Tensor, got list": {"logits": [1.0]},
    "logits must be float32 or bfloat16 or float16 or float64, got int64": {
        "logits": torch.zeros(2, 5, dtype=torch.int64)
    },
    "logits must have at least one prototype, got [2, 0]": {"logits": torch.zeros(2, 0)},
    "temperature must be a float, got a Tensor": {"temperature": torch.tensor(0.1)},
    "temperature must be positive and finite, got 0": {"temperature": 0},
    "temperature must be positive and finite, got nan": {"temperature": float("nan")},
    "num_iters must be at least 1, got 0": {"num_iters": 0},
    "num_iters must be an int, got float": {"num_iters": 2.5},
    "num_rows must be int32 or int64, got float32": {"num_rows": torch.zeros(())},
    "num_rows must hold one integer, got shape [2]": {"num_rows": torch.tensor([1, 2])},
    "backend must be one of cpp, triton, cuda, reference": {"backend": "magic"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    arguments = {"logits": torch.zeros(2, 5), "temperature": 0.1, **BAD[message]}
    with pytest.raises((TypeError, ValueError)) as error:
        F.sinkhorn_knopp(**arguments)
    assert message in str(error.value)
