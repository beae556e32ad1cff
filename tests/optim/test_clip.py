"""Clipping against its definition, whole and parameter by parameter, sharded or not."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from fastssl.optim import clip_gradients

LENGTHS = (0.5, 3.0, 40.0)


def module_with_gradients():
    """Three parameters whose gradients have the norms LENGTHS, and one without a gradient."""
    torch.manual_seed(1)
    module = nn.ParameterList(torch.randn(5, 3) for _ in range(4))
    for parameter, length in zip(module, LENGTHS, strict=False):
        gradient = torch.randn(5, 3)
        parameter.grad = gradient * (length / gradient.norm())
    return module


def whole():
    return torch.tensor(LENGTHS).norm()


@pytest.mark.parametrize("by", ["whole", "parameter"])
def test_no_limit_changes_nothing(by):
    module = module_with_gradients()
    before = [p.grad.clone() for p in module if p.grad is not None]
    norm = clip_gradients(module.parameters(), None, by=by)
    torch.testing.assert_close(norm, whole())
    assert all(torch.equal(a, p.grad) for a, p in zip(before, module, strict=False))


def test_whole_keeps_the_direction():
    module = module_with_gradients()
    before = torch.cat([p.grad.flatten() for p in module if p.grad is not None])
    torch.testing.assert_close(clip_gradients(module.parameters(), 2.0), whole())
    after = torch.cat([p.grad.flatten() for p in module if p.grad is not None])
    torch.testing.assert_close(after, before * 2.0 / whole(), rtol=1e-5, atol=0)


def test_each_parameter_by_itself():
    module = module_with_gradients()
    before = [p.grad.clone() for p in module if p.grad is not None]
    norm = clip_gradients(module.parameters(), 2.0, by="parameter")
    torch.testing.assert_close(norm.float(), whole())
    for old, parameter, length in zip(before, module, LENGTHS, strict=False):
        torch.testing.assert_close(parameter.grad, old * min(1.0, 2.0 / length))


def _clip_sharded(by):
    module = module_with_gradients()
    whole_gradients = [p.grad for p in module if p.grad is not None]
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    for parameter, gradient in zip(module, whole_gradients, strict=False):
        parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
    norm = clip_gradients(module.parameters(), 2.0, by=by)
    return norm, [p.grad.full_tensor() for p in module if p.grad is not None]


@pytest.mark.parametrize("by", ["whole", "parameter"])
def test_sharded_is_as_whole(gloo_pool, by):
    module = module_with_gradients()
    wanted = clip_gradients(module.parameters(), 2.0, by=by)
    for norm, gradients in gloo_pool.run(_clip_sharded, 2, by):
        torch.testing.assert_close(norm, wanted, check_dtype=False)
        for got, parameter in zip(gradients, module, strict=False):
            torch.testing.assert_close(got, parameter.grad)


@pytest.mark.parametrize("by", ["whole", "parameter"])
@pytest.mark.parametrize("max_norm, length", [(0.7, 3.0), (0.05, 3e6)])
def test_factors_are_not_rounded_to_the_gradients_dtype(by, max_norm, length):
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    module = [torch.nn.Parameter(torch.zeros(1000, dtype=dtype)) for dtype in dtypes]
    torch.manual_seed(0)
    for parameter in module:
        direction = torch.nn.functional.normalize(torch.randn(1000), dim=0)
        # In float16 no element is infinite, but their norm is.
        parameter.grad = (direction * length).clamp(-6e4, 6e4).to(parameter.dtype)
    lengths = torch.stack([p.grad.double().norm() for p in module])
    norm = clip_gradients(module, max_norm, by=by)
    torch.testing.assert_close(norm.double(), lengths.norm(), rtol=1e-6, atol=0)
    wanted = max_norm * (lengths / lengths.norm() if by == "whole" else torch.ones(3))
    for parameter, length in zip(module, wanted, strict=True):
        rtol = 1e-6 if parameter.dtype == torch.float32 else 3e-3
        torch.testing.assert_close(
            parameter.grad.double().norm(), length.double(), rtol=rtol, atol=0
        )


@pytest.mark.parametrize("by", ["whole", "parameter"])
def test_without_gradients_there_is_nothing_to_clip(by):
    module = torch.nn.Linear(2, 2)
    assert clip_gradients(module.parameters(), 1.0, by=by) == 0


def test_a_word_that_is_none_is_refused():
    with pytest.raises(ValueError, match="by must be one of whole, parameter, got 'layer'"):
        clip_gradients(module_with_gradients().parameters(), 1.0, by="layer")
