"""dino_cross_entropy's CUDA kernels without a GPU: compiled for the host on tests/cuda_emulator.h,
compared with the float64 formula, clusters and their exchange included."""

import ctypes
import math

import pytest
import torch
from torch import Tensor

from fastssl.kernels.common import cuda_view_cross_entropy as kernels
from fastssl.kernels.common.cuda_device import Device
from fastssl.kernels.dino_cross_entropy import cuda_kernel, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding of what is stored, and for the gradient made in forward a second one.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
THREADS = 64
TEMPS = (0.1, 0.04)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def run(
    library: ctypes.CDLL,
    student: Tensor,  # [S, B, K]
    teacher: Tensor,  # [T, B, K]
    *,
    cells: int,
    slices: int,
    fused: bool,
    vectors: bool,
    dloss: float = 1.0,
    center: Tensor | None = None,
    log_u: Tensor | None = None,
    log_v: Tensor | None = None,
    weights: Tensor | None = None,
    num_rows: Tensor | None = None,
    skip: bool = True,
    mean: bool = True,
) -> dict[str, Tensor]:
    """loss, entropy, sums [slices, K] and dstudent of the kernels; memory comes as NaN."""
    S, B, K = student.shape
    T = teacher.shape[0]
    width = -(-K // (8 * cells)) * 8

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, math.nan, dtype=dtype)

    out = {name: empty() for name in ("loss", "entropy", "norm")}
    out |= {"sums": empty(slices, K), "dstudent": empty(S, B, K, dtype=student.dtype)}
    parts = None if fused else empty(B, 2 * S + 3 * T + S * T, cells)
    statistics = (empty(S, B, 2), empty(T, B, 2), empty(B, 2))
    temps, factor = torch.tensor(TEMPS), torch.tensor(dloss)
    stride = 0 if log_u is None or log_u.shape[0] == 1 else K
    library.dino_cross_entropy(
        *(DTYPES.index(student.dtype), int(vectors), int(fused), THREADS),
        *map(pointer, (student, teacher, temps, center, log_u)),
        ctypes.c_int64(stride),
        *map(pointer, (log_v, weights, num_rows)),
        *(S, T, ctypes.c_int64(B), ctypes.c_int64(K), int(skip), int(mean), cells, width, slices),
        *map(pointer, (parts, out["sums"], *statistics, factor)),
        *map(pointer, (out["loss"], out["entropy"], out["norm"], out["dstudent"])),
    )
    return out


def truth(student, teacher, center, log_u, log_v, weights, num_rows, skip, mean, dloss):
    """loss, entropy, the sum of the teacher's logits and dstudent, in float64."""
    leaf = student.double().requires_grad_()
    vectors = [None if x is None else x.double() for x in (center, log_u, log_v, weights)]
    terms = (None, *vectors, num_rows, *TEMPS, skip, mean)
    loss = reference.dino_cross_entropy(leaf, teacher.double(), *terms)
    _, entropy = reference.teacher_statistics(teacher.double(), *terms)
    (dstudent,) = torch.autograd.grad(dloss * loss, leaf)
    rows = teacher.shape[1] if num_rows is None else int(num_rows)
    sums = teacher[:, :rows].double().sum((0, 1))
    return {"loss": loss.detach(), "entropy": entropy, "sums": sums, "dstudent": dstudent}


def check(library, shape, dtype, dloss=1.0, scale=1.0, terms=None, skip=True, mean=True, **way):
    S, T, B, K = shape
    student, teacher = (scale * torch.randn(S + T, B, K)).to(dtype).split([S, T])
    vectors = dict.fromkeys(("center", "log_u", "log_v", "weights", "num_rows")) | (terms or {})
    if vectors["num_rows"] is not None:
        rows = int(vectors["num_rows"])
        student[:, rows:], teacher[:, rows:] = math.nan, math.nan
    actual = run(library, student, teacher, dloss=dloss, **vectors, skip=skip, mean=mean, **way)
    actual["sums"] = actual["sums"].double().sum(0)
    rows = B if vectors["num_rows"] is None else int(vectors["num_rows"])
    clean = [x.clone() for x in (student, teacher)]
    for x in clean:
        x[:, rows:] = 0
    expected = truth(*clean, *vectors.values(), skip, mean, dloss)
    for name in ("loss", "entropy", "sums"):
        torch.testing.assert_close(
            actual[name].double(),
            expected[name],
            rtol=1e-5,
            atol=1e-5,
            msg=lambda m, name=name: f"{name}: {m}",
        )
    assert torch.isfinite(actual["dstudent"]).all()
    assert (actual["dstudent"][:, rows:] == 0).all()
    error = (actual["dstudent"].double() - expected["dstudent"]).norm()
    # float16 cannot hold gradients below 2^-24.
    rounding = 2**-25 * student.numel() ** 0.5 if dtype == torch.float16 else 0.0
    norm = expected["dstudent"].norm()
    assert error <= TOLERANCE[dtype] * norm + rounding + 1e-9, f"{error / norm:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_against_float64(fused, vectors, dtype, emulated):
    """Three cells of which the last ends early; columns that threads have twice, and not at all."""
    K = 8 * 67 if vectors else 531
    center = 0.1 * torch.randn(K)
    way = {"cells": 3, "slices": 2, "fused": fused, "vectors": vectors}
    check(emulated, (4, 2, 3, K), dtype, terms={"center": center}, **way)


