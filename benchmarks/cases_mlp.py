"""Linear layers and MLPs in bf16 autocast at the sizes of ViT-B and Hiera-T, eight layers in a row.

A single layer called again and again would get its memory back from the allocator; in a row, as in
a training step, gradients and casts of weights are freshly mapped. M rows, D features.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.registry import FORWARD_BACKWARD, Case, forward_backward
from fastssl import functional as F

LAYERS = 8
# The sums of eight residual layers, in bf16.
TOLERANCE = 5e-2
# Rows and features at batch 8: ViT-B's encoder on 50 visible tokens, its decoder on 197; one of
# ViT-B on all tokens; Hiera-T's first stage on 19 mask units, its decoder.
SIZES = {
    "vit_b_encoder": (400, 768),
    "vit_b_decoder": (1576, 512),
    "vit_b_full": (1576, 768),
    "hiera_t_stage1": (9728, 96),
    "hiera_t_decoder": (1568, 512),
}


def cases(quick: bool, scale: int) -> list[Case]:
    sizes = {"tiny": (24, 16)} if quick else SIZES
    return [
        make(name, scale * M, D) for make in (linear, gelu_mlp) for name, (M, D) in sizes.items()
    ]


def linear(name: str, M: int, D: int) -> Case:
    """The qkv projection; its three parts are averaged for the next layer."""

    def layer(x: Tensor, weights: list[Tensor], backend: str | None) -> Tensor:
        y = F.linear(x, *weights, backend=backend)
        return y.view(M, 3, D).mean(1)

    return _case("linear", name, layer, M, D, ((3 * D, D), (3 * D,)), 3)


def gelu_mlp(name: str, M: int, D: int) -> Case:
    def layer(x: Tensor, weights: list[Tensor], backend: str | None) -> Tensor:
        return F.gelu_mlp(x, *weights, backend=backend)

    return _case("gelu_mlp", name, layer, M, D, ((4 * D, D), (4 * D,), (D, 4 * D), (D,)), 8)


def _case(
    op: str,
    name: str,
    layer: Callable[[Tensor, list[Tensor], str | None], Tensor],
    M: int,
    D: int,
    shapes: tuple[tuple[int, ...], ...],  # of a layer's parameters
    products: int,  # of M x D x D in a layer, forward
) -> Case:
    def make_inputs(device: torch.device) -> tuple:
        def draw(*shape: int) -> Tensor:
            scale = shape[-1] ** -0.5
            return (scale * torch.randn(*shape, device=device)).requires_grad_()

        weights = [draw(*shape) for _ in range(LAYERS) for shape in shapes]
        return draw(M, D), *weights, torch.randn(M, D, device=device)

    def with_backend(backend: str | None) -> Callable[..., Tensor]:
        def stack(x: Tensor, *weights: Tensor) -> Tensor:
            with torch.autocast(x.device.type, torch.bfloat16):
                for i in range(0, len(weights), len(shapes)):
                    x = x + layer(x, weights[i : i + len(shapes)], backend)
            return x

        return stack

    def contenders(device: torch.device) -> dict[str, Callable]:
        return {
            "eager": forward_backward(with_backend("reference")),
            "compiled": forward_backward(torch.compile(with_backend("reference"))),
            "fastssl": forward_backward(with_backend(None)),
            "fastssl compiled": forward_backward(torch.compile(with_backend(None))),
        }

    return Case(
        name=f"{op}/{name}/bfloat16",
        shape=f"M={M} D={D}, {LAYERS} layers",
        dtype="bfloat16",
        direction=FORWARD_BACKWARD,
        make_inputs=make_inputs,
        contenders=contenders,
        # What lies between the layers is compiled on both sides or on none.
        ratios={"eager": ("eager", "fastssl"), "compiled": ("compiled", "fastssl compiled")},
        tolerance=TOLERANCE,
        # Parameters in, gradients out; what lies between may stay in a cache.
        bytes_moved=LAYERS * products * 8 * D * D,
        flops=LAYERS * 3 * products * 2 * M * D * D,
        op=op,
    )
