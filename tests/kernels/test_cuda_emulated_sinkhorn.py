"""sinkhorn_knopp's CUDA kernels without a GPU: cuda_kernel.py as it is, on kernels compiled for the
host (tests/cuda_emulator.h), clusters and their exchange included."""

import ctypes
import math

import pytest
import torch
from torch import Tensor

from fastssl.kernels.common.cuda_device import Device
from fastssl.kernels.sinkhorn_knopp import cuda_kernel, op, reference
from tests.kernels.cuda_schemas import stand_ins

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
THREADS = 64
# Two clusters, or slices, at a time.
FACTS = Device(4, True, 233472, 232448)
H100 = Device(132, True, 233472, 232448)
A100 = Device(108, False, 167936, 166912)


class Call(ctypes.Structure):
    """SinkhornCall in cuda_emulated.cpp."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("num_rows", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("B", "K", "threads", "slices")),
        ("factor", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("anchor", "offset", "sums")),
    )


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class Ops:
    """The ops of csrc/cuda/sinkhorn_knopp.cu on the emulator; `clusters` lists those that ran."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.clusters: list[int] = []

    def call(self, logits, num_rows, factor, anchor, offset, sums, slices, threads=THREADS):
        assert logits.is_contiguous()
        counts = (*logits.shape, threads, slices)
        pointers = (pointer(x).value for x in (anchor, offset, sums))
        return Call(pointer(logits).value, pointer(num_rows).value, *counts, factor, *pointers)

    def kind(self, logits: Tensor) -> tuple[int, int]:
        vectors = logits.shape[1] * logits.itemsize % 16 == 0 and logits.data_ptr() % 16 == 0
        return DTYPES.index(logits.dtype), int(vectors)

    def sinkhorn_knopp_columns(self, logits, num_rows, factor, parts, anchor, sums):
        call = self.call(logits, num_rows, factor, anchor, None, sums, parts.shape[1])
        self.library.sinkhorn_knopp_columns(
            *self.kind(logits), ctypes.byref(call), pointer(parts.fill_(torch.nan))
        )

    def sinkhorn_knopp_iterate(
        self, logits, num_rows, factor, anchor, offset, log2_mass, stats, parts, *rest
    ):
        cluster, width, threads, columns, sums = rest
        assert (stats is None) == (cluster > 0)
        if stats is not None:
            stats.fill_(torch.nan)
        slices = (parts.shape[0], threads or THREADS)
        call = self.call(logits, num_rows, factor, anchor, offset, sums, *slices)
        self.rows(logits, call, cluster, width, columns, False, log2_mass, stats, parts, None)

    def sinkhorn_knopp_assign(
        self, logits, num_rows, factor, anchor, offset, sums, *rest: object
    ) -> None:
        cluster, width, threads, columns, slices, log_v, assignment = rest
        slices = (max(1, slices), threads or THREADS)
        call = self.call(logits, num_rows, factor, anchor, offset, sums, *slices)
        self.rows(logits, call, cluster, width, columns, True, log_v, None, None, assignment)

    def rows(self, logits, call, cluster, width, columns, is_last, *tensors):
        self.clusters.append(cluster)
        numbers = (cluster, width, columns, int(is_last))
        self.library.sinkhorn_knopp_rows(
            *self.kind(logits), ctypes.byref(call), *numbers, *map(pointer, tensors)
        )


@pytest.fixture
def ops(emulated, monkeypatch) -> Ops:
    """backend="cuda" on CPU tensors, with small blocks."""
    ops = Ops(emulated)
    monkeypatch.setattr(cuda_kernel.libraries, "why_no_cuda_library", lambda: None)
    monkeypatch.setattr(cuda_kernel, "device_facts", lambda device: FACTS)
    monkeypatch.setattr(cuda_kernel, "SIZES", tuple((THREADS, c) for c in (8, 16, 32)))
    monkeypatch.setattr(cuda_kernel, "THREADS", THREADS)
    monkeypatch.setattr(cuda_kernel, "MIN_ROWS", 4)
    monkeypatch.setattr(torch.ops, "fastssl_cuda", stand_ins(ops), raising=False)
    return ops


def run(logits, temperature=0.05, num_iters=3, num_rows=None, materialize=True):
    """assignment (None unless wanted), log_u, log_v, all memory as NaN before."""
    outputs = [torch.full(size, torch.nan) for size in (logits.shape, logits.shape[1:])]
    outputs.append(torch.full(logits.shape[:1], torch.nan))
    terms = (logits, num_rows, temperature, num_iters, materialize, "")
    op._run(cuda_kernel, *terms, *outputs)
    return (outputs[0] if materialize else None), *outputs[1:]


