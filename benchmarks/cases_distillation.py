"""Whole training steps of DINO and iBOT beside the same written as their papers have it, in bf16.

Ours is the method as the trainer runs it, the rival `published_distillation`. Both begin with equal
weights and have the same fused AdamW. Left out on both sides are the clipping of gradients and
stochastic depth, whose draws would differ. Ours draws iBOT's masks within the step; the rival is
given them, as from a loader's workers.
"""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases_steps import count_flops
from benchmarks.published_distillation import TEACHER_MOMENTUM, TEACHER_TEMP, Head, Published, ViT
from benchmarks.registry import FORWARD_BACKWARD, STEP, Case, Contender
from fastssl.data import Batch
from fastssl.data.views import View
from fastssl.methods import Method, build_method
from fastssl.optim import build_adamw, set_hyperparameters

PUBLISHED = "as published"
RATIOS = {
    "eager": (PUBLISHED, "fastssl"),
    "compiled": (f"{PUBLISHED} compiled", "fastssl compiled"),
}
# bfloat16 on both sides, each in an order of its own, through 12 blocks.
TOLERANCE = 1e-1
PROTOTYPES = {"dino": 65536, "ibot": 8192}
# Gradients and teacher's parameters that the contenders must agree on: of the first layer, of the
# mask token and of the prototypes.
LANDMARKS = ("patch_embed.proj.weight", "mask_token", "weight_v", "weight.original1")
# The rival's keys by ours.
RENAMED = {
    "last_layer.weight_g": "last_layer.parametrizations.weight.original0",
    "last_layer.weight_v": "last_layer.parametrizations.weight.original1",
    "class_loss.center": "center",
    "patch_loss.center": "patch_center",
    "loss.center": "center",
}


@dataclass(frozen=True)
class Recipe:
    """The sizes of a method's case; what is published for ViT-S/16 but for the batch."""

    method: str
    out_dim: int
    batch: int = 4
    sides: tuple[int, int] = (224, 96)
    num_small: int = 8
    vit: dict[str, int] = field(
        default_factory=lambda: {"embed_dim": 384, "depth": 12, "num_heads": 6}
    )
    head: dict[str, int] = field(
        default_factory=lambda: {"hidden_dim": 2048, "bottleneck_dim": 256}
    )

    @property
    def has_masks(self) -> bool:
        return self.method == "ibot"

    def ours(self, **vit: Any) -> Method:
        args = {"out_dim": self.out_dim, "norm_last_layer": False, **self.head}
        if self.has_masks:
            args["patch_out_dim"] = self.out_dim
        large, small = ((side, side) for side in self.sides)
        return build_method(
            self.method,
            model="vit_small_patch16",
            model_args=self.vit | vit,
            args=args,
            image_size=self.sides[0],
            views=(View(large, number=2), View(small, number=self.num_small)),
        )

    def published(self) -> Published:
        def backbone() -> ViT:
            return ViT(self.sides[0], *self.vit.values(), self.has_masks)

        def head() -> Head:
            return Head(self.vit["embed_dim"], self.out_dim, **self.head)

        return Published(backbone, head)


def cases(quick: bool, scale: int) -> list[Case]:
    sizes: dict[str, Any] = {"batch": scale * Recipe.batch}
    if quick:
        sizes = {"batch": 2, "sides": (64, 32), "num_small": 2}
        sizes["vit"] = {"embed_dim": 48, "depth": 2, "num_heads": 3}
        sizes["head"] = {"hidden_dim": 64, "bottleneck_dim": 16}
    recipes = [Recipe(method, 512 if quick else K, **sizes) for method, K in PROTOTYPES.items()]
    return [_case(r, direction, quick) for r in recipes for direction in (FORWARD_BACKWARD, STEP)]