# S, T, B, K and cells: one of everything, one cell, more teacher than student views and an odd
# number of them, more views than are read at once, cells without a prototype.
SHAPES = [
    ((2, 1, 1, 1), 1),
    ((3, 2, 2, 13), 1),
    ((2, 5, 2, 100), 2),
    ((9, 3, 1, 70), 2),
    ((2, 2, 1, 9), 4),
]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shape, cells", SHAPES, ids=str)
def test_odd_shapes(shape, cells, fused, emulated):
    way = {"cells": cells, "slices": 1, "fused": fused, "vectors": False}
    check(emulated, shape, torch.float32, **way)


@pytest.mark.parametrize("fused", [True, False])
def test_masked_tokens(fused, emulated):
    """One view each, Sinkhorn's vectors, weights (one of them 0), a count, and a sum."""
    K, B = 200, 5
    weights = torch.rand(B)
    weights[1], weights[4] = 0, math.nan
    terms = {"log_u": torch.randn(1, K), "log_v": None, "weights": weights}
    terms["num_rows"] = torch.tensor(4)
    way = {"cells": 2, "slices": 2, "fused": fused, "vectors": True, "dloss": 1.7}
    check(emulated, (1, 1, B, K), torch.float32, terms=terms, skip=False, mean=False, **way)


@pytest.mark.parametrize("fused", [True, False])
def test_vectors_per_view_and_masses_other_than_one(fused, emulated):
    terms = {"log_u": torch.randn(2, 96), "log_v": -3 + 0.3 * torch.randn(2, 3)}
    way = {"cells": 2, "slices": 1, "fused": fused, "vectors": True, "dloss": 0.3}
    # A float32 score plus log_v of some size knows the probabilities to 1e-6 each.
    check(emulated, (3, 2, 3, 96), torch.float32, scale=0.05, terms=terms, **way)


def test_runs_give_the_same_bits(emulated):
    student, teacher = torch.randn(3, 2, 120), torch.randn(2, 2, 120)
    way = {"cells": 2, "slices": 1, "fused": True, "vectors": True}
    first, second = (run(emulated, student, teacher, **way) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


SIZES = [(10, 2, 4, 4096, True, 16), (1, 1, 2, 16384, False, 4), (3, 5, 4, 24, True, 1)]


@pytest.mark.parametrize("sizes", [*SIZES, (10, 2, 4, 1024, True, 0)], ids=str)
def test_shared_memory_is_what_the_launch_asks_for(sizes, emulated):
    emulated.shared_bytes.restype = ctypes.c_int64
    assert kernels.shared_bytes(*sizes) == emulated.shared_bytes(*map(int, sizes))


H100 = Device(132, True, 233472, 232448)
PLANS = {
    # S, T, B, K, bytes: the plan. Ten crops, whose cluster of 16 has one or two blocks on each
    # processor; DINOv2's tokens; a small head; an image that fits into no cluster.
    (10, 2, 16, 65536, 2): (16, 4096),
    (10, 2, 16, 65536, 4): (16, 4096),
    (1, 1, 512, 65536, 2): (4, 16384),
    (10, 2, 256, 4096, 2): (2, 2048),
    (12, 2, 64, 262144, 4): None,
}


@pytest.mark.parametrize("sizes", PLANS, ids=str)
def test_cluster_plan(sizes):
    plan = cuda_kernel.cluster_plan(*sizes, False, H100)
    assert plan == PLANS[sizes]
    if plan is not None:
        S, T, _, K, itemsize = sizes
        cluster, width = plan
        assert cluster * width >= K > (cluster - 1) * width
        size = kernels.shared_bytes(S, T, itemsize, width, False, cluster)
        assert size <= H100.bytes_per_block


def test_no_clusters_before_sm_90():
    a100 = Device(108, False, 167936, 166912)
    assert cuda_kernel.cluster_plan(1, 1, 8, 1024, 2, False, a100) is None


def test_cells_leave_room_for_two_blocks():
    for num_student in (1, 10, 12):
        for itemsize in (2, 4):
            width = kernels.cell_width(num_student, 2, itemsize)
            size = kernels.shared_bytes(num_student, 2, itemsize, width, True, 0)
            assert size <= kernels.CELL_BYTES
    assert kernels.cell_width(200, 2, 4) is None
