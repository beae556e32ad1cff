"""Whole training steps of masked autoencoders beside other people's, in bf16 autocast.

Those are transformers' models and, for Hiera-L, the model in plain torch as published. Ours eager
meets theirs eager, ours compiled theirs compiled, with equal weights, images, noise and the same
fused AdamW.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import published_hiera
from benchmarks.graphs import Graphed
from benchmarks.registry import FORWARD, FORWARD_BACKWARD, STEP, Case, Contender
from fastssl.models import (
    Hiera,
    MaskedAutoencoderViT,
    mae_hiera_base_224,
    mae_hiera_large_224,
    mae_hiera_tiny_224,
    mae_vit_base_patch16,
)
from fastssl.models.hiera import WIDTHS

try:
    import transformers
except ImportError:
    transformers = None

TRANSFORMERS, PUBLISHED = "transformers", "published"
# From so many blocks on a model is compiled block by block, which spares minutes.
DEEP = 48
# Both sides compute in bf16, each in an order of its own: the gradient of Hiera's first layer is 5
# to 6 % off float32's in transformers' model as in ours.
TOLERANCE = 1e-1
# Gradients that the contenders must agree on: those of the first and of the last layer.
LANDMARKS = (("patch_embed.proj.weight", "projection.weight"), "decoder_pred.weight")


@dataclass(frozen=True)
class Family:
    """A model of ours and somebody's equal, and what they take."""

    rival: str
    name: str
    shape: str
    image_side: int
    noise_size: int
    ours: Callable[[], nn.Module]
    theirs: Callable[[], tuple[nn.Module, dict[str, Tensor]]]  # the model, its official state dict

    @property
    def is_installed(self) -> bool:
        return self.rival != TRANSFORMERS or transformers is not None


def cases(quick: bool, scale: int) -> list[Case]:
    batch = 2 if quick else 8 * scale
    families = (_vit(quick), *(_hiera(size, quick) for size in FACTORIES))
    steps = [
        _step_case(family, batch, direction, compiled=not quick)
        for family in families
        for direction in (FORWARD_BACKWARD, STEP)
    ]
    return [*steps, *(_hiera_forward(size, batch, quick) for size in ("base", "large"))]


def ratios(rival: str) -> dict[str, tuple[str, str]]:
    return {"eager": (rival, "fastssl"), "compiled": (f"{rival} compiled", "fastssl compiled")}


