"""info_nce: every backend against the float64 formula, its memory, several processes."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import peak_extra_bytes
from fastssl import functional as F
from fastssl.kernels.common.contrastive import MAX_TRITON_DIM
from fastssl.kernels.info_nce import reference
from tests.kernels.util import (
    ATOL,
    DTYPES,
    assert_close_to_truth,
    backends_on_ranks,
    compiled_backends,
    device_of,
    to_double,
)

BACKENDS = compiled_backends("info_nce")
ALL = ["reference", *BACKENDS]
# N, M, D: one of everything, primes, several tiles of each (of Triton's smaller ones, that is).
SHAPES = [(1, 1, 1), (7, 13, 5), (67, 131, 37)]
KINDS = ["in_batch", "queue", "queue_in_batch", "bank", "bank_in_batch"]


def unit(*shape):
    return functional.normalize(torch.randn(shape), dim=-1)


def make_inputs(shape, kind, dtype=torch.float32, device="cpu"):
    """queries, keys, negatives, and the keyword for the kind."""
    N, M, D = shape
    queries, keys = torch.randn(N, D), torch.randn(N, D)
    keys += queries
    negatives = {"in_batch": None, "queue": unit(M, D), "bank": unit(N, M, D)}
    negatives = negatives[kind.removesuffix("_in_batch")]
    tensors = [None if t is None else t.to(device, dtype) for t in (queries, keys, negatives)]
    return tensors, {"in_batch_negatives": kind.endswith("in_batch")}


def call(tensors, temperature, backend, wants=(True, True, True), **options):
    """The loss, and the gradients of 1.7 times it of queries, keys and temperature."""
    queries, keys, negatives = tensors
    leaves = [queries, keys, temperature]
    leaves = [x.detach().requires_grad_(want) for x, want in zip(leaves, wants, strict=True)]
    loss = F.info_nce(
        *leaves[:2], temperature=leaves[2], negatives=negatives, backend=backend, **options
    )
    targets = [leaf for leaf, want in zip(leaves, wants, strict=True) if want]
    grads = iter(torch.autograd.grad(1.7 * loss, targets) if targets else ())
    return [loss.detach(), *(next(grads) if want else None for want in wants)]


NAMES = ("loss", "dqueries", "dkeys", "dtemperature")


def check_against_truth(tensors, backend, temperature=0.2, **options):
    t = torch.tensor(temperature, device=tensors[0].device)
    actual = call(tensors, t, backend, **options)
    eager = call(tensors, t, "reference", **options)
    truth = call([to_double(x) for x in tensors], t.double(), "reference", **options)
    assert [x.dtype for x in actual] == [torch.float32, *[tensors[0].dtype] * 2, torch.float32]
    # What scores are known to, times how often it is multiplied by them.
    scale = 1.7 / temperature
    atols = (1e-6, *(max(ATOL[tensors[0].dtype], 1e-6 * scale),) * 2, 2e-6 * scale / temperature)
    if tensors[0].dtype != torch.float32 and backend == "triton":
        # Softmax weights are rounded to the features' dtype for their product, as in attention.
        atols = (1e-6, *atols[1:3], ATOL[tensors[0].dtype] * scale / temperature)
    for name, *values, atol in zip(NAMES, actual, eager, truth, atols, strict=True):
        assert_close_to_truth(name, *values, atol)
    return actual


def published(queries, keys, negatives, temperature, in_batch_negatives):
    """-log(exp(positive) / sum of exp), query by query."""
    queries, keys = (functional.normalize(x, dim=1) for x in (queries, keys))
    losses = []
    for i, query in enumerate(queries):
        candidates = list(keys) if in_batch_negatives else [keys[i]]
        if negatives is not None:
            candidates += list(negatives if negatives.dim() == 2 else negatives[i])
        total = sum((query @ candidate / temperature).exp() for candidate in candidates)
        losses.append(-((query @ keys[i] / temperature).exp() / total).log())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_published_formula(kind):
    tensors, options = make_inputs((7, 5, 6), kind, torch.float64)
    actual = F.info_nce(*tensors[:2], temperature=0.3, negatives=tensors[2], **options)
    expected = published(*tensors, 0.3, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_reference_is_mocos_cross_entropy():
    """MoCo's code: the positive in column 0, the queue [D, M] after it."""
    (queries, keys, queue), options = make_inputs((7, 50, 6), "queue", torch.float64)
    q, k = functional.normalize(queries, dim=1), functional.normalize(keys, dim=1)
    positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
    logits = torch.cat([positive, torch.einsum("nc,ck->nk", q, queue.t())], dim=1) / 0.07
    expected = nn.CrossEntropyLoss()(logits, torch.zeros(7, dtype=torch.long))
    actual = F.info_nce(queries, keys, temperature=0.07, negatives=queue, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, kind, dtype, backend, poisoned_memory):
    tensors, options = make_inputs(shape, kind, dtype, device_of(backend))
    check_against_truth(tensors, backend, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(300, 1100, 33), (2049, 600, 16)], ids=str)