def _case(recipe: Recipe, direction: str, quick: bool) -> Case:
    counter = itertools.count()
    batch, (large, small) = recipe.batch, recipe.sides

    def make_inputs(device: torch.device) -> tuple:
        views = [torch.randn(batch, 3, large, large, device=device) for _ in range(2)]
        views += [
            torch.randn(batch, 3, small, small, device=device) for _ in range(recipe.num_small)
        ]
        index = torch.arange(batch, device=device) + batch * next(counter)
        masks = None
        if recipe.has_masks:
            # Masks are a function of index and grid: the smallest encoder has the same.
            drawer = recipe.ours(embed_dim=1, depth=1, num_heads=1).to(device)
            masks = drawer.masks(Batch(tuple(views), index))
        return index, masks, *views

    def contenders(device: torch.device) -> dict[str, Contender]:
        initial = _initial(recipe).to(device)
        published = recipe.published().to(device)
        published.load_state_dict(_renamed(initial.state_dict()))
        found = {}
        for name, module, make in ((PUBLISHED, published, _theirs), ("fastssl", initial, _ours)):
            # Each has a state of its own, as the first step of each is compared.
            found[name] = make(copy.deepcopy(module), direction == STEP)
            if not quick:
                module.compile()
                found[f"{name} compiled"] = make(module, direction == STEP)
        return found

    return Case(
        name=f"{recipe.method}_vit_small" + ("_step" if direction == STEP else ""),
        shape=f"B={batch} 2x{large} + {recipe.num_small}x{small} K={recipe.out_dim}",
        dtype="bfloat16",
        direction=direction,
        make_inputs=make_inputs,
        contenders=contenders,
        ratios=RATIOS,
        tolerance=TOLERANCE,
        flops=count_flops,
        images=batch,
    )


def _initial(recipe: Recipe) -> Method:
    """A method whose teacher is not its student, and whose centers are not 0."""
    method = recipe.ours()
    method.teacher.load_state_dict(recipe.ours().student.state_dict())
    for name, center in method.named_buffers():
        if name.endswith("center"):
            center.normal_(std=0.02)
    return method


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        for ours, theirs in RENAMED.items():
            key = key.replace(ours, theirs)
        renamed[key] = value.flatten() if key.endswith("center") else value
    return renamed


def _ours(method: Method, with_step: bool) -> Contender:
    values = {"teacher_momentum": TEACHER_MOMENTUM, "teacher_temp": TEACHER_TEMP}

    def loss(index: Tensor, masks: Tensor | None, *views: Tensor) -> Tensor:
        method.before_step(values)
        return method(Batch(views, index))["loss"]

    # Without a step the rows that were collected for the center are forgotten.
    return _training_step(
        method, loss, method.after_step if with_step else method.skip_step, with_step
    )


def _theirs(rival: Published, with_step: bool) -> Contender:
    def loss(index: Tensor, masks: Tensor | None, *views: Tensor) -> Tensor:
        return rival(masks, views)

    return _training_step(rival, loss, rival.after_step if with_step else None, with_step)


def _training_step(
    module: nn.Module,
    loss_of: Callable[..., Tensor],
    after: Callable[[], None] | None,
    with_step: bool,
) -> Contender:
    """Zero the gradients, forward, backward and, with a step, the optimizer's, EMA and center."""
    optimizer = None
    if with_step:
        # A learning rate of 0 costs as much as any other and keeps the contenders comparable.
        optimizer = build_adamw(module, betas=(0.9, 0.999))
        set_hyperparameters(optimizer, lr=0.0, weight_decay=0.04)
    landmarks = [p for name, p in module.student.named_parameters() if name.endswith(LANDMARKS)]
    moved = [p for name, p in module.teacher.named_parameters() if name.endswith(LANDMARKS)]
    moved += [b.flatten() for name, b in module.named_buffers() if name.endswith("center")]

    def call(*inputs: Any) -> tuple[Tensor, ...]:
        module.zero_grad(set_to_none=True)
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            loss = loss_of(*inputs)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        if after is not None:
            after()
        return loss.detach(), *(p.grad for p in landmarks), *(moved if with_step else [])

    return call
