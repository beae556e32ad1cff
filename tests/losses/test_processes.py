"""Every loss module on several ranks, compiled, and at the edges."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.losses.models import MODELS, D, V


def wrapped(model, wrap):
    if wrap == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if wrap == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for unit in model.units():
            fully_shard(unit, mesh=mesh)
    return model


def accumulated_step(name, x, wrap):
    """Two micro-batches, then the step of the state: mean loss, gradients, state of the loss."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    original = MODELS[name]()
    model = wrapped(original, wrap)
    losses = []
    for part in x.chunk(2):
        loss = model(part.chunk(world)[rank])
        (loss / 2).backward()
        losses.append(loss.detach())
    if hasattr(original.loss, "step"):
        original.loss.step()
    grads = {
        key: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for key, p in original.named_parameters()
        if p.requires_grad
    }
    return torch.stack(losses), grads, original.loss.state_dict()


WORLDS = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("world", WORLDS)
def test_processes_equal_one(gloo_pool, name, world, wrap):
    x = torch.randn(16, V, D)
    ((loss, grads, state),) = gloo_pool.run(accumulated_step, 1, name, x, "")
    results = gloo_pool.run(accumulated_step, world, name, x, wrap)
    losses, _, states = zip(*results, strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(0), loss, rtol=1e-5, atol=1e-6)
    for _, other, _ in results:
        for key, grad in grads.items():
            torch.testing.assert_close(
                other[key], grad, rtol=1e-4, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}"
            )
    for other in states:
        assert other.keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-6)
            assert torch.equal(other[key], states[0][key]), f"{key} differs between ranks"


@pytest.mark.parametrize("name", MODELS)
def test_compiles_without_a_graph_break(name):
    x = torch.randn(8, V, D)
    results = []
    for compiles in (False, True):
        torch.manual_seed(1)
        model = MODELS[name]()
        torch.compiler.reset()
        # The tracing is what is tested, not the code that a compiler makes of it.
        step = torch.compile(model, fullgraph=True, backend="aot_eager") if compiles else model
        for part in x.chunk(2):
            loss = step(part)
            loss.backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        results.append((loss.detach(), grads, list(model.loss.buffers())))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


EDGES = {
    "extreme": lambda: 1e4 * torch.randn(4, V, D),
    "equal": lambda: torch.ones(4, V, D),
    "zeros": lambda: torch.zeros(4, V, D),
    "one": lambda: torch.randn(1, V, D),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", MODELS)
def test_finite_at_the_edges(name, edge):
    model = MODELS[name]()
    loss = model(EDGES[edge]())
    loss.backward()
    if hasattr(model.loss, "step"):
        model.loss.step()
    assert loss.isfinite()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), key
    assert all(buffer.isfinite().all() for buffer in model.loss.buffers())
