"""What the tests of barlow_twins, vicreg and covariance_loss share."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fastssl import functional as F
from tests.kernels.util import ATOL, assert_close_to_truth, gradients, to_double

# N, D: one row, one column, primes, several tiles of either; both sides of N = D.
SHAPES = [(1, 1), (1, 7), (7, 1), (3, 5), (7, 13), (13, 7), (67, 131), (131, 67)]
# Gradients of bf16 features differ by a unit in the last place from those of eager.
GRAD_ATOL = {**ATOL, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def make_views(number, shape, dtype=torch.float32, device="cpu"):
    first = torch.randn(shape) * torch.linspace(0.5, 1.5, shape[1]) + torch.randn(shape[1])
    views = [first, 0.8 * first + 0.4 * torch.randn(shape)]
    return [view.to(device, dtype) for view in views[:number]]


def assert_matches_float64(name, views, backend, **kwargs):
    def run(with_backend, inputs):
        def call(*leaves):
            return getattr(F, name)(*leaves, backend=with_backend, **kwargs)

        return gradients(call, inputs, torch.tensor(1.3))

    actual, actual_grads = run(backend, views)
    eager, eager_grads = run("reference", views)
    truth, truth_grads = run("reference", [to_double(view) for view in views])
    assert actual.dtype == torch.float32
    # Eager is at times exact by chance.
    assert_close_to_truth("loss", actual, eager, truth, atol=3e-6)
    for i, grads in enumerate(zip(actual_grads, eager_grads, truth_grads, strict=True)):
        assert grads[0].dtype == views[i].dtype
        assert_close_to_truth(f"gradient {i}", *grads, GRAD_ATOL[views[i].dtype])


class Model(torch.nn.Module):
    """Both views through one layer, so that DDP averages their gradients."""

    def __init__(self, width):
        super().__init__()
        torch.manual_seed(3)
        self.layer = torch.nn.Linear(5, width)

    def forward(self, x):
        return self.layer(x)


def loss_and_gradients(model, x, call):
    rows = x.shape[1]
    z = model(x.flatten(0, 1))
    value = call(z[:rows], z[rows:])
    value.backward()
    return value.detach(), [p.grad for p in model.parameters()]


def call_by_name(name, number, backend):
    def call(*views):
        return getattr(F, name)(*views[:number], backend=backend)

    return call


def train_under_ddp(name, number, backend, width, x, compiled):
    model = DistributedDataParallel(Model(width))
    own = x.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]
    call = call_by_name(name, number, backend)
    if compiled:
        # The tracing is what is tested, not the code that a compiler makes of it.
        torch.compiler.reset()
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    value, grads = loss_and_gradients(model, own, call)
    values = [torch.zeros_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value)
    return values, grads


def assert_ranks_equal_one_process(
    pool, name, number, backend, width, world_size, compiled=False, mean_of_ranks=False
):
    """8 rows in all; a width above takes the Gram matrices, below the covariances."""
    torch.manual_seed(5)
    x = torch.randn(2, 8, 5)
    reference = call_by_name(name, number, "reference")
    model = Model(width).double()
    expected, expected_grads = loss_and_gradients(model, x.double(), reference)
    results = pool.run(train_under_ddp, world_size, name, number, backend, width, x, compiled)
    for values, grads in results:
        if mean_of_ranks:
            values = [sum(values) / world_size]
        for value in values:
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
        for grad, other in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad.double(), other, rtol=1e-4, atol=2e-5)
