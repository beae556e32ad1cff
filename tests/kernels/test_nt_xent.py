"""nt_xent: every backend against the float64 formula, its memory, several processes."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from benchmarks.measure import peak_extra_bytes
from fastssl import functional as F
from fastssl.kernels.common import contrastive_cpp
from fastssl.kernels.nt_xent import reference
from tests.kernels.util import (
    ATOL,
    DTYPES,
    assert_close_to_truth,
    backends_on_ranks,
    compiled_backends,
    device_of,
    to_double,
)

BACKENDS = compiled_backends("nt_xent")
ALL = ["reference", *BACKENDS]
# N, D: one of everything, primes, several tiles (of Triton's smaller ones, that is).
SHAPES = [(1, 1), (2, 3), (7, 5), (67, 37)]


def make_views(shape, dtype=torch.float32, device="cpu"):
    z0, z1 = torch.randn(2, *shape)
    return [z.to(device, dtype) for z in (z0, z1 + z0)]


def call(views, temperature, backend, wants=(True, True, True)):
    """The loss, and the gradients of 1.7 times it of both views and the temperature."""
    leaves = [*views, temperature]
    leaves = [x.detach().requires_grad_(want) for x, want in zip(leaves, wants, strict=True)]
    loss = F.nt_xent(*leaves[:2], temperature=leaves[2], backend=backend)
    targets = [leaf for leaf, want in zip(leaves, wants, strict=True) if want]
    grads = iter(torch.autograd.grad(1.7 * loss, targets))
    return [loss.detach(), *(next(grads) if want else None for want in wants)]


NAMES = ("loss", "dz0", "dz1", "dtemperature")


def check_against_truth(views, backend, temperature=0.2):
    t = torch.tensor(temperature, device=views[0].device)
    actual = call(views, t, backend)
    eager = call(views, t, "reference")
    truth = call([z.double() for z in views], t.double(), "reference")
    dtype = views[0].dtype
    assert [x.dtype for x in actual] == [torch.float32, dtype, dtype, torch.float32]
    # What scores are known to, times how often it is multiplied by them.
    scale = 1.7 / temperature
    atols = (
        max(1e-6, (2**-23 if t.is_cuda else 2**-24) / temperature),
        *(max(ATOL[dtype], 1e-6 * scale),) * 2,
        2e-6 * scale / temperature,
    )
    if dtype != torch.float32 and backend == "triton":
        # Softmax weights are rounded to the features' dtype for their product, as in attention.
        atols = (*atols[:3], ATOL[dtype] * scale / temperature)
    for name, *values, atol in zip(NAMES, actual, eager, truth, atols, strict=True):
        assert_close_to_truth(name, *values, atol)


def published(z0, z1, temperature):
    """SimCLR's equation 1, row by row."""
    z = functional.normalize(torch.cat([z0, z1]), dim=1)
    similarity = z @ z.t() / temperature
    terms = []
    for i in range(len(z)):
        j = (i + len(z0)) % len(z)
        total = sum(similarity[i, k].exp() for k in range(len(z)) if k != i)
        terms.append(-(similarity[i, j].exp() / total).log())
    return sum(terms) / len(terms)


def test_reference_is_the_published_formula():
    z0, z1 = make_views((7, 5), torch.float64)
    expected = published(z0, z1, 0.3)
    torch.testing.assert_close(F.nt_xent(z0, z1, temperature=0.3), expected, rtol=1e-12, atol=0)


