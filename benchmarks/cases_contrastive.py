"""Contrastive losses at SimCLR's and MoCo's sizes. N rows, D dimensions, M negatives.

Eager is the reference, which is the published form; the rival of nt_xent is the form that keeps
the logits without a mask, each view's own and crossed products apart, as SimCLR's code has it.
"""

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.registry import FORWARD_BACKWARD, Case, op_case
from fastssl import functional as F

TEMPERATURE = 0.2
DTYPES = (torch.float32, torch.bfloat16)


def cases(quick: bool) -> list[Case]:
    images, queries, queue, D = (64, 16, 512, 32) if quick else (2048, 256, 65536, 128)
    made = [nt_xent(images, D, dtype) for dtype in DTYPES]
    made += [moco(queries, queue, D, dtype) for dtype in DTYPES]
    made += [in_batch(2 * images, D, dtype) for dtype in DTYPES]
    return [*made, memory_bank(queries, queue // 16, D)]


def _features(num_rows: int, D: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(num_rows, D, device=device).to(dtype)


def _bank(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return functional.normalize(torch.randn(shape, device=device), dim=-1).to(dtype)


def four_products(z0: Tensor, z1: Tensor) -> Tensor:
    """SimCLR's published form: both views within and across, the own row pushed down by 1e9."""
    z0, z1 = functional.normalize(z0.float(), dim=1), functional.normalize(z1.float(), dim=1)
    labels = torch.arange(z0.shape[0], device=z0.device)
    own = 1e9 * torch.eye(z0.shape[0], device=z0.device)
    losses = []
    for a, b in ((z0, z1), (z1, z0)):
        logits = torch.cat([a @ b.t() / TEMPERATURE, a @ a.t() / TEMPERATURE - own], dim=1)
        losses.append(functional.cross_entropy(logits, labels))
    return sum(losses) / 2


def nt_xent(images: int, D: int, dtype: torch.dtype) -> Case:
    def make_inputs(device: torch.device) -> tuple:
        views = (_features(images, D, device, dtype).requires_grad_() for _ in range(2))
        return *views, torch.ones((), device=device)

    def function(z0, z1, backend: str | None) -> Tensor:
        return F.nt_xent(z0, z1, temperature=TEMPERATURE, backend=backend)

    rows = 2 * images
    return op_case(
        "nt_xent",
        function,
        make_inputs,
        op="nt_xent",
        shape=f"2N={rows} D={D}",
        dtype=dtype,
        direction=FORWARD_BACKWARD,
        bytes_moved=dtype.itemsize * rows * D * 3,
        # Each pair of rows once forward and once backward, and the gradient's product.
        flops=2 * 2 * rows * rows * D,
        rival=four_products,
    )


def moco(queries: int, queue: int, D: int, dtype: torch.dtype) -> Case:
    """One positive against a queue; the keys come from the momentum encoder."""

    def make_inputs(device: torch.device) -> tuple:
        return (
            _features(queries, D, device, dtype).requires_grad_(),
            _features(queries, D, device, dtype),
            _bank((queue, D), device, dtype),
            torch.ones((), device=device),
        )

    def function(q, k, negatives, backend: str | None) -> Tensor:
        options = {"temperature": TEMPERATURE, "in_batch_negatives": False, "backend": backend}
        return F.info_nce(q, k, negatives=negatives, **options)

    return op_case(
        "info_nce/queue",
        function,
        make_inputs,
        op="info_nce",
        shape=f"N={queries} M={queue} D={D}",
        dtype=dtype,
        direction=FORWARD_BACKWARD,
        bytes_moved=dtype.itemsize * queue * D,
        flops=2 * 2 * queries * queue * D,
    )


def in_batch(rows: int, D: int, dtype: torch.dtype) -> Case:
    """Queries against the batch's keys, a learnable temperature, all gradients."""

    def make_inputs(device: torch.device) -> tuple:
        return (
            _features(rows, D, device, dtype).requires_grad_(),
            _features(rows, D, device, dtype).requires_grad_(),
            torch.tensor(TEMPERATURE, device=device, requires_grad=True),
            torch.ones((), device=device),
        )

    def function(q, k, temperature, backend: str | None) -> Tensor:
        return F.info_nce(q, k, temperature=temperature, backend=backend)

    return op_case(
        "info_nce/in_batch",
        function,
        make_inputs,
        op="info_nce",
        shape=f"N={rows} D={D}",
        dtype=dtype,
        direction=FORWARD_BACKWARD,
        bytes_moved=dtype.itemsize * rows * D * 5,
        flops=3 * 2 * rows * rows * D,
    )


def memory_bank(queries: int, negatives: int, D: int) -> Case:
    """Negatives drawn for each query, as NPID and PIRL do: bound by reading them once."""

    def make_inputs(device: torch.device) -> tuple:
        return (
            _features(queries, D, device, torch.float32).requires_grad_(),
            _features(queries, D, device, torch.float32),
            _bank((queries, negatives, D), device, torch.float32),
            torch.ones((), device=device),
        )

    def function(q, k, bank, backend: str | None) -> Tensor:
        options = {"temperature": TEMPERATURE, "in_batch_negatives": False, "backend": backend}
        return F.info_nce(q, k, negatives=bank, **options)

    return op_case(
        "info_nce/memory_bank",
        function,
        make_inputs,
        op="info_nce",
        shape=f"N={queries} M={negatives} D={D}",
        dtype=torch.float32,
        direction=FORWARD_BACKWARD,
        bytes_moved=4 * queries * negatives * D,
    )
