"""What every method must do, tried on tiny networks; a test file has its `Case`s and calls these.

Steps are compared in float64, where what differs is wrong and not rounding that grew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastssl import distributed
from fastssl.data import Batch
from fastssl.distributed import World
from fastssl.methods import Method, build_method, make_views, method_class
from fastssl.nn import SyncBatchNorm, keyed_drops
from fastssl.training.setup import FORWARD_METHODS

TINY_VIT = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


class TinyEncoder(nn.Module):
    """A module as a user may bring it: images in, a vector out, and no attribute that says so."""

    def __init__(self, batch_norm: bool = False, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 4, stride=4)
        self.norm = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.fc = nn.Linear(width, width)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.norm(self.conv(images))).mean(dim=(2, 3)))


@dataclass(frozen=True)
class Case:
    """A method as it is tried. `views` are groups as in a configuration; None: the method's own."""

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)
    model: str = "tests.methods.checks:TinyEncoder"
    model_args: Mapping[str, Any] = field(default_factory=dict)
    image_size: int | Sequence[int] = 16
    views: Sequence[Mapping[str, Any]] | None = None
    batch_size: int = 8
    num_samples: int = 24
    num_steps: int = 4
    # Whether two micro-batches make the step of one batch: not with batch normalisation, nor where
    # a sample is compared with its batch.
    accumulates: bool = True
    rtol: float = 1e-6
    atol: float = 1e-8


def build(case: Case, **changes: Any) -> Method:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "model": case.model,
        "model_args": case.model_args,
        "args": case.args,
        "image_size": case.image_size,
        "views": make_views(method_class(case.name), case.image_size, case.views),
        "num_samples": case.num_samples,
        "steps_per_epoch": case.num_samples // case.batch_size,
        "seed": 5,
    }
    return build_method(case.name, **(options | changes))