# 0.01 is below what needs no shift; the gradients of 100 times a rounded weight would tell nothing.
KINDS = [*((dtype, 0.2) for dtype in DTYPES), (torch.float32, 0.01)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, temperature", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, temperature, backend, poisoned_memory):
    check_against_truth(make_views(shape, dtype, device_of(backend)), backend, temperature)


@pytest.mark.parametrize("temperature", [0.2, 0.01])
@pytest.mark.parametrize("shape", [(130, 16), (515, 16), (1700, 8)], ids=str)
def test_cpp_on_many_tiles(shape, temperature, poisoned_memory):
    """Even and odd numbers of blocks, last ones short."""
    check_against_truth(make_views(shape), "cpp", temperature)


@pytest.mark.parametrize("size", [3, 8, 64])
@pytest.mark.parametrize("bound", [0.0, 60.0])
def test_any_block_size(size, bound, monkeypatch):
    monkeypatch.setattr(contrastive_cpp, "TILE_COLUMNS", size)
    monkeypatch.setattr(contrastive_cpp, "TILE_ROWS", max(1, size // 3))
    monkeypatch.setattr(contrastive_cpp, "BOUND", bound)
    check_against_truth(make_views((37, 6)), "cpp")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [129, 300])
def test_wide_features(dim, backend):
    check_against_truth(make_views((9, dim), device=device_of(backend)), backend)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("wants", [(True, False, False), (False, True, True), (False, False, True)])
def test_only_wanted_gradients(wants, backend):
    views = make_views((7, 5), device=device_of(backend))
    t = torch.tensor(0.2, device=views[0].device)
    expected = call(views, t, "reference")
    actual = call(views, t, backend, wants)
    for value, full, want in zip(actual, expected, (True, *wants), strict=True):
        assert (value is not None) == want
        if want:
            torch.testing.assert_close(value, full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ALL)
def test_is_symmetric_and_ignores_lengths(backend):
    z0, z1 = make_views((13, 6), device=device_of(backend))
    t = torch.tensor(0.2, device=z0.device)
    loss, d0, d1, dt = call((z0, z1), t, backend)
    swapped = call((z1, z0), t, backend)
    torch.testing.assert_close([loss, d1, d0, dt], swapped, rtol=1e-4, atol=1e-5)
    longer, d3, *_ = call((3 * z0, z1), t, backend)
    torch.testing.assert_close([longer, 3 * d3], [loss, d0], rtol=1e-4, atol=1e-5)
    assert (d0 * z0).sum(dim=1).abs().max() < 1e-5


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("temperature", [1e-3, 0.0241, 0.07, 100.0])
@pytest.mark.parametrize("what", ["random", "equal", "opposite", "zero", "huge", "tiny"])
def test_extreme_logits(what, temperature, backend):
    """Finite whatever comes, and as exact as float32 scores allow."""
    z0, z1 = make_views((13, 6), device=device_of(backend))
    if what == "equal":
        z0, z1 = torch.ones_like(z0), torch.ones_like(z1)
    elif what == "opposite":
        z1 = -z0
    elif what in ("zero", "huge", "tiny"):
        factor = {"zero": 0, "huge": 1e15, "tiny": 1e-8}[what]
        z0, z1 = z0 * factor, z1 * factor
    t = torch.tensor(temperature, device=z0.device)
    actual = call((z0, z1), t, backend)
    assert all(torch.isfinite(x).all() for x in actual)
    if what in ("equal", "zero"):
        assert actual[0].item() == pytest.approx(math.log(25), rel=1e-4)
    truth = call([to_double(z) for z in (z0, z1)], t.double(), "reference")
    known = 2**-24 / temperature
    assert (actual[0] - truth[0]).abs() <= 2e-6 + 16 * known
    if what == "random":
        for value, expected in zip(actual[1:3], truth[1:3], strict=True):
            error = (value - expected).abs().max()
            assert error <= 64 * (2**-24 + known) * (1 + expected.abs().max())


@pytest.mark.parametrize("backend", ALL)
def test_batch_of_one(backend):
    """One candidate, the pair: loss and gradients are zero."""
    views = make_views((1, 8), device=device_of(backend))
    loss, *grads = call(views, torch.tensor(0.1, device=views[0].device), backend)
    assert abs(loss.item()) <= 2e-6
    assert all(grad.abs().max() <= 1e-4 for grad in grads)


@pytest.mark.parametrize("backend", ALL)
def test_strided_and_mixed_views(backend):
    z0, z1 = make_views((8, 8), device=device_of(backend))
    t = torch.tensor(0.2, device=z0.device)
    z0 = z0.bfloat16()
    expected = call((z0.float(), z1), t, "reference")
    actual = call((z0.t().contiguous().t(), z1.t().contiguous().t()), t, backend)
    assert actual[1].dtype == torch.bfloat16 and actual[2].dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=2e-3, check_dtype=False)


@pytest.mark.parametrize("backend", ALL)
def test_never_cast_by_autocast(backend):
    views = make_views((7, 5), device=device_of(backend))
    t = torch.tensor(0.2, device=views[0].device)
    leaves = [x.requires_grad_() for x in (*views, t)]
    results = []
    for enabled in (False, True):
        with torch.autocast(t.device.type, torch.bfloat16, enabled=enabled):
            loss = F.nt_xent(*views, temperature=t, backend=backend)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_scaling_reaches_fp16_gradients(backend):
    """Scaled before they are rounded, so that small ones do not vanish."""
    views = make_views((60, 5), torch.float16, device_of(backend))
    scaled = []
    for factor in (1.0, 2.0**12):
        leaves = [z.detach().requires_grad_() for z in views]
        loss = F.nt_xent(*leaves, temperature=0.5, backend=backend)
        scaled.append(torch.autograd.grad(loss, leaves, torch.full_like(loss, factor))[0])
    truth = (
        call(
            [z.double() for z in views], torch.tensor(0.5).double().to(views[0].device), "reference"
        )[1]
        / 1.7
    )
    error = (scaled[1].double() / 2.0**12 - truth.to(scaled[1].device)).abs().max()
    assert error <= 2**-9 * truth.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_give_the_same_bits(backend):
    views = make_views((150 if backend == "triton" else 1100, 8), device=device_of(backend))
    t = torch.tensor(0.2, device=views[0].device)
    first, second = (call(views, t, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_reference_gradcheck():
    t = torch.tensor(0.5, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (*make_views((4, 5), torch.float64), t)]
    torch.autograd.gradcheck(reference.nt_xent, leaves)


@pytest.mark.parametrize("backend", ALL)
def test_opcheck(backend):
    z0, z1 = (z.requires_grad_() for z in make_views((6, 4), device=device_of(backend)))
    t = torch.tensor(0.5, device=z0.device, requires_grad=True)
    op = torch.ops.fastssl.nt_xent
    torch.library.opcheck(op, (z0, z1, t, "", backend))
    if backend == "reference":
        return
    saved = op(z0, z1, t, "", backend)[1:]
    detached = [x.detach() for x in (torch.ones_like(t), z0, z1, t, *saved)]
    torch.library.opcheck(torch.ops.fastssl.nt_xent_backward, (*detached, "", backend))


@pytest.mark.parametrize("backend", ALL)
def test_compiles_without_a_graph_break(backend):
    views = make_views((7, 5), device=device_of(backend))
    t = torch.tensor(0.2, device=views[0].device)
    expected = call(views, t, backend)

    def step(z0, z1, t):
        return F.nt_xent(z0, z1, temperature=t, backend=backend)

    leaves = [x.detach().requires_grad_() for x in (*views, t)]
    torch.compiler.reset()
    loss = torch.compile(step, fullgraph=True)(*leaves)
    actual = [loss.detach(), *torch.autograd.grad(1.7 * loss, leaves)]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def extra_bytes(N, D):
    views = [z.requires_grad_() for z in make_views((N, D))]

    def step():
        loss = F.nt_xent(*views, temperature=0.2, backend="cpp")
        return loss.detach(), *torch.autograd.grad(loss, views)

    return peak_extra_bytes(step, (), torch.device("cpu"))


def test_cpp_keeps_its_promise_on_memory():
    """Unit vectors, a few numbers per row, and a tile per thread; nothing grows with N x N."""
    tile = 4 * 128 * 512 * torch.get_num_threads()
    for N in (1024, 2048):
        assert extra_bytes(N, 64) <= 4 * 2 * N * (64 + 16) + tile
    assert extra_bytes(2048, 64) <= 0.05 * 4 * 4096**2


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_65536_images(temperature):
    """Logits of 69 GB. The mean against that of a few rows by the formula in float64."""
    N, D = 65536, 128
    z0 = torch.randn(N, D)
    # Far enough apart that finding the other view is hard at any temperature.
    views = [z0, 0.3 * z0 + torch.randn(N, D)]
    t = torch.tensor(temperature)
    loss, d0, d1, dt = call(views, t, "cpp")
    assert torch.isfinite(loss) and torch.isfinite(dt)
    assert torch.isfinite(d0).all() and torch.isfinite(d1).all()
    z = functional.normalize(torch.cat(views), dim=1)
    some = torch.arange(0, 2 * N, 2 * N // 997)
    scores = (z[some] @ z.t()).double() / temperature
    scores[torch.arange(len(some)), some] = -torch.inf
    terms = scores.logsumexp(1) - scores[torch.arange(len(some)), (some + N) % (2 * N)]
    # Within five standard errors of the mean, which are a small part of it.
    bound = 5 * terms.std() / math.sqrt(len(some))
    assert (terms.mean() - loss).abs() <= bound < terms.mean() / 2


def _rank_step(x0, x1, backend, wrap, parts, temperature):
    """Gradient accumulation over `parts` of the local batch, an encoder under DDP or FSDP2."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = Model(x0.shape[1], temperature, backend)
    if wrap == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    else:
        model = nn.parallel.DistributedDataParallel(model)
    step = model
    if wrap == "compiled":
        torch.compiler.reset()
        # The tracing is what is tested, not the code that a compiler makes of it.
        step = torch.compile(model.module, fullgraph=True, backend="aot_eager")
    losses = []
    for part in range(parts):
        rows = x0.shape[0] // parts
        mine = slice(part * rows + rank * rows // world, part * rows + (rank + 1) * rows // world)
        loss = step(x0[mine], x1[mine])
        (loss / parts).backward()
        losses.append(loss.detach())
    parameters = model.parameters()
    if wrap == "fsdp":
        grads = [p.grad.full_tensor() for p in parameters]
    else:
        grads = [p.grad for p in parameters]
    if wrap == "compiled":
        for grad in grads:
            dist.all_reduce(grad)
            grad /= world
    return torch.stack(losses).mean(), grads


class Model(nn.Module):
    def __init__(self, dim, temperature, backend):
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Linear(dim, 6)
        self.temperature = nn.Parameter(torch.tensor([temperature]))
        self.backend = backend

    def forward(self, x0, x1):
        z0, z1 = self.encoder(x0), self.encoder(x1)
        return F.nt_xent(z0, z1, temperature=self.temperature, backend=self.backend)


@pytest.mark.parametrize("backend", backends_on_ranks("nt_xent"))
@pytest.mark.parametrize(
    ("world", "wrap", "parts", "temperature"),
    [
        (1, "ddp", 1, 0.2),
        (2, "ddp", 2, 0.2),
        (2, "ddp", 1, 0.02),
        (2, "fsdp", 1, 0.2),
        (2, "compiled", 1, 0.2),
        (4, "ddp", 1, 0.2),
    ],
)
def test_processes_equal_one(gloo_pool, world, wrap, parts, temperature, backend):
    x0, x1 = torch.randn(2, 16, 7)
    model = Model(7, temperature, "reference").double()
    losses = [
        model(a.double(), b.double()) for a, b in zip(x0.chunk(parts), x1.chunk(parts), strict=True)
    ]
    truth = sum(losses) / parts
    truth.backward()
    results = gloo_pool.run(_rank_step, world, x0, x1, backend, wrap, parts, temperature)
    limits = {"rtol": 1e-4, "check_dtype": False}
    mean = torch.stack([loss for loss, _ in results]).mean()
    torch.testing.assert_close(mean, truth.detach(), atol=1e-5, **limits)
    for _, grads in results:
        for grad, parameter in zip(grads, model.parameters(), strict=True):
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(grad, parameter.grad, atol=1e-5 * max(1, scale), **limits)


def _unequal_losses(z0, z1, backend):
    """Each rank weighs its loss on its own: exact gradients of the features all the same."""
    rank, world = dist.get_rank(), dist.get_world_size()
    views = [z.chunk(world)[rank].requires_grad_() for z in (z0, z1)]
    loss = F.nt_xent(*views, temperature=0.3, backend=backend)
    return torch.autograd.grad((1 + rank) * loss, views)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_ranks_may_weigh_their_losses(gloo_pool, backend):
    z0, z1 = make_views((6, 5))
    expected = gloo_pool.run(_unequal_losses, 2, z0, z1, "reference")
    actual = gloo_pool.run(_unequal_losses, 2, z0, z1, backend)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


Z = torch.zeros(4, 5)
BAD = {
    "z0 must be a Tensor, got list": {"z0": [1.0]},
    "z0 must have 2 dimensions, got shape (5,)": {"z0": torch.zeros(5)},
    "z0 must have at least one row and column, got [4, 0]": {"z0": torch.zeros(4, 0)},
    "z1 must be float32 or bfloat16 or float16 or float64, got int64": {"z1": Z.long()},
    "z1 must have shape [N, D] = [4, 5], got [4, 6]": {"z1": torch.zeros(4, 6)},
    "temperature must be positive and finite, got -1": {"temperature": -1},
    "temperature must be a float or a Tensor, got bool": {"temperature": True},
    "temperature must hold one number, got shape [0]": {"temperature": torch.ones(0)},
    "backend must be one of cpp, triton, reference": {"backend": "magic"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    arguments = {"z0": Z, "z1": Z, "temperature": 0.1, **BAD[message]}
    with pytest.raises((TypeError, ValueError)) as error:
        F.nt_xent(arguments.pop("z0"), arguments.pop("z1"), **arguments)
    assert message in str(error.value)
