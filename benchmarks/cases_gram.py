"""Losses on Gram and covariance matrices at the sizes of their papers. N samples, D features."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.registry import FORWARD_BACKWARD, Case, forward_backward, op_case
from fastssl import functional as F

LAMBD, EPS = 5e-3, 1e-5
VICREG_EPS = 1e-4


def cases(quick: bool) -> list[Case]:
    wide, tall = ((16, 64), (64, 16)) if quick else ((256, 8192), (4096, 2048))
    made = [make(*shape) for shape in (wide, tall) for make in (barlow_twins, vicreg)]
    made.append(koleo(*((48, 16) if quick else (4096, 384))))
    sizes = {
        # Global crops of ViT-S and ViT-L at 224 and 512 pixels, and a teacher of another width.
        "images": (8, 196, 384, 384) if not quick else (2, 9, 8, 8),
        "large_images": (2, 1024, 1024, 1024) if not quick else (1, 17, 8, 8),
        "batch": (8, 196, 384, 1024) if not quick else (2, 9, 8, 16),
    }
    for name, shape in sizes.items():
        for dtype in (torch.float32, torch.bfloat16):
            made.append(gram_loss(name, *shape, dtype, img_level=name != "batch"))
    return made


def barlow_twins_gram(z0: Tensor, z1: Tensor) -> Tensor:
    """The Gram identity, eager."""
    y0, y1 = (functional.batch_norm(z, None, None, training=True, eps=EPS) for z in (z0, z1))
    count = len(z0)
    diagonal = (y0 * y1).sum(0) / count
    squares = ((y0 @ y0.T) * (y1 @ y1.T)).sum() / count**2
    return (diagonal - 1).square().sum() + LAMBD * (squares - diagonal.square().sum())


def vicreg_gram(z0: Tensor, z1: Tensor) -> Tensor:
    """The Gram identity, eager."""
    loss, degrees, width = 25 * functional.mse_loss(z0, z1), len(z0) - 1, z0.shape[1]
    for z in (z0, z1):
        z = z - z.mean(0)
        variance = z.square().sum(0) / degrees
        loss = loss + 25 / 2 * functional.relu(1 - (variance + VICREG_EPS).sqrt()).mean()
        squares = (z @ z.T).square().sum() / degrees**2
        loss = loss + (squares - variance.square().sum()) / width
    return loss


def barlow_twins(N: int, D: int) -> Case:
    def function(z0, z1, backend: str | None) -> Tensor:
        return F.barlow_twins(z0, z1, lambd=LAMBD, eps=EPS, backend=backend)

    return _case("barlow_twins", function, barlow_twins_gram, N, D, products=1)


def vicreg(N: int, D: int) -> Case:
    def function(z0, z1, backend: str | None) -> Tensor:
        return F.vicreg(z0, z1, eps=VICREG_EPS, backend=backend)

    return _case("vicreg", function, vicreg_gram, N, D, products=2)


def koleo(N: int, D: int) -> Case:
    def make_inputs(device: torch.device) -> tuple:
        return torch.randn(N, D, device=device, requires_grad=True), torch.ones((), device=device)

    return op_case(
        "koleo",
        lambda x, backend: F.koleo(x, backend=backend),
        make_inputs,
        op="koleo",
        shape=f"N={N} D={D}",
        dtype=torch.float32,
        direction=FORWARD_BACKWARD,
        # Rows in and unit rows out; unit rows in, gradients out.
        bytes_moved=4 * 4 * N * D,
        flops=2 * N * N * D,
    )


def gram_loss(
    name: str, B: int, N: int, D: int, E: int, dtype: torch.dtype, img_level: bool
) -> Case:
    """A student beside its teacher, as anchoring finds them, if both are of one width."""

    def make_inputs(device: torch.device) -> tuple:
        teacher = torch.randn(B, N, E, device=device)
        student = torch.randn(B, N, D, device=device)
        if D == E:
            student = teacher + 0.5 * student
        one = torch.ones((), device=device)
        return student.to(dtype).requires_grad_(), teacher.to(dtype), one

    def function(student: Tensor, teacher: Tensor, backend: str | None) -> Tensor:
        return F.gram_loss(student, teacher, img_level=img_level, remove_neg=True, backend=backend)

    pairs = B * N * N if img_level else (B * N) ** 2
    return op_case(
        f"gram_loss/{name}",
        function,
        make_inputs,
        op="gram_loss",
        shape=f"B={B} N={N} D={D} E={E}",
        dtype=dtype,
        direction=FORWARD_BACKWARD,
        # Features in, their gradient out.
        bytes_moved=dtype.itemsize * B * N * (2 * D + E),
        flops=2 * pairs * (2 * D + E),
    )


def _case(op: str, function: Callable, gram: Callable, N: int, D: int, products: int) -> Case:
    """`eager` is the D x D form; the rival of a wide batch the eager Gram form."""

    def make_inputs(device: torch.device) -> tuple:
        first = torch.randn(N, D, device=device)
        second = 0.8 * first + 0.6 * torch.randn(N, D, device=device)
        return first.requires_grad_(), second.requires_grad_(), torch.ones((), device=device)

    def with_backend(backend: str | None) -> Callable:
        return lambda *inputs: function(*inputs, backend=backend)

    def contenders(device: torch.device) -> dict[str, Callable]:
        found = {
            "eager": forward_backward(with_backend("reference")),
            "compiled": forward_backward(torch.compile(with_backend("reference"))),
            "fastssl": forward_backward(with_backend(None)),
        }
        if N < D:
            found["rival"] = forward_backward(gram)
        return found

    bases = ("eager", "compiled", "rival") if N < D else ("eager", "compiled")
    flops = 8 * N * N * D if N < D else 2 * (products + 2) * N * D * D
    return Case(
        name=f"{op}/{'wide' if N < D else 'tall'}/float32",
        shape=f"N={N} D={D}",
        dtype="float32",
        direction=FORWARD_BACKWARD,
        make_inputs=make_inputs,
        contenders=contenders,
        ratios={base: (base, "fastssl") for base in bases},
        tolerance=1e-4,
        # Features in, y out; y in, gradients out.
        bytes_moved=4 * 8 * N * D,
        flops=flops,
        op=op,
    )
