"""SyncBatchNorm against torch's batch normalisation of the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastssl.nn import SyncBatchNorm

CONFIGS = {
    "default": {},
    "no_affine": {"affine": False},
    "average": {"momentum": None},
    "no_stats": {"track_running_stats": False},
}
# Rows of each rank: uneven, and one without any.
SPLITS = {2: (5, 2), 4: (3, 0, 2, 2)}


def steps(layer, batches, weights):
    """Two training steps: outputs, input gradients, parameter gradients, state, eval output."""
    outputs, grads = [], []
    for x, weight in zip(batches, weights, strict=True):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        (y * weight).sum().backward()
        outputs.append(y.detach())
        grads.append(leaf.grad)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    parameters = [p.grad for p in layer.parameters()]
    layer.eval()
    return outputs, grads, parameters, state, layer(batches[0]).detach()


def of_rank(batches, weights, config, state, split):
    layer = SyncBatchNorm(3, **config)
    layer.load_state_dict(state)
    rank = dist.get_rank()
    mine = [[t.split(split)[rank] for t in ts] for ts in (batches, weights)]
    return steps(layer, *mine)


@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 2, 2)])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_uneven_ranks_equal_one_batch(gloo_pool, world, config, shape):
    batches = [5 + 3 * torch.randn(shape) for _ in range(2)]
    weights = [torch.randn(shape) for _ in range(2)]
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    layer = kind(3, **CONFIGS[config])
    if layer.affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    state = copy.deepcopy(layer.state_dict())
    outputs, grads, parameters, after, evaluated = steps(layer, batches, weights)
    arguments = (batches, weights, CONFIGS[config], state, SPLITS[world])
    results = gloo_pool.run(of_rank, world, *arguments)
    for i in range(2):
        torch.testing.assert_close(torch.cat([r[0][i] for r in results]), outputs[i])
        whole = torch.cat([r[1][i] for r in results])
        torch.testing.assert_close(whole, grads[i], rtol=1e-4, atol=1e-5)
    for i, grad in enumerate(parameters):
        # Sums here, where DDP takes the mean of means.
        torch.testing.assert_close(sum(r[2][i] for r in results), grad, rtol=1e-4, atol=1e-4)
    for result in results:
        assert result[3].keys() == after.keys()
        for key, value in after.items():
            torch.testing.assert_close(result[3][key], value, rtol=1e-5, atol=1e-5)
    if config != "no_stats":
        whole = torch.cat([r[4] for r in results])
        torch.testing.assert_close(whole, evaluated, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_process_alone_is_torch(config):
    batches, weights = ([torch.randn(4, 3, 2) for _ in range(2)] for _ in range(2))
    expected = steps(nn.BatchNorm1d(3, **CONFIGS[config]), batches, weights)
    torch.testing.assert_close(
        steps(SyncBatchNorm(3, **CONFIGS[config]), batches, weights), expected
    )


def float64_error():
    """The largest error of bfloat16 input and of float64 input, against the formula."""
    torch.manual_seed(0)
    x = (100 + torch.randn(8, 3)).double()
    mine = x.chunk(2)[dist.get_rank()]
    truth = (mine - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    errors = []
    for dtype in (torch.float64, torch.float32):
        y = SyncBatchNorm(3, affine=False)(mine.to(dtype))
        assert y.dtype == dtype
        errors.append((y.double() - truth).abs().max().item())
    half = SyncBatchNorm(3)(mine.bfloat16())
    return errors, half.dtype, half.isfinite().all()


def test_precision(gloo_pool):
    for (double, single), dtype, finite in gloo_pool.run(float64_error, 2):
        # Values at 100 with a deviation of 1: sums of squares would lose four digits more.
        assert double < 1e-12 and single < 5e-5
        assert dtype == torch.bfloat16 and finite


def compiled():
    torch.manual_seed(0)
    x = torch.randn(4, 3).chunk(2)[dist.get_rank()]
    results = []
    for compiles in (False, True):
        layer = SyncBatchNorm(3, momentum=None)
        torch.compiler.reset()
        step = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiles else layer
        leaf = x.clone().requires_grad_()
        step(leaf).square().sum().backward()
        results.append((leaf.grad, layer.weight.grad, layer.running_var))
    return results


def test_compiles_without_a_graph_break(gloo_pool):
    for eager, graph in gloo_pool.run(compiled, 2):
        torch.testing.assert_close(graph, eager)


def one_row_each_in_subgroups():
    """Groups {0, 1} and {2, 3}; a row per rank."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    rank = dist.get_rank()
    layer = copy.deepcopy(SyncBatchNorm(2, eps=0, process_group=groups[rank // 2]))
    return layer(torch.tensor([[1.0, -1.0]]) * (1 if rank % 2 else 3) + rank // 2)


@pytest.mark.slow
def test_groups_are_apart(gloo_pool):
    for rank, y in enumerate(gloo_pool.run(one_row_each_in_subgroups, 4)):
        sign = -1.0 if rank % 2 else 1.0
        torch.testing.assert_close(y, sign * torch.tensor([[1.0, -1.0]]))


def group_of_one():
    groups = [dist.new_group([0]), dist.new_group([1])]
    x = torch.randn(4, 2) + dist.get_rank()
    layer = SyncBatchNorm(2, process_group=groups[dist.get_rank()])
    return layer(x), nn.BatchNorm1d(2)(x)


def test_a_group_of_one_is_a_process_alone(gloo_pool):
    for ours, expected in gloo_pool.run(group_of_one, 2):
        torch.testing.assert_close(ours, expected)


def test_convert_takes_over_parameters_and_buffers():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    model[2].eval()
    model(torch.randn(2, 3, 4, 4))
    expected = copy.deepcopy(model)
    converted = SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted[1], SyncBatchNorm) and isinstance(converted[2][0], SyncBatchNorm)
    assert converted[1].training and not converted[2][0].training
    torch.testing.assert_close(converted.state_dict(), expected.state_dict())
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(converted(x), expected(x))
    alone = SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(2))
    assert isinstance(alone, SyncBatchNorm)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"input must have shape \[B, 3, ...\], got \[4, 2\]"):
        SyncBatchNorm(3)(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        SyncBatchNorm(3, momentum=None)(torch.zeros(1, 3))