def make_batch(case: Case, step: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """The batch of a step: smooth random views, different samples in the steps of an epoch."""
    generator = torch.Generator().manual_seed(step)
    views = []
    for view in make_views(method_class(case.name), case.image_size, case.views):
        for _ in range(view.number):
            coarse = torch.randn(case.batch_size, 3, 4, 4, generator=generator)
            images = nn.functional.interpolate(coarse, view.size, mode="bilinear")
            views.append(images.to(dtype))
    epoch, step_in_epoch = divmod(step, case.num_samples // case.batch_size)
    index = torch.arange(case.batch_size) + step_in_epoch * case.batch_size
    return Batch(tuple(views), index, epoch=epoch, step=step)


def part_of(batch: Batch, part: int, parts: int) -> Batch:
    """The part-th of `parts` slices of a batch."""
    views = tuple(view.chunk(parts)[part] for view in batch.views)
    return Batch(views, batch.index.chunk(parts)[part], batch.epoch, batch.view, batch.step)


def call_keyed(method: Method, batch: Batch) -> Tensor:
    """The loss of a batch, with stochastic depth as the loop has it."""
    with keyed_drops(batch.index, seed=5, epoch=batch.epoch, view=batch.view):
        return method(batch)["loss"]


def run_steps(
    case: Case, accumulation: int = 1, num_steps: int | None = None, shard_ranks: int = 0
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of this rank's share, and the whole state after some steps made as the loop does."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    method = build(case).double()
    if world > 1:
        method = SyncBatchNorm.convert_sync_batchnorm(method)
        here = World(rank, world, torch.device("cpu"))
        distributed.shard(method, here, FORWARD_METHODS, shard_ranks=shard_ranks)
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    losses = []
    for step in range(num_steps or case.num_steps):
        method.before_step({n: s(step, case.num_steps) for n, s in method.schedules.items()})
        mine = part_of(make_batch(case, step, torch.float64), rank, world)
        total = 0.0
        for micro in range(accumulation):
            distributed.sync_gradients(method, micro == accumulation - 1)
            loss = call_keyed(method, part_of(mine, micro, accumulation)) / accumulation
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step()
        losses.append(total)
    state = {
        key: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for key, value in method.state_dict().items()
    }
    return losses, state


def same_state(case: Case, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            got[key],
            value,
            rtol=case.rtol,
            atol=case.atol,
            msg=lambda m, key=key: f"{key}: {m}",
        )


def check_processes(gloo_pool, case: Case, world: int = 2, shard_ranks: int = 0) -> None:
    """Processes that share the batches end with the losses and the state of one."""
    ((losses, state),) = gloo_pool.run(run_steps, 1, case)
    results = gloo_pool.run(run_steps, world, case, 1, None, shard_ranks)
    mean = torch.tensor([r[0] for r in results], dtype=torch.float64).mean(0)
    expected = torch.tensor(losses, dtype=torch.float64)
    torch.testing.assert_close(mean, expected, rtol=case.rtol, atol=case.atol)
    for _, other in results:
        same_state(case, other, state)


def check_accumulation(case: Case) -> None:
    """Two micro-batches make the step of one batch."""
    assert case.accumulates
    losses, state = run_steps(case)
    others, other = run_steps(case, accumulation=2)
    got, expected = torch.tensor([others, losses], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=case.rtol, atol=case.atol)
    same_state(case, other, state)


def check_gradients(case: Case) -> None:
    """Every trained parameter gets a finite gradient, not all of them zero; no other gets one."""
    method = build(case)
    method.before_step({n: s(0, case.num_steps) for n, s in method.schedules.items()})
    outputs = method(make_batch(case))
    assert outputs["loss"].dim() == 0
    assert not any(v.requires_grad for n, v in outputs.items() if n != "loss")
    outputs["loss"].backward()
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        else:
            assert parameter.grad is None, name
    assert any(p.grad.any() for p in method.parameters() if p.grad is not None)


def check_features(case: Case) -> None:
    """One finite vector an image, which depends on that image alone."""
    method = build(case).eval()
    images = make_batch(case).views[0]
    with torch.no_grad():
        both, first = method.features(images), method.features(images[:1])
    assert both.dim() == 2 and both.shape[0] == len(images) and both.isfinite().all()
    torch.testing.assert_close(both[:1], first, rtol=1e-4, atol=1e-5)
    assert (both[0] - both[1]).abs().max() > 1e-5


def check_resume(case: Case) -> None:
    """A method that took the state of another goes on as that one does, and by numbers of its own
    only: what the global generator does is of no consequence."""
    results = []
    for interrupted in (False, True):
        method = build(case)
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
        for step in range(case.num_steps):
            if interrupted and step == case.num_steps // 2:
                state = {key: value.clone() for key, value in method.state_dict().items()}
                method = build(case)
                method.load_state_dict(state)
                trained = [p for p in method.parameters() if p.requires_grad]
                optimizer = torch.optim.SGD(trained, lr=0.1)
                torch.manual_seed(99)
            method.before_step({n: s(step, case.num_steps) for n, s in method.schedules.items()})
            call_keyed(method, make_batch(case, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            method.after_step()
        results.append({key: value.clone() for key, value in method.state_dict().items()})
    for key, value in results[0].items():
        assert torch.equal(results[1][key], value), key


def check_skipped_step(case: Case) -> None:
    """Of a step that is skipped nothing remains, then or after the next one."""
    states = []
    for skips in (False, True):
        method = build(case).eval()
        before = {key: value.clone() for key, value in method.state_dict().items()}
        method.before_step({n: s(0, case.num_steps) for n, s in method.schedules.items()})
        if skips:
            method(make_batch(case))
            method.skip_step()
            for key, value in method.state_dict().items():
                assert torch.equal(value, before[key]), key
        method(make_batch(case, step=1))
        method.after_step()
        states.append({key: value.clone() for key, value in method.state_dict().items()})
    for key, value in states[0].items():
        assert torch.equal(states[1][key], value), key


def check_all(case: Case) -> None:
    """What needs one process only."""
    check_gradients(case)
    check_features(case)
    check_resume(case)
    check_skipped_step(case)
    if case.accumulates:
        check_accumulation(case)