def check(logits, temperature=0.05, num_iters=3, num_rows=None, materialize=True, atol=1e-6):
    actual = run(logits, temperature, num_iters, num_rows, materialize)
    for name, own, *others in zip(
        ("assignment", "log_u", "log_v"),
        actual,
        reference.sinkhorn_knopp(logits.double(), num_rows, temperature, num_iters),
        reference.sinkhorn_knopp(logits, num_rows, temperature, num_iters),
        strict=True,
    ):
        if own is None:
            continue
        truth, eager = others
        assert torch.isfinite(own).all(), name
        error, eager_error = ((x.double() - truth).abs().max() for x in (own, eager))
        bound = 2 * eager_error + atol * max(1.0, truth.abs().max())
        assert error <= bound, f"{name}: {error:.1e}, eager {eager_error:.1e}"
    if materialize:
        torch.testing.assert_close(actual[0].sum(1), torch.ones(len(logits)))
    return actual


# K, dtype and the cluster that holds a row in blocks of 64 threads: one block, one that ends early,
# clusters with a short last block, 16 and 32 columns for a thread, no cluster.
CASES = [
    (64, torch.float32, 1),
    (8, torch.bfloat16, 1),
    (12, torch.float32, 1),
    (1000, torch.bfloat16, 2),
    (1412, torch.float32, 4),
    (8 * 64 * 16 + 8, torch.bfloat16, 16),
    pytest.param(16 * 64 * 16 + 16, torch.float16, 16, marks=pytest.mark.slow),
    pytest.param(16 * 64 * 16 + 4, torch.float32, 16, marks=pytest.mark.slow),
    (77, torch.float32, 0),
    (300, torch.bfloat16, 0),
]


@pytest.mark.parametrize("num_prototypes, dtype, cluster", CASES, ids=str)
def test_against_float64(num_prototypes, dtype, cluster, ops):
    batch = 13 if num_prototypes < 2000 else 3
    check((0.3 * torch.randn(batch, num_prototypes)).to(dtype))
    assert ops.clusters == [cluster] * 3