def test_cpp_on_many_tiles(shape, kind, poisoned_memory):
    """More rows, columns and slices than a tile holds, none of them a multiple of it."""
    if kind.startswith("bank") and shape[0] > 2000:
        shape = (2049, 70, 16)
    tensors, options = make_inputs(shape, kind)
    check_against_truth(tensors, "cpp", **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
def test_normalize(normalize, backend):
    tensors, options = make_inputs((19, 30, 12), "queue_in_batch", device=device_of(backend))
    tensors[0] *= 3
    actual = check_against_truth(tensors, backend, 1.0, normalize=normalize, **options)
    along = (actual[1] * tensors[0]).sum(dim=1).abs().max()
    # The loss does not change with the length of a normalised query.
    assert (along < 1e-6) == normalize


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [129, 300])
def test_wide_features(dim, dtype, backend):
    tensors, options = make_inputs((21, 18, dim), "queue_in_batch", dtype, device_of(backend))
    check_against_truth(tensors, backend, **options)


def test_triton_says_what_is_too_wide():
    tensors, _ = make_inputs((3, 4, MAX_TRITON_DIM + 1), "queue", device=device_of("triton"))
    with pytest.raises(ValueError, match="features of 513 dimensions, more than 512"):
        F.info_nce(*tensors[:2], temperature=0.1, backend="triton")


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "wants", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_only_wanted_gradients(wants, kind, backend):
    tensors, options = make_inputs((7, 9, 5), kind, device=device_of(backend))
    t = torch.tensor(0.2, device=tensors[0].device)
    expected = call(tensors, t, "reference", **options)
    actual = call(tensors, t, backend, wants, **options)
    for value, full, want in zip(actual, expected, (True, *wants), strict=True):
        assert (value is not None) == want
        if want:
            torch.testing.assert_close(value, full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_without_gradient_cost_no_product(backend):
    tensors, options = make_inputs((7, 9, 5), "queue_in_batch", device=device_of(backend))
    flops = {}
    for wants_keys in (False, True):
        with FlopCounterMode(display=False) as counter:
            t = torch.tensor(0.2, device=device_of(backend))
            call(tensors, t, backend, (True, wants_keys, True), **options)
        flops[wants_keys] = counter.get_total_flops()
    # Scores and the queries' gradient; scores of the batch's keys and their gradient.
    assert flops[False] == 2 * 2 * 7 * (7 + 9) * 5
    assert flops[True] - flops[False] == 2 * 2 * 7 * 7 * 5


@pytest.mark.parametrize("backend", ALL)
def test_float_temperature_and_no_gradient(backend):
    tensors, options = make_inputs((7, 9, 5), "queue", device=device_of(backend))
    t = torch.tensor(0.2, device=tensors[0].device)
    expected = call(tensors, t, "reference", **options)[0]
    with torch.no_grad():
        loss = F.info_nce(
            *tensors[:2], temperature=0.2, negatives=tensors[2], backend=backend, **options
        )
    torch.testing.assert_close(loss, expected)


def extreme(kind):
    tensors, options = make_inputs((13, 40, 6), kind.split("/")[0])
    what = kind.split("/")[1]
    if what == "equal":
        tensors = [torch.ones_like(x) / math.sqrt(6) for x in tensors]
    elif what == "opposite":
        tensors[1] = -tensors[0]
        tensors[2] = unit(40, 6)
    elif what == "zero":
        tensors = [torch.zeros_like(x) for x in tensors]
    elif what == "huge":
        tensors = [x * 1e6 for x in tensors]
    elif what == "falling":
        # Each block's scores are above all before it: the running maximum moves.
        tensors[2] = tensors[2].sum(0) * torch.linspace(-1, 1, 40)[:, None]
    return tensors, options


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("temperature", [1e-3, 0.07, 100.0])
@pytest.mark.parametrize("what", ["random", "equal", "opposite", "zero", "huge", "falling"])
@pytest.mark.parametrize("kind", ["queue", "queue_in_batch"])
def test_extreme_logits(kind, what, temperature, backend):
    """Finite whatever comes, and as exact as float32 scores allow."""
    tensors, options = extreme(f"{kind}/{what}")
    tensors = [x.to(device_of(backend)) for x in tensors]
    t = torch.tensor(temperature, device=tensors[0].device)
    actual = call(tensors, t, backend, **options)
    assert all(torch.isfinite(x).all() for x in actual)
    if what == "equal":
        candidates = 41 if kind == "queue" else 53
        assert actual[0].item() == pytest.approx(math.log(candidates), rel=1e-4)
    truth = call([x.double() for x in tensors], t.double(), "reference", **options)
    scores = max(1.0, tensors[2].norm(dim=-1).max().item()) / temperature
    error = (actual[0] - truth[0]).abs().item()
    assert error <= 2e-6 + 16 * 2**-24 * scores
    if what in ("random", "falling"):
        known = 64 * 2**-24 * (1 + scores)
        for value, expected in zip(actual[1:3], truth[1:3], strict=True):
            assert (value - expected).abs().max() <= known * (1 + expected.abs().max())


@pytest.mark.parametrize("backend", ALL)
def test_batch_of_one_alone(backend):
    """No other key: loss and gradients are zero."""
    tensors, options = make_inputs((1, 1, 8), "in_batch", device=device_of(backend))
    t = torch.tensor(0.1, device=tensors[0].device)
    loss, *grads = call(tensors, t, backend, **options)
    assert abs(loss.item()) <= 2e-6
    assert all(grad.abs().max() <= 1e-4 for grad in grads)


@pytest.mark.parametrize("backend", ALL)
def test_empty_queue(backend):
    tensors, options = make_inputs((7, 0, 5), "queue_in_batch", device=device_of(backend))
    t = torch.tensor(0.2, device=tensors[0].device)
    for negatives in (tensors[2], tensors[2].expand(7, 0, 5)):
        actual = call([*tensors[:2], negatives], t, backend, **options)
        expected = call([*tensors[:2], None], t, "reference", **options)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ALL)
