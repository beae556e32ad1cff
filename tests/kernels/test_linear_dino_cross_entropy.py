"""linear_dino_cross_entropy: every backend against the float64 formula, its memory, FSDP2."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import peak_extra_bytes
from fastssl import functional as F
from fastssl.kernels.linear_dino_cross_entropy import blocks, reference
from tests.kernels.util import (
    ATOL,
    DTYPES,
    assert_close_to_truth,
    compiled_backends,
    device_of,
    to_double,
)

BACKENDS = compiled_backends("linear_dino_cross_entropy")
TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}
STATS = {"return_teacher_mean": True, "return_teacher_entropy": True}
# S, T, B, K, D, E: one of everything, primes, and several blocks with a short last one.
SHAPES = [(2, 1, 1, 1, 1, 1), (3, 2, 5, 13, 7, 11), (4, 2, 3, 4501, 37, 16)]


def make_inputs(shape, dtype, device):
    """Features of unit length, as the head's bottleneck gives them."""
    S, T, B, K, D, E = shape
    student = nn.functional.normalize(torch.randn(S, B, D), dim=-1)
    teacher = nn.functional.normalize(torch.randn(T, B, E), dim=-1)
    values = (student, torch.randn(K, D), teacher, torch.randn(K, E))
    return *(value.to(device, dtype) for value in values), 0.1 * torch.randn(K, device=device)


def learned_lengths(num_prototypes, dtype, device):
    """Options: positive, negative and, where the dtype allows it, tiny ones."""
    values = [torch.randn(num_prototypes) for _ in range(2)]
    values[0][0] = 1e-2 if dtype == torch.float16 else 1e-6
    names = ("student_lengths", "teacher_lengths")
    lengths = {n: v.to(device, dtype) for n, v in zip(names, values, strict=True)}
    return {"normalize_prototypes": True, **lengths}


def call(inputs, backend, **options):
    """(loss, teacher mean, teacher entropy), and the student's gradients times a factor."""
    features, prototypes, *rest = inputs
    leaves = [value.detach().requires_grad_() for value in (features, prototypes)]
    options = {**TEMPS, **STATS, **options}
    if "student_lengths" in options:
        lengths = options["student_lengths"].detach().requires_grad_()
        options["student_lengths"] = lengths
    outputs = F.linear_dino_cross_entropy(*leaves, *rest, backend=backend, **options)
    leaves += [lengths] if "student_lengths" in options else []
    grads = torch.autograd.grad(1.7 * outputs[0], leaves)
    return tuple(value.detach() for value in outputs), grads


def check_against_truth(inputs, backend, atol=None, **options):
    outputs, grads = call(inputs, backend, **options)
    eager, eager_grads = call(inputs, "reference", **options)
    with torch.autocast("cpu", enabled=False):
        truth, true_grads = call(
            [to_double(value) for value in inputs],
            "reference",
            **{name: to_double(value) for name, value in options.items()},
        )
    assert [value.dtype for value in outputs] == [torch.float32] * 3
    assert [grad.dtype for grad in grads[:2]] == [value.dtype for value in inputs[:2]]
    for name, *values in zip(("loss", "mean", "entropy"), outputs, eager, truth, strict=True):
        assert_close_to_truth(name, *values, atol)
    names = ("dfeatures", "dprototypes", "dlengths")
    for name, *values in zip(names[: len(grads)], grads, eager_grads, true_grads, strict=True):
        # With one prototype all is rounding: 1 - 1, times 1.7 / 0.1.
        assert_close_to_truth(name, *values, atol or 2 * ATOL[values[0].dtype])
        error, eager_error = ((value.double() - values[2]).norm() for value in values[:2])
        allowance = max(1e-5, ATOL[values[0].dtype], atol or 0)
        assert error <= 2 * eager_error + allowance * values[2].norm() + 2e-6, name
    return outputs, grads


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, normalize, dtype, backend, poisoned_memory):
    inputs = make_inputs(shape, dtype, device_of(backend))
    check_against_truth(inputs, backend, normalize_prototypes=normalize)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_learned_lengths_against_float64(shape, dtype, backend, poisoned_memory):
    device = device_of(backend)
    inputs = make_inputs(shape, dtype, device)
    check_against_truth(inputs, backend, **learned_lengths(shape[3], dtype, device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_learned_length_of_zero_has_its_gradient(backend):
    """And its prototype none, as the formula has it."""
    device = device_of(backend)
    inputs = make_inputs((3, 2, 4, 50, 8, 8), torch.float32, device)
    lengths = learned_lengths(50, torch.float32, device)
    lengths["student_lengths"][7] = 0
    _, grads = call(inputs, backend, **lengths)
    _, expected = call(inputs, "reference", **lengths)
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)
    assert grads[2][7] != 0 and (grads[1][7].abs() < 1e-15).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [100, 1024, 1500])