def test_many_rows_to_a_set(ops, monkeypatch):
    """Sets of several groups of rows, the last of which is not full, with and without clusters."""
    for columns, num_prototypes in ((8, 520), (16, 528), (32, 536), (8, 131)):
        monkeypatch.setattr(cuda_kernel, "SIZES", ((THREADS, columns),))
        check(0.3 * torch.randn(39, num_prototypes), num_iters=2)
    assert ops.clusters == [2, 2, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("num_prototypes", [72, 73])
@pytest.mark.parametrize("num_iters", [1, 4])
def test_vectors_only(num_iters, num_prototypes, ops):
    check(0.3 * torch.randn(19, num_prototypes), num_iters=num_iters, materialize=False)
    assert ops.clusters[-1] == 0


@pytest.mark.parametrize("num_prototypes", [72, 73])
@pytest.mark.parametrize("count", [0, 1, 6, 21, 99])
def test_rows_beyond_the_count(count, num_prototypes, ops):
    logits = 0.3 * torch.randn(21, num_prototypes)
    logits[count:] = torch.nan
    assignment, log_u, log_v = run(logits, num_rows=torch.tensor(count))
    assert (assignment[count:] == 0).all() and (log_v[count:] == 0).all()
    if count == 0:
        assert (log_u == 0).all()
        return
    expected = reference.sinkhorn_knopp(logits[:count].double(), None, 0.05, 3)
    actual = (assignment[:count], log_u, log_v[:count])
    for own, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(own.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_prototypes", [48, 1032, 43])
@pytest.mark.parametrize("temperature", [1e-6, 1.0])
def test_extreme_logits(temperature, num_prototypes, ops):
    """Rows whose maximum is searched, in one block and through the cluster; exact zeros."""
    logits = torch.randn(7, num_prototypes)
    logits[2] *= 1e4
    logits[3] -= 1e4
    logits[:, 5] -= 1e4
    logits[4, 7] = 1e4
    logits[5, 9] = -torch.inf
    truth, *_ = reference.sinkhorn_knopp(logits.double(), None, temperature, 3)
    actual, *vectors = run(logits, temperature)
    assert all(torch.isfinite(x).all() for x in (actual, *vectors))
    assert actual[5, 9] == 0
    known = min(1.0, 8 * 2**-24 * (1 + 4e4 / temperature))
    assert (actual - truth).abs().max() <= known


def test_no_mass_and_no_rows(ops):
    logits = torch.randn(6, 24)
    logits[:, 3] = -torch.inf
    assignment, log_u, _ = run(logits)
    assert (assignment[:, 3] == 0).all() and log_u[3] == 0
    assert run(torch.empty(0, 24))[1].tolist() == [0] * 24


@pytest.mark.parametrize("num_prototypes", [72, 73])
def test_two_ranks(num_prototypes, ops):
    """The passes of two ranks with what op._run reduces between them; one has a larger maximum."""
    logits = 0.3 * torch.randn(14, num_prototypes)
    logits[2:5] += 1
    factor = 1 / (math.log(2) * 0.05)
    ranks = []
    for rows in logits.split((9, 5)):
        anchor, sums, offset = (torch.zeros(num_prototypes) for _ in range(3))
        cuda_kernel.columns(rows, None, factor, anchor, sums)
        ranks.append((rows, anchor, sums, offset, torch.zeros(len(rows))))
    anchor = torch.maximum(ranks[0][1], ranks[1][1])
    for _, own, sums, *_ in ranks:
        cuda_kernel.move(own, anchor, factor, sums)
    for i in range(3):
        total = ranks[0][2] + ranks[1][2]
        for rows, own, sums, offset, log_v in ranks:
            own.copy_(anchor)
            sums.copy_(total)
            common = (rows, None, factor, own, offset)
            if i < 2:
                cuda_kernel.iterate(*common, log_v, sums)
            else:
                log_u = torch.empty(num_prototypes)
                cuda_kernel.assign(*common, sums, log_u, log_v, torch.empty_like(rows))
    _, expected_u, expected_v = reference.sinkhorn_knopp(logits.double(), None, 0.05, 3)
    log_v = torch.cat([rank[4] for rank in ranks])
    torch.testing.assert_close(log_u.double(), expected_u, rtol=0, atol=2e-4)
    torch.testing.assert_close(log_v.double(), expected_v, rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_prototypes", [1032, 131])
def test_runs_give_the_same_bits(num_prototypes, ops):
    logits = 0.3 * torch.randn(14, num_prototypes)
    first, second = run(logits), run(logits)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("size", [*cuda_kernel.SIZES, (64, 16)], ids=str)
def test_shared_memory_is_what_the_launch_asks_for(size, emulated):
    emulated.sinkhorn_shared_bytes.restype = ctypes.c_int64
    for cluster in (1, 16):
        expected = emulated.sinkhorn_shared_bytes(*size, cluster)
        assert cuda_kernel.shared_bytes(*size, cluster) == expected


PLANS = {
    # K, bytes: the plan on an H100, and on an A100.
    (1024, 2): ((1, 1024, 256, 8), (1, 1024, 256, 8)),
    (3000, 4): ((2, 1504, 256, 8), (1, 3000, 256, 16)),
    (65536, 2): ((16, 4096, 256, 16), None),
    (131072, 4): ((16, 8192, 256, 32), None),
    (262144, 2): ((16, 16384, 512, 32), None),
    (262152, 2): (None, None),
    (4097, 4): (None, None),
}


@pytest.mark.parametrize("sizes", PLANS, ids=str)
def test_plans(sizes):
    for device, expected in zip((H100, A100), PLANS[sizes], strict=True):
        plan = cuda_kernel.cluster_plan(*sizes, device)
        assert plan == (expected and cuda_kernel.Plan(*expected))


def test_clusters_and_slices_that_run_at_once():
    plans = {k: cuda_kernel.cluster_plan(k, 2, H100) for k in (4096, 65536, 262144)}
    slices = {k: cuda_kernel.row_slices(4096, plan, H100) for k, plan in plans.items()}
    # Two blocks on each of 132 processors; one of the largest.
    assert slices == {4096: 132, 65536: 16, 262144: 8}
    assert cuda_kernel.row_slices(10, plans[4096], H100) == 3
    assert cuda_kernel.row_slices(0, plans[4096], H100) == 1
    # 32 blocks of 2,048 columns; no slice of less than 32 rows.
    assert cuda_kernel.column_slices(torch.empty(4096, 65536, dtype=torch.half), H100) == 17
    assert cuda_kernel.column_slices(torch.empty(64, 4096), H100) == 2