def _vit(quick: bool) -> Family:
    side = 64 if quick else 224
    ours = {"img_size": side, "norm_pix_loss": True}
    theirs = {"image_size": side, "norm_pix_loss": True, "layer_norm_eps": 1e-6}
    if quick:
        ours |= {"embed_dim": 48, "depth": 2, "num_heads": 3}
        ours |= {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
        theirs |= {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
        theirs |= {"intermediate_size": 192, "decoder_hidden_size": 32}
        theirs |= {"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
        theirs |= {"decoder_intermediate_size": 128}

    def build_theirs() -> tuple[nn.Module, dict[str, Tensor]]:
        from fastssl.models.transformers_keys import official

        config = transformers.ViTMAEConfig(**theirs, attn_implementation="sdpa")
        model = transformers.ViTMAEForPreTraining(config)
        return model, official(model.state_dict())

    return Family(
        TRANSFORMERS,
        "mae_vit_base_step",
        f"{side}x{side} mask 0.75",
        side,
        (side // 16) ** 2,
        lambda: mae_vit_base_patch16(**ours),
        build_theirs,
    )


FACTORIES = {
    "tiny": mae_hiera_tiny_224,
    "base": mae_hiera_base_224,
    "large": mae_hiera_large_224,
}
RIVALS = {"tiny": TRANSFORMERS, "base": TRANSFORMERS, "large": PUBLISHED}


def _width(size: str, quick: bool) -> dict[str, Any]:
    """embed_dim, num_heads and stages."""
    return WIDTHS[size] | ({"embed_dim": 16, "stages": (1, 1, 1, 1)} if quick else {})


def _hiera(size: str, quick: bool) -> Family:
    side = 64 if quick else 224
    width = _width(size, quick)
    decoder = (32, 1, 2) if quick else (512, 8, 16)

    def build_ours() -> nn.Module:
        return FACTORIES[size](
            input_size=(side, side),
            **width,
            decoder_embed_dim=decoder[0],
            decoder_depth=decoder[1],
            decoder_num_heads=decoder[2],
        )

    def build_theirs() -> tuple[nn.Module, dict[str, Tensor]]:
        if RIVALS[size] == PUBLISHED:
            model = published_hiera.MaskedAutoencoder(side, **width, decoder=decoder)
            # Our weights: plain torch's are not those of a masked autoencoder.
            model.load_state_dict(build_ours().state_dict())
            return model, model.state_dict()
        from fastssl.models.transformers_keys import official

        config = transformers.HieraConfig(
            image_size=[side, side],
            **_transformers_names(width),
            num_query_pool=2,
            decoder_hidden_size=decoder[0],
            decoder_depth=decoder[1],
            decoder_num_heads=decoder[2],
        )
        model = transformers.HieraForPreTraining(config)
        return model, official(model.state_dict())

    return Family(
        RIVALS[size],
        f"mae_hiera_{size}_step",
        f"{side}x{side} mask 0.6",
        side,
        (side // 32) ** 2,
        build_ours,
        build_theirs,
    )


def _transformers_names(width: dict[str, Any]) -> dict[str, Any]:
    heads = [width["num_heads"] << stage for stage in range(len(width["stages"]))]
    return {"embed_dim": width["embed_dim"], "num_heads": heads, "depths": list(width["stages"])}


def _hiera_forward(size: str, batch: int, quick: bool) -> Case:
    """Inference of the classifier's trunk: all tokens, three poolings."""
    side, width, rival = 64 if quick else 224, _width(size, quick), RIVALS[size]

    def contenders(device: torch.device) -> dict[str, Contender]:
        with device:
            ours = Hiera(input_size=(side, side), **width, num_classes=0).eval()

        def forward(images: Tensor) -> Tensor:
            # transformers pools before its norm, too.
            return ours.norm(ours.forward_stages(images)[-1].mean(1))

        found = {}
        if rival == PUBLISHED:
            theirs = published_hiera.Hiera(side, **width).to(device).eval()
            theirs.load_state_dict(ours.state_dict())
            found = _inference(rival, theirs.features, not quick)
        elif transformers is not None:
            from fastssl.models.transformers_keys import official

            config = transformers.HieraConfig(image_size=[side, side], **_transformers_names(width))
            theirs = transformers.HieraModel(config).to(device).eval()
            ours.load_state_dict(official(theirs.state_dict()))
            found = _inference(rival, lambda x: theirs(x).pooler_output, not quick)
        return with_graph(found | _inference("fastssl", forward, not quick), device)

    return Case(
        name=f"hiera_{size}_forward",
        shape=f"B={batch} {side}x{side}",
        dtype="bfloat16",
        direction=FORWARD,
        make_inputs=lambda device: (torch.randn(batch, 3, side, side, device=device),),
        contenders=contenders,
        ratios=ratios(rival),
        tolerance=TOLERANCE,
        flops=count_flops,
        images=batch,
    )


def with_graph(contenders: dict[str, Contender], device: torch.device) -> dict[str, Contender]:
    """And on a GPU ours replayed from a graph of its launches, for which it must never wait."""
    if device.type == "cuda":
        contenders["fastssl graphed"] = Graphed(contenders["fastssl"])
    return contenders


def _inference(name: str, forward: Callable, compiled: bool) -> dict[str, Contender]:
    def contender(function: Callable) -> Contender:
        def call(images: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16):
                return (function(images),)

        return call

    found = {name: contender(forward)}
    if compiled:
        found[f"{name} compiled"] = contender(torch.compile(forward))
    return found


def _step_case(family: Family, batch: int, direction: str, compiled: bool) -> Case:
    def make_inputs(device: torch.device) -> tuple:
        images = torch.randn(batch, 3, family.image_side, family.image_side, device=device)
        return images, torch.rand(batch, family.noise_size, device=device)

    def contenders(device: torch.device) -> dict[str, Contender]:
        with_step = direction == STEP
        with device:
            ours = family.ours().train()
        found = {}
        if family.is_installed:
            with device:
                theirs, weights = family.theirs()
            ours.load_state_dict(weights)
            theirs = theirs.to(device).train()
            found = _contenders(family.rival, theirs, with_step, compiled)
        return found | _contenders("fastssl", ours, with_step, compiled)

    return Case(
        name=f"{family.name}/{direction}",
        shape=f"B={batch} {family.shape}",
        dtype="bfloat16",
        direction=direction,
        make_inputs=make_inputs,
        contenders=contenders,
        ratios=ratios(family.rival),
        tolerance=TOLERANCE,
        flops=count_flops,
        images=batch,
    )


def _contenders(
    name: str, model: nn.Module, with_step: bool, compiled: bool
) -> dict[str, Contender]:
    optimizer = None
    if with_step:
        optimizer = adamw(model)
    found = {name: training_step(model, pretraining(model), optimizer)}
    if not compiled:
        return found
    if len(getattr(model, "blocks", ())) < DEEP:
        forward = pretraining(model, torch.compile(model))
        return found | {f"{name} compiled": training_step(model, forward, optimizer)}
    twin = copy.deepcopy(model)
    for block in (*twin.blocks, *twin.decoder_blocks):
        block.compile()
    optimizer = adamw(twin) if with_step else None
    return found | {f"{name} compiled": training_step(twin, twin, optimizer)}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """A learning rate of 0 costs as much as any other and keeps the contenders comparable."""
    parameters = list(model.parameters())
    in_graphs = parameters[0].is_cuda
    return torch.optim.AdamW(
        parameters, lr=0.0, weight_decay=0.05, fused=True, capturable=in_graphs
    )


def pretraining(model: nn.Module, compiled: Callable | None = None) -> Callable:
    """What the trainer calls of `model`, or of the same compiled: a loss needs the pixels of
    removed patches only. Hiera's masked autoencoder predicts no others."""
    forward = model if compiled is None else compiled
    if isinstance(model, MaskedAutoencoderViT):
        return partial(forward, removed_only=True)
    return forward


def training_step(
    model: nn.Module,
    forward: Callable,
    optimizer: torch.optim.Optimizer | None,
) -> Contender:
    """Forward, backward, with an optimizer its step, and no gradients left behind: those of a
    graph lie where its next replay will write."""
    parameters = dict(model.named_parameters())
    landmarks = [
        next(parameter for name, parameter in parameters.items() if name.endswith(suffixes))
        for suffixes in LANDMARKS
    ]

    def call(images: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(images.device.type, torch.bfloat16):
            # transformers' output is a mapping whose first value is the loss.
            loss = forward(images, noise=noise)[0]
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        found = (loss.detach().clone(), *(parameter.grad.clone() for parameter in landmarks))
        model.zero_grad(set_to_none=True)
        return found

    return call


def count_flops(contenders: dict[str, Contender], inputs: Sequence) -> dict[str, int]:
    """FLOPs of each model's matrix products, by torch's counter; compiling does not change them.

    Attention takes its unfused path here, for the counter knows no formula of the CPU's fused one.
    """
    counted = {}
    for name, function in contenders.items():
        eager = name.removesuffix(" compiled").removesuffix(" graphed")
        if eager != name:
            counted[name] = counted[eager]
            continue
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            function(*inputs)
        counted[name] = counter.get_total_flops()
    return counted
