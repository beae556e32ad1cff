"""Collectives: values, and gradients equal to ONE process on the whole batch after DDP's mean."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.kernels.common import collectives

ROWS, WIDTH = 3, 5
WORLDS = [1, 2, pytest.param(4, marks=pytest.mark.slow)]


def batch(world_size):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(world_size * ROWS, WIDTH, generator=generator, dtype=torch.float64)


def make_model():
    torch.manual_seed(2)
    return nn.Linear(WIDTH, 4, dtype=torch.float64)


def contrast(z, group=None):
    """A mean over this process's rows, each against the rows of all processes."""
    return (z @ collectives.all_gather_with_grad(z, group).T).logsumexp(dim=1).mean()


def gathered_gram(z, group=None):
    """A loss of the whole batch, the same number on every process."""
    z = collectives.all_gather_with_grad(z, group)
    return (z @ z.T).square().mean()


def reduced_covariance(z, group=None):
    """The same from sums over processes instead of rows."""
    total = len(z) * collectives.world_size(group)
    mean = collectives.all_reduce_with_grad(z.sum(0), group) / total
    covariance = collectives.all_reduce_with_grad((z - mean).T @ (z - mean), group) / total
    return covariance.square().sum()


LOSSES = [contrast, gathered_gram, reduced_covariance]


def loss_and_gradients(model, x, loss):
    value = loss(model(x))
    value.backward()
    return value.detach(), [p.grad for p in model.parameters()]


def train_under_ddp(loss, compiled):
    model = DistributedDataParallel(make_model())
    x = batch(dist.get_world_size()).chunk(dist.get_world_size())[dist.get_rank()]
    # The tracing is what is tested, not the code that a compiler makes of it.
    if compiled:
        torch.compiler.reset()
        loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value, gradients = loss_and_gradients(model, x, loss)
    dist.all_reduce(value)
    return value / dist.get_world_size(), gradients


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_mean_of_gradients_is_that_of_one_process(gloo_pool, loss, world_size):
    value, gradients = loss_and_gradients(make_model(), batch(world_size), loss)
    for actual, actual_gradients in gloo_pool.run(train_under_ddp, world_size, loss, False):
        torch.testing.assert_close(actual, value)
        torch.testing.assert_close(actual_gradients, gradients)


@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_without_a_graph_break(gloo_pool, loss):
    value, gradients = loss_and_gradients(make_model(), batch(2), loss)
    for actual, actual_gradients in gloo_pool.run(train_under_ddp, 2, loss, True):
        torch.testing.assert_close(actual, value)
        torch.testing.assert_close(actual_gradients, gradients)


def call_all(by_name):
    rank = dist.get_rank()
    group = collectives.group_name() if by_name else None
    x = torch.tensor([[1.0 + rank, -rank]], requires_grad=True)
    plain = collectives.all_reduce_sum(x, group), collectives.all_reduce_max(x, group)
    with_grad = (
        collectives.all_reduce_with_grad(x.t(), group),
        collectives.all_gather_with_grad(x.t(), group),
    )
    facts = collectives.world_size(group), collectives.rank(group)
    wants_grad = [y.requires_grad for y in plain + with_grad]
    return facts, wants_grad, [y.detach() for y in plain + with_grad], x.detach()


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("world_size", WORLDS)
def test_values(gloo_pool, world_size, by_name):
    inputs = [torch.tensor([[1.0 + r, -r]]) for r in range(world_size)]
    total, top = sum(inputs), torch.stack(inputs).amax(0)
    rows = torch.cat([x.t() for x in inputs])
    results = gloo_pool.run(call_all, world_size, by_name)
    for r, (facts, wants_grad, values, x) in enumerate(results):
        assert facts == (world_size, r)
        assert wants_grad == [False, False, True, True]
        torch.testing.assert_close(values, [total, top, total.t(), rows])
        torch.testing.assert_close(x, inputs[r])


def call_in_subgroups():
    rank = dist.get_rank()
    own = [dist.new_group([r]) for r in range(dist.get_world_size())]
    with pytest.raises(ValueError, match="group must be one that this process is a member of"):
        collectives.world_size(own[1 - rank])
    alone = own[rank]
    names = collectives.group_name(alone), collectives.group_name()
    x = torch.full((2,), float(rank))
    swapped = dist.new_group([1, 0])
    return names, collectives.all_reduce_sum(x, alone), collectives.all_reduce_sum(x, swapped)


def test_subgroups(gloo_pool):
    for rank, (names, alone, both) in enumerate(gloo_pool.run(call_in_subgroups, 2)):
        assert names[0] == "" and names[1] != ""
        assert alone.tolist() == [rank, rank]
        assert both.tolist() == [1, 1]


def test_without_torch_distributed():
    assert not dist.is_initialized()
    x = torch.randn(3, 2, requires_grad=True)
    assert collectives.world_size() == 1 and collectives.rank() == 0
    assert collectives.group_name() == ""
    assert collectives.all_reduce_with_grad(x) is x
    assert collectives.all_gather_with_grad(x) is x
    for function in (collectives.all_reduce_sum, collectives.all_reduce_max):
        assert torch.equal(function(x), x) and not function(x).requires_grad
