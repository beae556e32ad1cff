"""The losses of DINO and iBOT at the sizes of their papers.

S student views, T teacher views, B images, K prototypes, D features.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.registry import FORWARD_BACKWARD, Case, forward_backward, op_case
from fastssl import functional as F

S, T = 10, 2
TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}
DTYPES = (torch.float32, torch.bfloat16)


def cases(quick: bool) -> list[Case]:
    K, images, tokens, many = (2048, 2, 8, 16) if quick else (65536, 16, 512, 2048)
    made = [multi_crop(images, K, dtype) for dtype in DTYPES]
    made += [masked_tokens(tokens, K, dtype) for dtype in DTYPES]
    return [*made, linear_multi_crop(images, K), linear_masked_tokens(many, K)]


def _logits(views: int, batch: int, K: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(views, batch, K, device=device).to(dtype)


def pairwise_loop(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    """One softmax per view and one cross-entropy per pair of different views, as DINO's paper has
    it (arXiv 2104.14294, Algorithm 1)."""
    targets = [
        functional.softmax((t.float() - center) / TEMPS["teacher_temp"], -1) for t in teacher
    ]
    scores = [s.float() / TEMPS["student_temp"] for s in student]
    terms = []
    for i, target in enumerate(targets):
        for j, score in enumerate(scores):
            if i != j:
                terms.append(-(target * functional.log_softmax(score, -1)).sum(-1).mean())
    return sum(terms) / len(terms)


def multi_crop(batch: int, K: int, dtype: torch.dtype) -> Case:
    def make_inputs(device: torch.device) -> tuple:
        student = _logits(S, batch, K, device, dtype).requires_grad_()
        teacher = _logits(T, batch, K, device, dtype)
        center = 0.1 * torch.randn(K, device=device)
        return student, teacher, center, torch.ones((), device=device)

    def function(student, teacher, center, backend: str | None) -> Tensor:
        return F.dino_cross_entropy(student, teacher, center, **TEMPS, backend=backend)

    return op_case(
        "dino_cross_entropy/multi_crop",
        function,
        make_inputs,
        op="dino_cross_entropy",
        shape=f"S={S} T={T} B={batch} K={K}",
        dtype=dtype,
        direction=FORWARD_BACKWARD,
        # Every logit in forward and in backward, and the gradient.
        bytes_moved=dtype.itemsize * batch * K * (2 * (S + T) + S),
        rival=pairwise_loop,
    )


def masked_tokens(rows: int, K: int, dtype: torch.dtype) -> Case:
    """iBOT's patches: weighted rows of a fixed capacity, all of them in use."""

    def make_inputs(device: torch.device) -> tuple:
        student = _logits(1, rows, K, device, dtype).requires_grad_()
        teacher = _logits(1, rows, K, device, dtype)
        weights = torch.rand(rows, device=device) / rows
        count = torch.tensor(rows, device=device)
        center = 0.1 * torch.randn(K, device=device)
        return student, teacher, center, weights, count, torch.ones((), device=device)

    def function(student, teacher, center, weights, count, backend: str | None) -> Tensor:
        return F.dino_cross_entropy(
            student,
            teacher,
            center,
            **TEMPS,
            row_weights=weights,
            num_rows=count if backend is None else None,
            skip_same_view=False,
            reduction="sum",
            backend=backend,
        )

    return op_case(
        "dino_cross_entropy/masked_tokens",
        function,
        make_inputs,
        op="dino_cross_entropy",
        shape=f"M={rows} K={K}",
        dtype=dtype,
        direction=FORWARD_BACKWARD,
        bytes_moved=dtype.itemsize * rows * K * 5,
    )


def linear_multi_crop(batch: int, K: int, D: int = 256) -> Case:
    return _linear("multi_crop", f"rows={S * batch} K={K} D={D}", (S, T, batch, K, D))


def linear_masked_tokens(rows: int, K: int, D: int = 256) -> Case:
    return _linear("masked_tokens", f"rows={rows} K={K} D={D}", (1, 1, rows, K, D))


def _linear(name: str, shape: str, sizes: tuple[int, int, int, int, int]) -> Case:
    """The rival stores the logits: the layer, then fastssl's own loss."""
    num_student, num_teacher, batch, K, D = sizes
    skip = num_student > 1

    def make_inputs(device: torch.device) -> tuple:
        student = torch.randn(num_student, batch, D, device=device)
        teacher = torch.randn(num_teacher, batch, D, device=device)
        layers = [torch.randn(K, D, device=device) * D**-0.5 for _ in range(2)]
        return (
            functional.normalize(student, dim=-1).requires_grad_(),
            layers[0].requires_grad_(),
            functional.normalize(teacher, dim=-1),
            layers[1],
            0.1 * torch.randn(K, device=device),
            torch.ones((), device=device),
        )

    def linear(backend: str | None) -> Callable:
        def call(*inputs: Tensor) -> Tensor:
            return F.linear_dino_cross_entropy(
                *inputs, **TEMPS, skip_same_view=skip, backend=backend
            )

        return call

    def stored(student, layer, teacher, teacher_layer, center) -> Tensor:
        return F.dino_cross_entropy(
            functional.linear(student, layer),
            functional.linear(teacher, teacher_layer),
            center,
            **TEMPS,
            skip_same_view=skip,
        )

    def contenders(device: torch.device) -> dict[str, Callable]:
        return {
            "eager": forward_backward(linear("reference")),
            "compiled": forward_backward(torch.compile(linear("reference"))),
            "fastssl": forward_backward(linear(None)),
            "rival": forward_backward(stored),
        }

    rows = (3 * num_student + num_teacher) * batch
    return Case(
        name=f"linear_dino_cross_entropy/{name}/float32",
        shape=shape,
        dtype="float32",
        direction=FORWARD_BACKWARD,
        make_inputs=make_inputs,
        contenders=contenders,
        ratios={base: (base, "fastssl") for base in ("eager", "compiled", "rival")},
        tolerance=1e-4,
        bytes_moved=4 * K * D * 5,
        flops=2 * rows * K * D,
        op="linear_dino_cross_entropy",
    )
