"""dino_cross_entropy: every backend against the float64 formula, forward and backward."""

import math

import pytest
import torch
import torch._dynamo.testing

from benchmarks.measure import peak_extra_bytes
from fastssl import functional as F
from fastssl.kernels.dino_cross_entropy import reference
from tests.kernels.util import (
    ATOL,
    DTYPES,
    assert_close_to_truth,
    compiled_backends,
    device_of,
    to_double,
)

BACKENDS = compiled_backends("dino_cross_entropy")
TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}
STATS = {"return_teacher_mean": True, "return_teacher_entropy": True}
# S, T, B, K: one of everything, primes, one teacher view, more teacher than student views, chunks
# that end early, and DINO's 65,536 prototypes.
SHAPES = [
    (2, 1, 1, 1),
    (3, 2, 5, 13),
    (1, 2, 2, 1023),
    (2, 5, 3, 1025),
    (4, 1, 7, 2049),
    (12, 2, 2, 2053),
    (4, 2, 1, 65536),
]


def make_logits(shape, dtype, device, scale=1.0):
    S, T, B, K = shape
    student = (scale * torch.randn(S, B, K)).to(device, dtype)
    teacher = (scale * torch.randn(T, B, K)).to(device, dtype)
    center = (0.1 * scale * torch.randn(K)).to(device)
    return student, teacher, center


def call(inputs, backend, student_grad=True, **options):
    """(loss, teacher mean, teacher entropy), and the student's gradient times a factor."""
    student, *rest = inputs
    leaf = student.detach().requires_grad_()
    outputs = F.dino_cross_entropy(leaf, *rest, backend=backend, **{**TEMPS, **STATS, **options})
    (grad,) = torch.autograd.grad(1.7 * outputs[0], leaf)
    return outputs, grad


def doubled(options):
    return {name: to_double(value) for name, value in options.items()}


