"""What happens once per optimizer step, on the parameters of a ViT-B: the teacher's average, LARS
and LAMB."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.registry import STEP, Case, Contender
from fastssl import functional as F
from fastssl.models import VisionTransformer
from fastssl.optim import LAMB, LARS

MOMENTUM, LR, DECAY = 0.996, 0.1, 0.05
_SIZES = {"embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": 16}
_QUICK_SIZES = {"embed_dim": 48, "depth": 2, "num_heads": 4, "patch_size": 16}


def cases(quick: bool) -> list[Case]:
    with torch.device("meta"):
        model = VisionTransformer(**(_QUICK_SIZES if quick else _SIZES))
    shapes = [p.shape for p in model.parameters()]
    return [
        ema(shapes, torch.float32),
        ema(shapes, torch.bfloat16),
        optimizer("lars", LARS, lars_loop, shapes),
        optimizer("lamb", LAMB, lamb_loop, shapes),
    ]


def _count(shapes: Sequence[torch.Size]) -> int:
    return sum(shape.numel() for shape in shapes)


def _shape(shapes: Sequence[torch.Size]) -> str:
    return f"{len(shapes)} tensors, {_count(shapes) / 1e6:.1f} M"


def _draw(shapes: Sequence[torch.Size], dtype: torch.dtype) -> Callable[[torch.device], tuple]:
    def make_inputs(device: torch.device) -> tuple:
        return tuple(torch.randn(shape, device=device).to(dtype) for shape in shapes)

    return make_inputs


def _with_state(make_state: Callable[..., object], advance: Callable[..., list]) -> Contender:
    """A contender whose state is its own: all of them see as many steps on the same inputs."""
    states: dict[int, object] = {}

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        key = inputs[0].data_ptr()
        if key not in states:
            states[key] = make_state(inputs)
        return tuple(advance(states[key], inputs))

    return call


def teacher_loop(targets: list[Tensor], sources: Sequence[Tensor]) -> None:
    """One multiplication and one addition per tensor, as the published training scripts have it."""
    for target, source in zip(targets, sources, strict=True):
        target.mul_(MOMENTUM).add_(source, alpha=1 - MOMENTUM)


def ema(shapes: Sequence[torch.Size], dtype: torch.dtype) -> Case:
    """A float32 teacher; `dtype` is the student's."""

    def first_teacher(inputs: Sequence[Tensor]) -> list[Tensor]:
        return [0.5 * x.float() for x in inputs]

    def contender(update: Callable) -> Contender:
        def advance(targets: list[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
            update(targets, inputs)
            return targets

        return _with_state(first_teacher, advance)

    def by(backend: str | None) -> Callable:
        def call(targets: list[Tensor], sources: Sequence[Tensor]) -> None:
            F.ema_update(targets, sources, momentum=MOMENTUM, backend=backend)

        return call

    def contenders(device: torch.device) -> dict[str, Contender]:
        return {
            "eager": contender(by("reference")),
            "compiled": contender(torch.compile(by("reference"))),
            "fastssl": contender(by(None)),
            "rival": contender(teacher_loop),
        }

    name = str(dtype).removeprefix("torch.")
    return Case(
        name=f"ema_update/vit_base/{name}",
        shape=_shape(shapes),
        dtype=name,
        direction=STEP,
        make_inputs=_draw(shapes, dtype),
        contenders=contenders,
        ratios={base: (base, "fastssl") for base in ("eager", "compiled", "rival")},
        tolerance=1e-5,
        bytes_moved=_count(shapes) * (4 + 4 + dtype.itemsize),
        op="ema_update",
    )


def _norm_ratio(parameter: Tensor, update: Tensor) -> Tensor:
    norms = parameter.norm(), update.norm()
    return torch.where((norms[0] > 0) & (norms[1] > 0), norms[0] / norms[1], 1.0)


def lars_loop(parameter: Tensor, grad: Tensor, state: dict) -> None:
    """LARS of one parameter at a time."""
    if parameter.ndim > 1:
        grad = grad.add(parameter, alpha=DECAY)
        grad = grad.mul(0.001 * _norm_ratio(parameter, grad))
    momentum = state.setdefault("momentum", torch.zeros_like(parameter))
    momentum.mul_(0.9).add_(grad)
    parameter.sub_(momentum, alpha=LR)


def lamb_loop(parameter: Tensor, grad: Tensor, state: dict) -> None:
    """LAMB of one parameter at a time."""
    state["step"] = state.get("step", 0) + 1
    mean = state.setdefault("mean", torch.zeros_like(parameter))
    square = state.setdefault("square", torch.zeros_like(parameter))
    mean.mul_(0.9).add_(grad, alpha=0.1)
    square.mul_(0.999).addcmul_(grad, grad, value=0.001)
    scale = (square / (1 - 0.999 ** state["step"])).sqrt().add_(1e-6)
    update = (mean / (1 - 0.9 ** state["step"])).div_(scale)
    if parameter.ndim > 1:
        update.add_(parameter, alpha=DECAY)
        update.mul_(_norm_ratio(parameter, update))
    parameter.sub_(update, alpha=LR)


def optimizer(
    name: str, cls: type[LARS] | type[LAMB], one: Callable, shapes: Sequence[torch.Size]
) -> Case:
    """The inputs are the gradients."""

    def first(inputs: Sequence[Tensor]) -> list[nn.Parameter]:
        return [nn.Parameter(0.5 * x) for x in inputs]

    def ours_first(inputs: Sequence[Tensor]) -> tuple:
        parameters = first(inputs)
        for parameter, grad in zip(parameters, inputs, strict=True):
            parameter.grad = grad
        return parameters, cls(parameters, LR, weight_decay=DECAY)

    def ours(state: tuple, inputs: Sequence[Tensor]) -> list[Tensor]:
        parameters, stepper = state
        stepper.step()
        return [p.detach() for p in parameters]

    def loop_first(inputs: Sequence[Tensor]) -> list[tuple]:
        return [(parameter, {}) for parameter in first(inputs)]

    @torch.no_grad()
    def loop(state: list[tuple], inputs: Sequence[Tensor]) -> list[Tensor]:
        for (parameter, own), grad in zip(state, inputs, strict=True):
            one(parameter, grad, own)
        return [parameter.detach() for parameter, _ in state]

    def contenders(device: torch.device) -> dict[str, Contender]:
        return {"eager": _with_state(loop_first, loop), "fastssl": _with_state(ours_first, ours)}

    # Read and written at the least: weights and gradients for the norms; then both and each moment.
    passes = {"lars": 2 + 5, "lamb": 2 + 7}[name]
    return Case(
        name=f"{name}/vit_base/float32",
        shape=_shape(shapes),
        dtype="float32",
        direction=STEP,
        make_inputs=_draw(shapes, torch.float32),
        contenders=contenders,
        ratios={"eager": ("eager", "fastssl")},
        tolerance=1e-5,
        bytes_moved=4 * passes * _count(shapes),
    )