def test_strided_and_mixed_inputs(backend):
    (q, k, negatives), options = make_inputs((8, 12, 8), "queue_in_batch", torch.bfloat16)
    device = device_of(backend)
    q, k, negatives = q.to(device), k.float().to(device), negatives.to(device)
    strided = call([q.t().contiguous().t(), k.t(), negatives[:, :8]], torch.tensor(
        0.2, device=device), backend, **options)  # fmt: skip
    plain = call([q, k.t().contiguous(), negatives], torch.tensor(
        0.2, device=device), "reference", **options)  # fmt: skip
    assert strided[1].dtype == torch.bfloat16 and strided[2].dtype == torch.float32
    torch.testing.assert_close(strided, plain, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("backend", ALL)
def test_never_cast_by_autocast(backend):
    tensors, options = make_inputs((7, 9, 5), "queue_in_batch", device=device_of(backend))
    t = torch.tensor(0.2, device=tensors[0].device)
    leaves = [x.requires_grad_() for x in (*tensors[:2], t)]
    results = []
    for enabled in (False, True):
        with torch.autocast(t.device.type, torch.bfloat16, enabled=enabled):
            loss = F.info_nce(
                *leaves[:2], temperature=t, negatives=tensors[2], backend=backend, **options
            )
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_queue_may_change_before_backward(backend):
    """MoCo pushes into its queue right after the loss."""
    (queries, keys, queue), options = make_inputs((7, 9, 5), "queue", device=device_of(backend))
    t = torch.tensor(0.2, device=queries.device)
    expected = call((queries, keys, queue), t, "reference", **options)[1]
    queries.requires_grad_()
    loss = F.info_nce(queries, keys, temperature=t, negatives=queue, backend=backend, **options)
    queue.zero_()
    (1.7 * loss).backward()
    torch.testing.assert_close(queries.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_give_the_same_bits(backend):
    tensors, options = make_inputs((150, 200, 24), "queue_in_batch", device=device_of(backend))
    t = torch.tensor(0.2, device=tensors[0].device)
    first, second = (call(tensors, t, backend, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_reference_gradcheck(kind):
    (q, k, negatives), options = make_inputs((4, 3, 5), kind, torch.float64)

    def function(q, k, t):
        return reference.info_nce(q, k, negatives, t, 0, options["in_batch_negatives"], True)

    t = torch.tensor(0.5, dtype=torch.float64)
    torch.autograd.gradcheck(function, [x.requires_grad_() for x in (q, k, t)])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind, backend):
    (q, k, negatives), options = make_inputs((6, 5, 4), kind, device=device_of(backend))
    t = torch.tensor(0.5, device=q.device, requires_grad=True)
    settings = (0, options["in_batch_negatives"], True)
    op = torch.ops.fastssl.info_nce
    arguments = (q.requires_grad_(), k.requires_grad_(), negatives, t)
    torch.library.opcheck(op, (*arguments, *settings, True, backend))
    if backend == "reference":
        return
    torch.library.opcheck(op, (q.detach(), k, negatives, t.detach(), *settings, False, backend))
    total = op(*arguments, *settings, True, backend)[1]
    detached = [x.detach() for x in (torch.ones_like(t), q, k, t, total)]
    torch.library.opcheck(torch.ops.fastssl.info_nce_backward, (*detached, *settings, backend))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(kind, backend):
    tensors, options = make_inputs((7, 9, 5), kind, device=device_of(backend))
    t = torch.tensor(0.2, device=tensors[0].device)
    expected = call(tensors, t, backend, **options)

    def step(q, k, negatives, t):
        return F.info_nce(q, k, temperature=t, negatives=negatives, backend=backend, **options)

    leaves = [x.detach().requires_grad_() for x in (*tensors[:2], t)]
    torch.compiler.reset()
    loss = torch.compile(step, fullgraph=True)(*leaves[:2], tensors[2], leaves[2])
    actual = [loss.detach(), *torch.autograd.grad(1.7 * loss, leaves)]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_cpp_keeps_its_promise_on_memory():
    """Under 5 % of the logits, in float32 and from a bf16 queue, whatever the queue holds."""
    N, D = 256, 64
    extra = {}
    for M in (8192, 32768):
        for dtype in (torch.float32, torch.bfloat16):
            q, k, queue = torch.randn(N, D), torch.randn(N, D), unit(M, D).to(dtype)
            q.requires_grad_()

            def step(q=q, k=k, queue=queue):
                loss = F.info_nce(
                    q, k, temperature=0.2, negatives=queue, in_batch_negatives=False, backend="cpp"
                )
                return loss.detach(), *torch.autograd.grad(loss, q)

            extra[M, dtype] = peak_extra_bytes(step, (), torch.device("cpu"))
    assert extra[32768, torch.float32] <= extra[8192, torch.float32]
    for dtype in (torch.float32, torch.bfloat16):
        assert extra[32768, dtype] <= 0.05 * 4 * N * 32768 * 2


@pytest.mark.slow
def test_real_sizes_on_a_cpu():
    """MoCo's queue, and SimCLR's largest batch against itself."""
    for shape, kind in (((256, 65536, 128), "queue"), ((4096, 4096, 128), "queue_in_batch")):
        tensors, options = make_inputs(shape, kind)
        check_against_truth(tensors, "cpp", **options)


class Encoder(nn.Module):
    """One layer for queries and keys, and a temperature to learn."""

    def __init__(self, width, **options):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(width, 6)
        self.temperature = nn.Parameter(torch.tensor(0.2))
        self.options = options

    def forward(self, queries, keys, negatives):
        return F.info_nce(
            self.layer(queries),
            self.layer(keys),
            temperature=self.temperature,
            negatives=negatives,
            **self.options,
        )


def _parts(queries, keys, negatives, parts, rank=0, world=1):
    """Of each of `parts` micro-batches the share of a rank."""
    size = queries.shape[0] // parts
    for first in range(0, parts * size, size):
        mine = slice(first + rank * size // world, first + (rank + 1) * size // world)
        is_bank = negatives is not None and negatives.dim() == 3
        yield queries[mine], keys[mine], negatives[mine] if is_bank else negatives


def _accumulate(step, batches, parts):
    losses = []
    for batch in batches:
        loss = step(*batch)
        (loss / parts).backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def _rank_step(queries, keys, negatives, in_batch, backend, parts, how):
    """Gradient accumulation over `parts` of the local batch, weights under DDP."""
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(world))) if how == "group" else None
    options = {"in_batch_negatives": in_batch, "group": group, "backend": backend}
    model = Encoder(queries.shape[1], **options)
    if how == "compiled":
        torch.compiler.reset()
        # The tracing is what is tested, not the code that a compiler makes of it.
        step = torch.compile(model, fullgraph=True, backend="aot_eager")
    else:
        step = nn.parallel.DistributedDataParallel(model)
    loss = _accumulate(step, _parts(queries, keys, negatives, parts, rank, world), parts)
    grads = [p.grad for p in model.parameters()]
    if how == "compiled":
        for grad in grads:
            dist.all_reduce(grad)
            grad /= world
    return loss, grads


def _one_process(queries, keys, negatives, in_batch, parts):
    model = Encoder(queries.shape[1], in_batch_negatives=in_batch, backend="reference").double()
    tensors = (None if t is None else t.double() for t in (queries, keys, negatives))
    loss = _accumulate(model, _parts(*tensors, parts), parts)
    return loss, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("backend", backends_on_ranks("info_nce"))
@pytest.mark.parametrize(
    ("world", "parts", "how"),
    [(1, 1, ""), (2, 1, ""), (2, 2, "group"), (4, 1, ""), (2, 1, "compiled")],
)
@pytest.mark.parametrize("kind", ["in_batch", "queue_in_batch", "bank"])
def test_processes_equal_one(gloo_pool, kind, world, parts, how, backend):
    N, M, D = 16, 9, 7
    queries, keys = torch.randn(N, D), torch.randn(N, D)
    negatives = {"in_batch": None, "queue_in_batch": unit(M, 6), "bank": unit(N, M, 6)}[kind]
    arguments = (queries, keys, negatives, kind.endswith("in_batch"))
    truth, true_grads = _one_process(*arguments, parts)
    results = gloo_pool.run(_rank_step, world, *arguments, backend, parts, how)
    mean = torch.stack([loss for loss, _ in results]).mean()
    torch.testing.assert_close(mean, truth, rtol=1e-5, atol=1e-6, check_dtype=False)
    for _, grads in results:
        torch.testing.assert_close(grads, true_grads, rtol=1e-4, atol=1e-5, check_dtype=False)


Q, K = torch.zeros(4, 5), torch.zeros(4, 5)
BAD = {
    "queries must be a Tensor, got list": {"queries": [1.0]},
    "queries must have 2 dimensions, got shape (5,)": {"queries": torch.zeros(5)},
    "queries must have at least one row and column, got [0, 5]": {"queries": torch.zeros(0, 5)},
    "keys must be float32 or bfloat16 or float16 or float64, got int64": {"keys": K.long()},
    "keys must have shape [N, D] = [4, 5], got [3, 5]": {"keys": torch.zeros(3, 5)},
    "temperature must be positive and finite, got 0": {"temperature": 0},
    "temperature must be positive and finite, got nan": {"temperature": float("nan")},
    "temperature must be a float or a Tensor, got str": {"temperature": "0.1"},
    "temperature must hold one number, got shape [2]": {"temperature": torch.ones(2)},
    "temperature must be float32 or bfloat16 or float16 or float64, got int64": {
        "temperature": torch.tensor(1)
    },
    "negatives must have 2 or 3 dimensions, got shape (5,)": {"negatives": torch.zeros(5)},
    "negatives must have shape [M, D] = [any, 5], got [7, 4]": {"negatives": torch.zeros(7, 4)},
    "negatives must have shape [N, M, D] = [4, any, 5], got [3, 7, 5]": {
        "negatives": torch.zeros(3, 7, 5)
    },
    "negatives must not require a gradient (detach them), got one that does": {
        "negatives": torch.zeros(7, 5, requires_grad=True)
    },
    "negatives must be given where in_batch_negatives is False, got None": {
        "in_batch_negatives": False
    },
    "backend must be one of cpp, triton, reference": {"backend": "magic"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    arguments = {"queries": Q, "keys": K, "temperature": 0.1, **BAD[message]}
    with pytest.raises((TypeError, ValueError)) as error:
        F.info_nce(arguments.pop("queries"), arguments.pop("keys"), **arguments)
    assert message in str(error.value)