def test_any_block_size(size, backend, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BLOCKS", ((None, size),))
    monkeypatch.setattr(blocks, "GPU_BLOCKS", ((None, size),))
    inputs = make_inputs((3, 2, 2, 3007, 8, 8), torch.float32, device_of(backend))
    check_against_truth(inputs, backend, normalize_prototypes=True)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_equals_a_weight_normalised_layer_and_then_the_loss(backend):
    device = device_of(backend)
    inputs = make_inputs((4, 2, 3, 2100, 19, 19), torch.float32, device)
    options = learned_lengths(2100, torch.float32, device)
    student, prototypes, teacher, teacher_prototypes, center = inputs
    lengths = options["student_lengths"].clone()
    leaves = [value.requires_grad_() for value in (student, prototypes, lengths)]
    layers = [
        torch._weight_norm(v, g[:, None], 0)
        for v, g in ((prototypes, lengths), (teacher_prototypes, options["teacher_lengths"]))
    ]
    expected = F.dino_cross_entropy(
        student @ layers[0].T, teacher @ layers[1].T, center, **TEMPS, **STATS, backend="reference"
    )
    expected_grads = torch.autograd.grad(1.7 * expected[0], leaves)
    outputs, grads = call(inputs, backend, **options)
    for value, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(value, wanted.detach(), rtol=1e-5, atol=1e-5)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("normalize", [False, True])
def test_equals_the_layer_and_then_the_loss(normalize, backend):
    inputs = make_inputs((4, 2, 3, 2100, 19, 19), torch.float32, device_of(backend))
    student, prototypes, teacher, teacher_prototypes, center = inputs
    student.requires_grad_()
    prototypes.requires_grad_()
    layers = [prototypes, teacher_prototypes]
    if normalize:
        layers = [layer / layer.norm(dim=1, keepdim=True) for layer in layers]
    expected = F.dino_cross_entropy(
        student @ layers[0].T, teacher @ layers[1].T, center, **TEMPS, **STATS, backend="reference"
    )
    expected_grads = torch.autograd.grad(1.7 * expected[0], [student, prototypes])
    outputs, grads = call(inputs, backend, normalize_prototypes=normalize)
    for value, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(value, wanted.detach(), rtol=1e-5, atol=1e-5)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_view", [False, True])
def test_sinkhorn_vectors_weights_and_count(per_view, backend):
    """Everything at once, with NaN in the features of unused rows."""
    S, T, B, K = 3, 2, 5, 2500
    device = device_of(backend)
    inputs = make_inputs((S, T, B, K, 8, 8), torch.float32, device)[:4]
    log_u = torch.randn(T, K) if per_view else torch.randn(K)
    logits = inputs[2] @ nn.functional.normalize(inputs[3], dim=1).T
    scores = logits.double().cpu() / 0.04 + log_u.double().reshape(-1, 1, K)
    log_v = -scores.logsumexp(-1) + 0.3 * torch.randn(T, B)
    inputs[0][:, 3:], inputs[2][:, 3:] = math.nan, math.nan
    _, grads = check_against_truth(
        inputs,
        backend,
        1e-5,
        log_u=log_u.to(device),
        log_v=log_v.float().to(device),
        row_weights=torch.rand(B, device=device),
        num_rows=torch.tensor(3, device=device),
        normalize_prototypes=True,
        reduction="sum",
    )
    assert (grads[0][:, 3:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_runs_the_products_only(dtype):
    """bf16 products as in eager autocast; gradients in the parameters' dtype."""
    inputs = make_inputs((4, 2, 6, 3000, 32, 32), dtype, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        check_against_truth(inputs, "cpp", 2**-7, normalize_prototypes=True)
        unnormalized, _ = call(inputs, "cpp")
    expected, _ = call([v.bfloat16() for v in inputs[:4]] + [inputs[4]], "cpp")
    torch.testing.assert_close(unnormalized[0], expected[0], rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_wanted_gradients(backend):
    inputs = make_inputs((3, 2, 2, 50, 6, 6), torch.float32, device_of(backend))
    _, (dfeatures, dprototypes) = call(inputs, backend)
    features, prototypes, *rest = inputs
    for leaf, expected in ((features, dfeatures), (prototypes, dprototypes)):
        leaf.requires_grad_()
        rest[1].requires_grad_()
        loss = F.linear_dino_cross_entropy(features, prototypes, *rest, **TEMPS, backend=backend)
        (1.7 * loss).backward()
        torch.testing.assert_close(leaf.grad, expected)
        assert rest[1].grad is None
        leaf.requires_grad_(False)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_extreme_and_equal_logits(backend):
    device = device_of(backend)
    features, prototypes, *rest = make_inputs((3, 2, 1, 1500, 4, 4), torch.float32, device)
    rest[1] = 1e4 * rest[1]
    outputs, grads = call((features, 1e4 * prototypes, *rest), backend)
    assert all(torch.isfinite(value).all() for value in (*outputs, *grads))
    assert outputs[0] > 1e4
    zeros = [torch.zeros_like(value) for value in (prototypes, *rest)]
    for normalize in (False, True):
        values = (features, zeros[0], rest[0], *zeros[2:])
        (loss, *_), grads = call(values, backend, normalize_prototypes=normalize)
        assert loss.item() == pytest.approx(math.log(1500), rel=2e-6)
        assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_no_images(backend):
    inputs = make_inputs((3, 2, 0, 50, 4, 4), torch.float32, device_of(backend))
    (loss, mean, entropy), (dfeatures, dprototypes) = call(inputs, backend)
    assert loss == 0 and entropy == 0 and (mean == 0).all()
    assert dfeatures.shape == (3, 0, 4) and (dprototypes == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_give_the_same_bits(backend):
    inputs = make_inputs((4, 2, 5, 3001, 24, 24), torch.float32, device_of(backend))
    options = learned_lengths(3001, torch.float32, device_of(backend))
    first, second = (call(inputs, backend, **options) for _ in range(2))
    pairs = zip(first[0] + first[1], second[0] + second[1], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_reference_gradcheck():
    *inputs, center = (v.double() for v in make_inputs((3, 2, 2, 5, 4, 3), torch.float64, "cpu"))
    features, prototypes, *teacher = inputs
    _, *lengths = learned_lengths(5, torch.float64, "cpu").values()
    terms = (None, center, None, None, None, None, 0.5, 0.3, True, True)

    def function(features, prototypes, student_lengths=None):
        both = (None, None) if student_lengths is None else (student_lengths, lengths[1])
        return reference.linear_dino_cross_entropy(
            features, prototypes, *teacher, *both, True, torch.float64, *terms
        )

    leaves = tuple(value.requires_grad_() for value in (features, prototypes, lengths[0]))
    torch.autograd.gradcheck(function, leaves[:2])
    torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("learned", [False, True])
def test_opcheck(learned, backend):
    device = device_of(backend)
    features, prototypes, *teacher, center = make_inputs((3, 2, 2, 20, 4, 3), torch.float32, device)
    weights, count = torch.rand(2, device=device), torch.tensor(2, device=device)
    lengths = [None, None]
    if learned:
        _, *lengths = learned_lengths(20, torch.float32, device).values()
        lengths[0].requires_grad_()
    operands = (features.requires_grad_(), prototypes.requires_grad_(), *teacher, *lengths)
    terms = (None, center, None, None, weights, count, 0.1, 0.04, True, True)
    op = torch.ops.fastssl.linear_dino_cross_entropy
    settings = (True, torch.float32)
    # The default tolerances compare a compiled with an eager run of the same kernels.
    torch.library.opcheck(op, (*operands, *settings, *terms, True, backend))
    if backend == "reference":
        return
    if not learned:
        torch.library.opcheck(op, (*operands, False, torch.float32, *terms, False, backend))
    saved = [v.detach() for v in op(*operands, *settings, *terms, True, backend)[3:]]
    torch.library.opcheck(
        torch.ops.fastssl.linear_dino_cross_entropy_backward,
        (torch.ones((), device=device), *(v if v is None else v.detach() for v in operands))
        + settings
        + (None, center, None, weights, count, *saved, 0.1, 0.04, True, True, False, backend),
    )


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_compiles_without_a_graph_break(backend):
    inputs = make_inputs((3, 2, 2, 50, 8, 8), torch.float32, device_of(backend))
    options = learned_lengths(50, torch.float32, device_of(backend))
    lengths = options.pop("student_lengths")

    def step(features, prototypes, lengths, *rest):
        return F.linear_dino_cross_entropy(
            *(features, prototypes, *rest),
            **{**TEMPS, **STATS, **options, "student_lengths": lengths, "backend": backend},
        )

    results = []
    for function in (torch.compile(step, fullgraph=True), step):
        leaves = [value.detach().requires_grad_() for value in (*inputs[:2], lengths)]
        outputs = function(*leaves, *inputs[2:])
        results.append((*outputs, *torch.autograd.grad(outputs[0], leaves)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def extra_bytes(S, T, B, K, D=32):
    inputs = make_inputs((S, T, B, K, D, D), torch.float32, "cpu")
    leaves = [value.requires_grad_() for value in inputs[:2]]

    def step():
        loss, mean = F.linear_dino_cross_entropy(
            *inputs,
            **TEMPS,
            skip_same_view=S > 1,
            normalize_prototypes=True,
            return_teacher_mean=True,
            backend="cpp",
        )
        return loss.detach(), mean, *torch.autograd.grad(loss, leaves)

    step()
    return peak_extra_bytes(step, (), torch.device("cpu"))


def test_memory_is_a_fraction_of_the_logits():
    logits = 12 * 16 * 32768 * 4
    assert extra_bytes(10, 2, 16, 32768) <= 0.1 * logits
    assert extra_bytes(1, 1, 512, 16384) <= 0.1 * (1024 * 16384 * 4)


def test_memory_has_no_term_in_images_times_prototypes():
    B, K, logits = 8, 16384, 12 * 8 * 16384 * 4
    extra = {(b, k): extra_bytes(10, 2, b * B, k * K) for b in (1, 2) for k in (1, 2)}
    mixed = extra[2, 2] - extra[1, 2] - extra[2, 1] + extra[1, 1]
    assert abs(mixed) <= 1e-3 * logits


def test_flops_are_those_of_the_products():
    S, T, B, K, D, E = 4, 2, 3, 100, 8, 6
    features, prototypes, *rest = make_inputs((S, T, B, K, D, E), torch.float32, "cpu")
    features.requires_grad_()
    prototypes.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        F.linear_dino_cross_entropy(features, prototypes, *rest, **TEMPS, backend="cpp").backward()
    assert counter.get_total_flops() == 4 * (2 * S * B * K * D) + 2 * (2 * T * B * K * E)


class Head(nn.Module):
    """The owner of both layers' weights, as a student and its teacher hold them."""

    def __init__(self, K, D):
        super().__init__()
        self.student = nn.Parameter(torch.randn(K, D))
        self.teacher = nn.Parameter(torch.randn(K, D), requires_grad=False)
        self.lengths = nn.Parameter(torch.randn(K, 1))

    def forward(self, student, teacher, center):
        return F.linear_dino_cross_entropy(
            student,
            self.student,
            teacher,
            self.teacher,
            center,
            **TEMPS,
            normalize_prototypes=True,
            student_lengths=self.lengths.flatten(),
            teacher_lengths=self.lengths.detach().flatten(),
            return_teacher_mean=True,
        )


def _sharded_step(student, teacher, center, wrap, parts):
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    head = Head(center.numel(), student.shape[2])
    if wrap == "fsdp":
        fully_shard(head, mesh=init_device_mesh("cpu", (world,)))
    elif wrap == "ddp":
        head = nn.parallel.DistributedDataParallel(head)
    mine = slice(rank * student.shape[1] // world, (rank + 1) * student.shape[1] // world)
    leaf = student[:, mine].clone().requires_grad_()
    losses, means = [], []
    # Gradient accumulation: equal parts of the local batch, each weighing its share.
    for views, teacher_views in zip(
        leaf.chunk(parts, 1), teacher[:, mine].chunk(parts, 1), strict=True
    ):
        loss, mean = head(views, teacher_views, center)
        (loss / parts).backward()
        losses.append(loss.detach())
        means.append(mean)
    owner = head.module if wrap == "ddp" else head
    grads = [parameter.grad for parameter in (owner.student, owner.lengths)]
    if wrap == "fsdp":
        grads = [grad.full_tensor() for grad in grads]
    # In one tensor, [K, D + 1].
    return torch.stack(losses).mean(), torch.stack(means).mean(0), leaf.grad, torch.cat(grads, 1)


@pytest.mark.parametrize(
    ("world", "wrap", "parts"), [(2, "fsdp", 2), (2, "ddp", 1), (4, "fsdp", 1)]
)
def test_processes_equal_one(gloo_pool, world, wrap, parts):
    student, _, teacher, _, center = make_inputs((3, 2, 8, 2070, 12, 12), torch.float32, "cpu")
    arguments = (student, teacher, center)
    ((loss, mean, dfeatures, dprototypes),) = gloo_pool.run(_sharded_step, 1, *arguments, "", 1)
    results = gloo_pool.run(_sharded_step, world, *arguments, wrap, parts)
    losses, means, feature_grads, prototype_grads = zip(*results, strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), loss)
    torch.testing.assert_close(torch.stack(means).mean(0), mean, rtol=1e-5, atol=1e-6)
    # The mean over ranks divides each rank's gradient by their number.
    torch.testing.assert_close(torch.cat(feature_grads, dim=1) / world, dfeatures)
    for grad in prototype_grads:
        torch.testing.assert_close(grad, dprototypes, rtol=1e-4, atol=1e-7)


BAD = {
    "student_features must be a Tensor, got list": {"student_features": [1.0]},
    "student_features must have 3 dimensions": {"student_features": torch.zeros(4, 6)},
    "teacher_features must have shape [T, 4, 5]": {"teacher_features": torch.zeros(2, 3, 5)},
    "student_prototypes must have shape [K, D] = [any, 6], got [8, 5]": {
        "student_prototypes": torch.zeros(8, 5)
    },
    "teacher_prototypes must have shape [K, E] = [8, 5], got [9, 5]": {
        "teacher_prototypes": torch.zeros(9, 5)
    },
    "student_prototypes must hold at least one prototype": {
        "student_prototypes": torch.zeros(0, 6)
    },
    "center must have shape [K] = [8] after leading ones": {"center": torch.zeros(6)},
    "student_temp must be positive, got 0": {"student_temp": 0},
    "must be given together, with normalize_prototypes=True, got those of student with True": {
        "student_lengths": torch.ones(8),
        "normalize_prototypes": True,
    },
    "must be given together, with normalize_prototypes=True, got those of student and teacher": {
        "student_lengths": torch.ones(8),
        "teacher_lengths": torch.ones(8),
    },
    "teacher_lengths must have shape [K] = [8], got [7]": {
        "student_lengths": torch.ones(8),
        "teacher_lengths": torch.ones(7),
        "normalize_prototypes": True,
    },
    "backend must be one of cpp, triton, cuda, reference": {"backend": "magic"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    good = {
        "student_features": torch.zeros(3, 4, 6),
        "student_prototypes": torch.zeros(8, 6),
        "teacher_features": torch.zeros(2, 4, 5),
        "teacher_prototypes": torch.zeros(8, 5),
        **TEMPS,
    }
    with pytest.raises((TypeError, ValueError)) as error:
        F.linear_dino_cross_entropy(**{**good, **BAD[message]})
    assert message in str(error.value)