def check_against_truth(inputs, backend, atol=None, **options):
    outputs, grad = call(inputs, backend, **options)
    eager, eager_grad = call(inputs, "reference", **options)
    double_inputs = [to_double(value) for value in inputs]
    truth, true_grad = call(double_inputs, "reference", **doubled(options))
    assert [value.dtype for value in outputs] == [torch.float32] * 3
    assert grad.dtype == inputs[0].dtype
    for name, *values in zip(("loss", "mean", "entropy"), outputs, eager, truth, strict=True):
        assert_close_to_truth(name, *(value.detach() for value in values), atol)
    assert_close_to_truth("dstudent", grad, eager_grad, true_grad)
    # Gradients per prototype are far below the allowance above: compare them as a whole too.
    error = (grad.double() - true_grad).norm()
    eager_error = (eager_grad.double() - true_grad).norm()
    allowance = max(1e-5, ATOL[grad.dtype])
    assert error <= 2 * eager_error + allowance * true_grad.norm() + 1e-9
    return outputs, grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, backend, poisoned_memory):
    check_against_truth(make_logits(shape, dtype, device_of(backend)), backend)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_pairwise_loop_of_the_paper(backend):
    """Algorithm 1 of arXiv 2104.14294, extended to S views: every pair of different views."""
    student, teacher, center = make_logits((4, 2, 3, 37), torch.float32, device_of(backend))
    (loss, mean, entropy), grad = call((student, teacher, center), backend)
    leaf = student.double().requires_grad_()
    terms = []
    for t in range(2):
        q = ((teacher[t].double() - center.double()) / 0.04).softmax(-1)
        for s in range(4):
            if s != t:
                terms.append(-(q * (leaf[s] / 0.1).log_softmax(-1)).sum(-1).mean())
    expected = sum(terms) / len(terms)
    assert len(terms) == 6
    (expected_grad,) = torch.autograd.grad(1.7 * expected, leaf)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(mean, teacher.mean((0, 1)), rtol=1e-5, atol=1e-6)
    q = ((teacher.double() - center.double()) / 0.04).softmax(-1)
    torch.testing.assert_close(
        entropy.double(), -(q * q.log()).sum(-1).mean(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_view", [False, True])
@pytest.mark.parametrize("with_log_v", [False, True])
def test_sinkhorn_vectors(per_view, with_log_v, backend):
    """Probabilities exp(teacher / temp + log_u + log_v), whose rows need not sum to 1."""
    S, T, B, K = 3, 2, 4, 1500
    student, teacher, _ = make_logits((S, T, B, K), torch.float32, device_of(backend))
    log_u = torch.randn(T, K) if per_view else torch.randn(K)
    options = {"log_u": log_u.to(student.device)}
    if with_log_v:
        scores = teacher.double().cpu() / 0.04 + log_u.double().reshape(-1, 1, K)
        rows = -scores.logsumexp(-1) + 0.3 * torch.randn(T, B)
        options["log_v"] = rows.float().to(student.device)
    # A float32 log_v of about 100 knows the probabilities to 1e-5 only.
    check_against_truth((student, teacher), backend, 1e-5 if with_log_v else None, **options)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("with_log_v", [False, True])
def test_sinkhorn_assignment_without_the_matrix(with_log_v, backend):
    """One assignment over both teacher views, as in DINOv2, equals the loss on the matrix."""
    student, teacher, _ = make_logits((3, 2, 6, 40), torch.float32, device_of(backend))
    rows, options = teacher.flatten(0, 1), {"temperature": 0.3, "backend": "reference"}
    log_u, log_v = F.sinkhorn_knopp(rows, materialize=False, **options)
    assignment = F.sinkhorn_knopp(rows, **options).unflatten(0, (2, 6))
    pairs = -(assignment[:, None] * (student / 0.1).log_softmax(-1)).sum(-1).mean(-1)  # [T, S]
    expected = (pairs.sum() - pairs[0, 0] - pairs[1, 1]) / 4
    vectors = {"log_u": log_u, "log_v": log_v if with_log_v else None}
    temps = {"student_temp": 0.1, "teacher_temp": 0.3}
    loss = F.dino_cross_entropy(student, teacher, **temps, **vectors, backend=backend)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weights_and_a_device_side_count(reduction, backend, poisoned_memory):
    """Rows from num_rows on are neither counted nor looked at, and get zero gradients."""
    student, teacher, center = make_logits((3, 2, 7, 1100), torch.float32, device_of(backend))
    weights = torch.rand(7, device=student.device)
    weights[1] = 0
    student[:, 5:], teacher[:, 5:], weights[5:] = math.nan, math.nan, math.nan
    options = {
        "row_weights": weights,
        "num_rows": torch.tensor(5, device=student.device, dtype=torch.int32),
        "reduction": reduction,
    }
    outputs, grad = check_against_truth((student, teacher, center), backend, **options)
    assert (grad[:, 5:] == 0).all() and (grad[:, 1] == 0).all()
    inputs = (student[:, :5], teacher[:, :5], center)
    shorter, _ = call(inputs, "reference", row_weights=weights[:5], reduction=reduction)
    for value, expected in zip(outputs, shorter, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("count", [0, 3, 8])
def test_masked_tokens_of_dinov2(count, backend):
    """Weights 1 / (masked tokens of the image), over the number of images: arXiv 2304.07193."""
    num_images, capacity, K = 4, 8, 300
    student, teacher, center = make_logits((1, 1, capacity, K), torch.float32, device_of(backend))
    weights = torch.rand(capacity, device=student.device)
    (loss, mean, _), grad = call(
        (student, teacher, center),
        backend,
        row_weights=weights / num_images,
        num_rows=torch.tensor(count, device=student.device),
        skip_same_view=False,
        reduction="sum",
    )
    leaf = student.double().requires_grad_()
    q = ((teacher[0] - center).double() / 0.04).softmax(-1)
    per_token = (q * (leaf[0] / 0.1).log_softmax(-1)).sum(-1)[:count]
    expected = -(per_token * weights[:count]).sum() / num_images
    (expected_grad,) = torch.autograd.grad(1.7 * expected, leaf)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-7)
    expected_mean = teacher[0, :count].sum(0) / max(1, count)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_no_images(backend):
    inputs = make_logits((3, 2, 0, 5), torch.float32, device_of(backend))
    (loss, mean, entropy), grad = call(inputs, backend)
    assert loss == 0 and entropy == 0 and (mean == 0).all() and grad.shape == (3, 0, 5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_all_equal_logits(backend):
    """Uniform on both sides: the loss is the entropy, ln K, and there is nothing to learn."""
    device = device_of(backend)
    student, teacher = torch.full((3, 1, 5000), 7.0), torch.full((2, 1, 5000), -3.0)
    inputs = (student.to(device), teacher.to(device), torch.full((5000,), 1e4, device=device))
    (loss, _, entropy), grad = call(inputs, backend)
    assert loss.item() == pytest.approx(math.log(5000), rel=2e-6)
    assert entropy.item() == pytest.approx(math.log(5000), rel=2e-6)
    assert grad.abs().max() < 1e-8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(dtype, backend):
    """+-1e4 over a temperature of 0.04: exact zeros and ones, losses of 1e5, nothing infinite."""
    S, T, B, K = 3, 2, 1, 2000
    signs = (torch.randint(0, 2, (S + T, B, K)) * 2 - 1) * 1e4
    signs += torch.randn(S + T, B, K)
    student, teacher = signs.to(device_of(backend), dtype).split([S, T])
    outputs, grad = call((student, teacher, None), backend)
    truth, true_grad = call((student.double(), teacher.double(), None), "reference")
    for value, expected in zip(outputs[:2], truth[:2], strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=2e-5)
    # Scores of 2.5e5 are known to 1e-2 in float32, and so are probabilities near one another.
    torch.testing.assert_close(outputs[2].double(), truth[2], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(grad.double(), true_grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", [(12, 2, 2, 1024), (10, 2, 4, 65536), (3, 2, 1, 262144)], ids=str)
def test_real_sizes(shape):
    check_against_truth(make_logits(shape, torch.float32, "cpu"), "cpp")


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperatures_as_tensors(backend):
    inputs = make_logits((3, 2, 2, 1100), torch.float32, device_of(backend))
    teacher_temp = torch.tensor(0.07, device=inputs[0].device)
    check_against_truth(inputs, backend, student_temp=0.2, teacher_temp=teacher_temp)


def test_a_temperature_schedule_does_not_recompile():
    student, teacher, _ = make_logits((3, 2, 2, 20), torch.float32, "cpu")
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def step(teacher_temp):
        return F.dino_cross_entropy(student, teacher, student_temp=0.1, teacher_temp=teacher_temp)

    for value in (0.04, 0.05, 0.06):
        expected = F.dino_cross_entropy(student, teacher, student_temp=0.1, teacher_temp=value)
        torch.testing.assert_close(step(torch.tensor(value)), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_give_the_same_bits(backend):
    inputs = make_logits((4, 2, 5, 3001), torch.float32, device_of(backend))
    first, second = call(inputs, backend), call(inputs, backend)
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert torch.equal(first[1], second[1])


def test_threads_do_not_change_the_bits():
    inputs = make_logits((4, 2, 5, 9001), torch.float32, "cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(call(inputs, "cpp"))
    finally:
        torch.set_num_threads(threads)
    (first, first_grad), (second, second_grad) = results
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first_grad, second_grad)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_ranks_average_to_the_whole_batch(backend):
    """The mean over equal local batches, and the mean of their teacher means, are global ones."""
    student, teacher, center = make_logits((3, 2, 6, 50), torch.float32, device_of(backend))
    (loss, mean, _), grad = call((student, teacher, center), backend)
    halves = [
        call((student[:, half], teacher[:, half], center), backend)
        for half in (slice(0, 3), slice(3, 6))
    ]
    torch.testing.assert_close(sum(outputs[0] for outputs, _ in halves) / 2, loss)
    torch.testing.assert_close(sum(outputs[1] for outputs, _ in halves) / 2, mean)
    torch.testing.assert_close(torch.cat([grad for _, grad in halves], dim=1) / 2, grad)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_only_the_student_learns(backend):
    student, teacher, center = make_logits((3, 2, 2, 20), torch.float32, device_of(backend))
    teacher.requires_grad_()
    center.requires_grad_()
    student.requires_grad_()
    loss, mean = F.dino_cross_entropy(
        student, teacher, center, **TEMPS, return_teacher_mean=True, backend=backend
    )
    loss.backward()
    assert student.grad is not None and teacher.grad is None and center.grad is None
    assert not mean.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_can_be_taken_twice(backend):
    student, teacher, center = make_logits((3, 2, 2, 20), torch.float32, device_of(backend))
    student.requires_grad_()
    loss = F.dino_cross_entropy(student, teacher, center, **TEMPS, backend=backend)
    (once,) = torch.autograd.grad(loss, student, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * loss, student)
    torch.testing.assert_close(twice, 2 * once)


def test_mixed_dtypes_and_strides():
    """A bf16 student beside a float32 teacher, both views of larger tensors."""
    student = torch.randn(2, 3, 4, 130).bfloat16()[0].transpose(0, 1).contiguous().transpose(0, 1)
    teacher = torch.randn(2, 4, 260)[:, :, ::2]
    outputs, grad = call((student, teacher, None), "cpp")
    expected, expected_grad = call((student, teacher, None), "reference")
    for value, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_autocast_casts_nothing(backend):
    student, *rest = make_logits((3, 2, 2, 50), torch.float32, "cpu")
    expected, expected_grad = call((student, *rest), backend)
    student.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = F.dino_cross_entropy(student, *rest, **TEMPS, **STATS, backend=backend)
    (grad,) = torch.autograd.grad(1.7 * outputs[0], student)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert torch.equal(grad, expected_grad)


def test_reference_gradcheck():
    student, teacher, center = (v.double() for v in make_logits((3, 2, 2, 5), torch.float64, "cpu"))
    weights, count = torch.rand(2).double(), torch.tensor(2)
    terms = (None, center, None, None, weights, count, 0.5, 0.3, True, True)
    student.requires_grad_()
    torch.autograd.gradcheck(lambda s: reference.dino_cross_entropy(s, teacher, *terms), student)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_opcheck(backend):
    device = device_of(backend)
    student, teacher, center = make_logits((3, 2, 2, 20), torch.float32, device)
    weights, count = torch.rand(2, device=device), torch.tensor(2, device=device)
    terms = (None, center, None, None, weights, count)
    settings = (0.1, 0.04, True, True, True, backend)
    op = torch.ops.fastssl.dino_cross_entropy
    torch.library.opcheck(op, (student.requires_grad_(), teacher, *terms, *settings))
    if backend == "reference":
        return
    log_u, log_v = torch.randn(2, 20, device=device), torch.randn(2, 2, device=device)
    temps = torch.tensor([0.1, 0.04], device=device)
    vectors = (temps, None, log_u, log_v, None, None)
    torch.library.opcheck(op, (student, teacher, *vectors, 1.0, 1.0, False, False, False, backend))
    *_, norm, student_stats, teacher_stats = op(student, teacher, *terms, *settings)
    stats = (norm.detach(), student_stats.detach(), teacher_stats.detach())
    torch.library.opcheck(
        torch.ops.fastssl.dino_cross_entropy_backward,
        (torch.ones((), device=device), student.detach(), teacher, None, center, None)
        + (weights, count, *stats, 0.1, 0.04, True, backend),
    )


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_compiles_without_a_graph_break(backend):
    student, teacher, center = make_logits((3, 2, 2, 50), torch.float32, device_of(backend))
    count = torch.tensor(2, device=student.device)

    def step(student, teacher, center, count):
        return F.dino_cross_entropy(
            student, teacher, center, num_rows=count, backend=backend, **TEMPS, **STATS
        )

    results = []
    for function in (torch.compile(step, fullgraph=True), step):
        leaf = student.detach().requires_grad_()
        outputs = function(leaf, teacher, center, count)
        results.append((*outputs, *torch.autograd.grad(outputs[0], leaf)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(10, 2, 4, 16384), (1, 1, 64, 8192)], ids=str)
def test_peak_memory_is_the_gradient(shape):
    student, teacher, center = make_logits(shape, torch.float32, "cpu")
    student.requires_grad_()

    def step():
        loss, mean = F.dino_cross_entropy(
            *(student, teacher, center),
            **TEMPS,
            skip_same_view=shape[0] > 1,
            return_teacher_mean=True,
            backend="cpp",
        )
        return loss.detach(), mean, *torch.autograd.grad(loss, student)

    step()
    # The teacher's column sums and the numbers per chunk; the gradient itself does not count.
    assert peak_extra_bytes(step, (), student.device) <= 0.1 * student.nbytes


BAD = {
    "student_logits must be a Tensor, got list": {"student_logits": [1.0]},
    "student_logits must have 3 dimensions, got shape (4, 8)": {
        "student_logits": torch.zeros(4, 8)
    },
    "teacher_logits must have shape [T, 4, 8]": {"teacher_logits": torch.zeros(2, 3, 8)},
    "student_logits must have at least one view and one column, got [0, 4, 8]": {
        "student_logits": torch.zeros(0, 4, 8)
    },
    "center must have shape [K] = [8] after leading ones, got [7]": {"center": torch.zeros(7)},
    "log_u takes the place of center": {"center": torch.zeros(8), "log_u": torch.zeros(8)},
    "log_u must have shape [K] = [8] or [T, K] = [2, 8], got [3, 8]": {"log_u": torch.zeros(3, 8)},
    "log_v needs log_u": {"log_v": torch.zeros(2, 4)},
    "log_v must have shape [T, B] = [2, 4] or [T * B], got [4, 2]": {
        "log_u": torch.zeros(8),
        "log_v": torch.zeros(4, 2),
    },
    "row_weights must have shape [B] = [4] after leading ones": {"row_weights": torch.zeros(3)},
    "num_rows must be int32 or int64, got float32": {"num_rows": torch.tensor(1.0)},
    "num_rows must hold one integer, got shape [2]": {"num_rows": torch.tensor([1, 2])},
    "num_rows must be a Tensor, got int": {"num_rows": 3},
    "student_temp must be positive, got 0": {"student_temp": 0},
    "teacher_temp must be positive, got -0.1": {"teacher_temp": -0.1},
    "teacher_temp must be a float or a Tensor, got str": {"teacher_temp": "0.1"},
    "teacher_temp must have 0 dimensions, got shape (1,)": {"teacher_temp": torch.ones(1)},
    "reduction must be 'mean' or 'sum', got 'none'": {"reduction": "none"},
    "skip_same_view must be False for one student and one teacher view": {
        "student_logits": torch.zeros(1, 4, 8),
        "teacher_logits": torch.zeros(1, 4, 8),
    },
    "backend must be one of cpp, triton, cuda, reference": {"backend": "magic"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    good = {"student_logits": torch.zeros(3, 4, 8), "teacher_logits": torch.zeros(2, 4, 8), **TEMPS}
    with pytest.raises((TypeError, ValueError)) as error:
        F.dino_cross_entropy(**{**good, **BAD[message]})
    assert message in str(error.value)


def test_many_teacher_views_are_refused_by_name():
    logits = torch.zeros(17, 1, 4)
    with pytest.raises(ValueError, match="holds 16 teacher views, not 17"):
        F.dino_cross_entropy(logits, logits, **TEMPS, backend="cpp")
