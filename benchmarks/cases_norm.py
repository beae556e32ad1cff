"""Residual add and LayerNorm between two branches of a block, as under bf16 autocast.

B images, N tokens, D channels: a float32 residual stream, and for bfloat16 cases a bf16 branch and
a bf16 result. Sizes are those of MAE steps at batch 8: Hiera-T's first two stages (40 % of the
units kept), the decoder of ViT-B and its encoder.
"""

import torch
from torch import Tensor

from benchmarks.registry import FORWARD, FORWARD_BACKWARD, Case, Contender, forward_only
from fastssl import functional as F

SHAPES = ((8, 1216, 96), (8, 304, 192), (8, 196, 512), (8, 50, 768))
DTYPES = (torch.float32, torch.bfloat16)
KEEP_PROB = 0.8


def cases(quick: bool, scale: int) -> list[Case]:
    shapes = [(scale * B, N, D) for B, N, D in (((2, 5, 96),) if quick else SHAPES)]
    made = [
        add_layer_norm(shape, dtype, direction)
        for shape in shapes
        for dtype in DTYPES
        for direction in (FORWARD, FORWARD_BACKWARD)
    ]
    made += [add_layer_norm(shapes[-1], torch.bfloat16, FORWARD_BACKWARD, scaled=True)]
    return [*made, layer_norm(shapes[-1], torch.bfloat16)]


def _both_ways(function: Contender) -> Contender:
    """Both outputs and all gradients; the last two inputs are the gradients of the outputs."""

    def call(*inputs) -> tuple[Tensor, ...]:
        *arguments, dresidual, dnormed = inputs
        residual, normed = function(*arguments)
        leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
        grads = torch.autograd.grad((residual, normed), leaves, (dresidual, dnormed))
        return (residual.detach(), normed.detach(), *grads)

    return call


def _forward(function: Contender) -> Contender:
    return forward_only(lambda *inputs: function(*inputs[:-2]))


def _case(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    direction: str,
    has_branch: bool,
    scaled: bool,
) -> Case:
    batch, _, dim = shape

    def make_inputs(device: torch.device) -> tuple:
        def random(*size: int, of: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(size, device=device).to(of)

        x = random(*shape).requires_grad_()
        branch = random(*shape, of=dtype).requires_grad_() if has_branch else None
        weight, bias, gamma = (random(dim).requires_grad_() for _ in range(3))
        keep = torch.rand(batch, device=device) < KEEP_PROB
        scales = (gamma, keep.float() / KEEP_PROB) if scaled else (None, None)
        grads = random(*shape), random(*shape, of=dtype)
        return x, branch, weight, bias, *scales, *grads

    def contenders(device: torch.device) -> dict[str, Contender]:
        wrap = _forward if direction == FORWARD else _both_ways

        def of(backend: str | None) -> Contender:
            def call(x, branch, weight, bias, gamma, scale) -> tuple[Tensor, Tensor]:
                settings = {"gamma": gamma, "scale": scale, "dtype": dtype, "backend": backend}
                return F.add_layer_norm(x, branch, weight, bias, **settings)

            return call

        return {
            "eager": wrap(of("reference")),
            "compiled": wrap(torch.compile(of("reference"))),
            "fastssl": wrap(of(None)),
        }

    short = str(dtype).removeprefix("torch.")
    return Case(
        name=f"{name}/{'x'.join(map(str, shape[1:]))}/{short}",
        shape=f"B={batch} N={shape[1]} D={dim}",
        dtype=short,
        direction=direction,
        make_inputs=make_inputs,
        contenders=contenders,
        ratios={base: (base, "fastssl") for base in ("eager", "compiled")},
        # Even for float32 values normed of bf16 cases may round either way.
        tolerance=1e-4 if dtype == torch.float32 else 2e-2,
        bytes_moved=_bytes(shape, dtype, direction, has_branch, scaled),
        op="add_layer_norm",
    )


def _bytes(
    shape: tuple[int, ...], dtype: torch.dtype, direction: str, has_branch: bool, scaled: bool
) -> int:
    half, values = dtype.itemsize, shape[0] * shape[1] * shape[2]
    # x and normed; with a branch that, too, and the residual.
    per_value = 4 + half + (half + 4 if has_branch else 0)
    if direction == FORWARD_BACKWARD:
        # dnormed, the saved stream, dx; with a branch dresidual and dbranch, too (for a plain sum
        # of one dtype dx is both gradients); for gamma the branch.
        per_value += half + 4 + 4
        per_value += (4 + (half if scaled or half != 4 else 0)) if has_branch else 0
        per_value += half if scaled else 0
    return values * per_value


def add_layer_norm(
    shape: tuple[int, ...], dtype: torch.dtype, direction: str, scaled: bool = False
) -> Case:
    """`scaled`: with LayerScale and stochastic depth."""
    name = "add_layer_norm/scaled" if scaled else "add_layer_norm"
    if direction == FORWARD:
        name += "/forward"
    return _case(name, shape, dtype, direction, True, scaled)


def layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    """A float32 stream to a half-precision result, without a branch."""
    return _case("add_layer_norm/norm", shape, dtype, FORWARD_BACKWARD, False, False)
