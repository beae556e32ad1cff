"""linear_dino_cross_entropy with backend="cuda", and dino_cross_entropy in two passes, on CPU
tensors: the ops as they are, on kernels compiled for the host (tests/cuda_emulator.h)."""

import ctypes
import math

import pytest
import torch
from torch import Tensor

from fastssl import functional as F
from fastssl.kernels.common import cuda_view_cross_entropy as kernels
from fastssl.kernels.common import dispatch
from fastssl.kernels.common.cuda_device import Device
from fastssl.kernels.dino_cross_entropy import cuda_kernel as dino
from fastssl.kernels.linear_dino_cross_entropy import blocks
from tests.kernels import test_dino_cross_entropy as dino_tests
from tests.kernels.cuda_schemas import stand_ins
from tests.kernels.test_linear_dino_cross_entropy import (
    TEMPS,
    call,
    check_against_truth,
    make_inputs,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
THREADS = 64


def structure(*fields: tuple[str, type]) -> type[ctypes.Structure]:
    return type("Fields", (ctypes.Structure,), {"_fields_": fields})


def named(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


# Of view_cross_entropy.cuh.
Problem = structure(
    *named(ctypes.c_void_p, "student teacher temps center log_u log_v weights num_rows"),
    *named(ctypes.c_void_p, "student_scale teacher_scale"),
    *named(ctypes.c_int64, "B K log_u_stride"),
    *named(ctypes.c_int, "S T"),
    *named(ctypes.c_double, "student_temp teacher_temp"),
    *named(ctypes.c_bool, "skip_same_view mean"),
)
Pass = structure(
    *named(ctypes.c_int, "cells W slices columns"),
    *named(ctypes.c_void_p, "parts sums student_stats teacher_stats per_image dstudent"),
)


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(address(tensor)) for tensor in tensors]


class Ops:
    """The ops of csrc/cuda/{dino,linear_dino}_cross_entropy.cu on the emulator."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def problem(self, student, teacher, *numbers, **tensors):
        assert student.is_contiguous() and teacher.is_contiguous()
        assert student.dtype == teacher.dtype
        log_u = tensors.get("log_u")
        return Problem(
            **{name: address(tensor) for name, tensor in tensors.items()},
            **{"student": address(student), "teacher": address(teacher)},
            **{"S": student.shape[0], "T": teacher.shape[0], "B": student.shape[1]},
            **{"K": student.shape[2], "student_temp": numbers[0], "teacher_temp": numbers[1]},
            log_u_stride=0 if log_u is None or log_u.shape[0] == 1 else log_u.stride(0),
        )

    def kind(self, *tensors: Tensor) -> tuple[int, int, int]:
        whole = all(x.shape[2] * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0 for x in tensors)
        return DTYPES.index(tensors[0].dtype), int(whole), THREADS

    def dino_cross_entropy_parts(
        self, student, teacher, student_temp, teacher_temp, temps, center, log_u, student_scale,
        teacher_scale, num_rows, width, first, slices, parts, teacher_sums,
    ):  # fmt: skip
        tensors = {"temps": temps, "center": center, "log_u": log_u, "num_rows": num_rows}
        tensors |= {"student_scale": student_scale, "teacher_scale": teacher_scale}
        problem = self.problem(student, teacher, student_temp, teacher_temp, **tensors)
        cells, columns = -(-student.shape[2] // width), parts.shape[2]
        assert first + cells <= columns
        pass_ = Pass(cells, width, slices, columns, address(parts) + 4 * first)
        pass_.sums = address(teacher_sums)
        self.library.view_parts(
            *self.kind(student, teacher), ctypes.byref(problem), ctypes.byref(pass_)
        )

    def dino_cross_entropy_collapse(self, num_student, num_teacher, num_rows, columns, parts):
        problem = Problem(S=num_student, T=num_teacher, B=parts.shape[0])
        problem.num_rows = address(num_rows)
        self.library.view_collapse(
            *(THREADS, ctypes.byref(problem), *pointers(parts)),
            *(ctypes.c_int64(parts.shape[2]), columns),
        )

    def dino_cross_entropy_combine(
        self, parts, log_v, row_weights, num_rows, skip, mean, per_image, student_stats,
        teacher_stats, loss, entropy, norm,
    ):  # fmt: skip
        sizes = {"S": student_stats.shape[0], "T": teacher_stats.shape[0], "B": parts.shape[0]}
        problem = Problem(**sizes, skip_same_view=skip, mean=mean)
        problem.log_v, problem.weights = address(log_v), address(row_weights)
        problem.num_rows = address(num_rows)
        self.library.view_combine(
            *(THREADS, ctypes.byref(problem), *pointers(parts), parts.shape[2]),
            *pointers(per_image, student_stats, teacher_stats, loss, entropy, norm),
        )

    def dino_cross_entropy_gradient(
        self, dloss, student, teacher, student_temp, teacher_temp, temps, center, log_u,
        student_scale, teacher_scale, num_rows, row_weights, skip, width, student_stats,
        teacher_stats, norm, dstudent,
    ):  # fmt: skip
        tensors = {"temps": temps, "center": center, "log_u": log_u, "num_rows": num_rows}
        tensors |= {"student_scale": student_scale, "teacher_scale": teacher_scale}
        tensors["weights"] = row_weights
        problem = self.problem(student, teacher, student_temp, teacher_temp, **tensors)
        problem.skip_same_view = skip
        self.library.view_gradient(
            *self.kind(student, teacher, dstudent),
            *(ctypes.byref(problem), width),
            *pointers(dloss, student_stats, teacher_stats, norm, dstudent),
        )

    def linear_dino_prototype_scale(self, prototypes, scale):
        size, dim = prototypes.shape
        self.library.linear_dino_prototype_scale(
            *(DTYPES.index(prototypes.dtype), int(dim % 4 == 0), THREADS, *pointers(prototypes)),
            *(ctypes.c_int64(size), dim, *pointers(scale)),
        )

    def linear_dino_prototype_gradient(self, product, prototypes, scale, dprototypes):
        size, dim = prototypes.shape
        types = (DTYPES.index(prototypes.dtype), DTYPES.index(product.dtype))
        self.library.linear_dino_prototype_gradient(
            *(*types, int(dim % 4 == 0), THREADS, *pointers(product, prototypes, scale)),
            *(ctypes.c_int64(size), dim, *pointers(dprototypes)),
        )


@pytest.fixture(autouse=True)
def cuda_on_the_host(emulated, monkeypatch, poisoned_memory):
    """backend="cuda" on CPU tensors: cells of 64 prototypes, blocks of 200, no clusters."""
    ops = Ops(emulated)
    facts = Device(2, False, 233472, 232448)
    monkeypatch.setattr(torch.ops, "fastssl_cuda", stand_ins(ops), raising=False)
    monkeypatch.setattr(dispatch, "cannot_run_cuda", lambda *tensors: None)
    monkeypatch.setattr(kernels.libraries, "why_no_cuda_library", lambda: None)
    monkeypatch.setattr(kernels, "CELL_WIDTHS", (64,))
    monkeypatch.setattr(kernels, "device_facts", lambda device: facts)
    monkeypatch.setattr(dino, "device_facts", lambda device: facts)
    monkeypatch.setattr(blocks, "CPU_BLOCKS", ((None, 200),))


# S, T, B, K, D, E: one of everything, primes, three blocks of whole vectors with a short last one,
# more teacher than student views.
SHAPES = [
    (2, 1, 1, 1, 1, 1),
    (3, 2, 5, 13, 7, 11),
    (2, 5, 2, 401, 8, 8),
    pytest.param((4, 2, 3, 424, 40, 16), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_against_float64(shape, normalize, dtype):
    inputs = make_inputs(shape, dtype, "cpu")
    check_against_truth(inputs, "cuda", normalize_prototypes=normalize)


@pytest.mark.parametrize("per_view", [False, True])
def test_linear_with_vectors_weights_and_count(per_view):
    S, T, B, K = 3, 2, 5, 330
    inputs = make_inputs((S, T, B, K, 8, 8), torch.float32, "cpu")[:4]
    log_u = torch.randn(T, K) if per_view else torch.randn(K)
    logits = inputs[2] @ torch.nn.functional.normalize(inputs[3], dim=1).T
    scores = logits.double() / 0.04 + log_u.double().reshape(-1, 1, K)
    log_v = -scores.logsumexp(-1) + 0.3 * torch.randn(T, B)
    inputs[0][:, 3:], inputs[2][:, 3:] = math.nan, math.nan
    _, grads = check_against_truth(
        inputs,
        "cuda",
        1e-5,
        log_u=log_u,
        log_v=log_v.float(),
        row_weights=torch.rand(B),
        num_rows=torch.tensor(3),
        normalize_prototypes=True,
        reduction="sum",
    )
    assert (grads[0][:, 3:] == 0).all()


def test_linear_with_products_in_another_dtype():
    """bf16 products of float32 parameters, whose gradient is float32."""
    inputs = make_inputs((4, 2, 6, 300, 32, 32), torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        check_against_truth(inputs, "cuda", 2**-7, normalize_prototypes=True)


def test_linear_with_extreme_logits():
    features, prototypes, *rest = make_inputs((3, 2, 1, 300, 4, 4), torch.float32, "cpu")
    rest[1] = 1e4 * rest[1]
    outputs, grads = call((features, 1e4 * prototypes, *rest), "cuda")
    assert all(torch.isfinite(value).all() for value in (*outputs, *grads))
    assert outputs[0] > 1e4


def test_linear_runs_give_the_same_bits():
    inputs = make_inputs((4, 2, 5, 301, 24, 24), torch.float32, "cpu")
    first, second = (call(inputs, "cuda", normalize_prototypes=True) for _ in range(2))
    pairs = zip(first[0] + first[1], second[0] + second[1], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_linear_without_images():
    (loss, mean, entropy), (dfeatures, dprototypes) = call(
        make_inputs((3, 2, 0, 50, 4, 4), torch.float32, "cpu"), "cuda"
    )
    assert loss == 0 and entropy == 0 and (mean == 0).all()
    assert dfeatures.shape == (3, 0, 4) and (dprototypes == 0).all()


def test_too_many_views_are_refused_by_name():
    features = torch.zeros(300, 1, 4)
    prototypes = torch.zeros(8, 4)
    tensors = (features, prototypes, features, prototypes)
    with pytest.raises(ValueError, match="300 x 300 views do not fit into shared memory"):
        F.linear_dino_cross_entropy(*tensors, **TEMPS, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 2, 3, 528), (3, 2, 2, 131)], ids=str)
def test_dino_in_two_passes(shape, dtype):
    """The other half, with_gradient, runs its kernels in test_cuda_emulated.py."""
    inputs = dino_tests.make_logits(shape, dtype, "cpu")
    dino_tests.check_against_truth(inputs, "cuda")
