"""gram_loss: every backend against the paper's formula, alone and in groups."""

import pytest
import torch
import torch.distributed as dist

from fastssl import functional as F
from fastssl.kernels.gram_loss import cpp_kernel
from tests.kernels.gram_cases import GRAD_ATOL
from tests.kernels.test_koleo import Sizes
from tests.kernels.util import (
    DTYPES,
    assert_close_to_truth,
    backends_on_ranks,
    compiled_backends,
    device_of,
    gradients,
    to_double,
)

BACKENDS = compiled_backends("gram_loss")
ALL = ["reference", *BACKENDS]
# B, N, D, E: one of each, primes, several tiles of patches of unequal size.
SHAPES = [(1, 1, 1, 1), (3, 7, 5, 2), (2, 131, 13, 17), (5, 29, 67, 67), (1, 300, 3, 5)]
IMAGES, PATCHES = 4, 6


def make_features(dtype=torch.float64):
    torch.manual_seed(1)
    shape = (IMAGES, PATCHES)
    return torch.randn(*shape, 5, dtype=dtype), torch.randn(*shape, 7, dtype=dtype)


def published(student, teacher, img_level, clamp_student, clamp_teacher):
    """Pair by pair."""
    students = torch.nn.functional.normalize(student, dim=-1)
    teachers = torch.nn.functional.normalize(teacher, dim=-1)
    if not img_level:
        students, teachers = students.reshape(1, -1, 5), teachers.reshape(1, -1, 7)
    terms = []
    for s, t in zip(students, teachers, strict=True):
        for i in range(len(s)):
            for j in range(len(s)):
                a, b = s[i] @ s[j], t[i] @ t[j]
                a = a.clamp(min=0) if clamp_student else a
                b = b.clamp(min=0) if clamp_teacher else b
                terms.append((a - b) ** 2)
    return torch.stack(terms).mean()


FLAGS = {
    "plain": ({}, False, False),
    "both": ({"remove_neg": True}, True, True),
    "teacher": ({"remove_only_teacher_neg": True}, False, True),
}


@pytest.mark.parametrize("img_level", [True, False])
@pytest.mark.parametrize("flags", FLAGS)
def test_is_the_published_definition(flags, img_level):
    kwargs, *clamps = FLAGS[flags]
    student, teacher = make_features()
    actual = F.gram_loss(student, teacher, img_level=img_level, **kwargs)
    torch.testing.assert_close(actual, published(student, teacher, img_level, *clamps))


def test_gradcheck_and_no_gradient_for_the_teacher():
    student, teacher = (features[:2, :3].requires_grad_() for features in make_features())
    assert torch.autograd.gradcheck(lambda s: F.gram_loss(s, teacher), student)
    loss = F.gram_loss(student, teacher)
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)


def assert_matches_float64(student, teacher, backend, **kwargs):
    def run(with_backend, s, t):
        def call(leaf):
            return F.gram_loss(leaf, t, backend=with_backend, **kwargs)

        return gradients(call, [s], torch.tensor(1.3))

    actual, (actual_grad,) = run(backend, student, teacher)
    eager, (eager_grad,) = run("reference", student, teacher)
    truth, (truth_grad,) = run("reference", to_double(student), to_double(teacher))
    assert actual.dtype == torch.float32 and actual_grad.dtype == student.dtype
    assert_close_to_truth("loss", actual, eager, truth, atol=1e-6)
    # Relative to the largest gradient, which 1 / (B N) makes small.
    scale = truth_grad.abs().max().clamp(min=1e-30)
    grads = (grad.double() / scale for grad in (actual_grad, eager_grad, truth_grad))
    assert_close_to_truth("gradient", *grads, GRAD_ATOL[student.dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, backend, poisoned_memory):
    images, patches, width, teacher_width = shape
    student = torch.randn(images, patches, width).to(device_of(backend), dtype)
    teacher = torch.randn(images, patches, teacher_width).to(student.device, dtype)
    assert_matches_float64(student, teacher, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("apply_norm", [True, False])
@pytest.mark.parametrize("flags", FLAGS)
def test_flags_against_float64(flags, apply_norm, backend, poisoned_memory):
    student, teacher = torch.randn(3, 141, 5), torch.randn(3, 141, 7, dtype=torch.bfloat16)
    student, teacher = (x.to(device_of(backend)) for x in (student, teacher))
    assert_matches_float64(student, teacher, backend, apply_norm=apply_norm, **FLAGS[flags][0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_pairs_of_a_batch_against_float64(shape, dtype, backend, poisoned_memory):
    images, patches, width, teacher_width = shape
    student = torch.randn(images, patches, width).to(device_of(backend), dtype)
    teacher = torch.randn(images, patches, teacher_width).to(student.device, dtype)
    assert_matches_float64(student, teacher, backend, img_level=False, remove_neg=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_student_beside_its_teacher(backend):
    """Differences far below the similarities, which products rounded to 16 bits would drown."""
    teacher = torch.randn(1, 1, 67) + torch.randn(2, 131, 67)
    student = (teacher + 0.01 * torch.randn_like(teacher)).to(device_of(backend), torch.bfloat16)
    teacher = teacher.to(student)
    actual = F.gram_loss(student, teacher, backend=backend).double()
    truth = F.gram_loss(student.double(), teacher.double(), backend="reference")
    torch.testing.assert_close(actual, truth, rtol=1e-4, atol=0)
    assert_matches_float64(student, teacher, backend)


@pytest.mark.parametrize("shape", [(2, 196, 384), (1, 1024, 64)], ids=str)
@pytest.mark.parametrize("img_level", [True, False])
def test_real_sizes(img_level, shape):
    assert_matches_float64(torch.randn(shape), torch.randn(shape), "cpp", img_level=img_level)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if "triton" in b.values])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_panels_add_up(dtype, backend, monkeypatch, poisoned_memory):
    """What is otherwise one panel, in several: of columns, of rows, and across images."""
    from fastssl.kernels.gram_loss import triton_kernel

    monkeypatch.setattr(triton_kernel, "PANEL", 128)
    monkeypatch.setattr(triton_kernel, "PANEL_BLOCKS", 2)
    # Blocks of 64 rows, and of 128 where the dtype has them.
    for shape in ((2, 131, 67), (1, 300, 5)):
        student, teacher = (torch.randn(shape).to(device_of(backend), dtype) for _ in range(2))
        assert_matches_float64(student, teacher, backend)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_extreme_inputs_are_finite(scale, backend):
    features = make_features(torch.float32)
    student, teacher = (x.to(device_of(backend)) * scale for x in features)
    student.requires_grad_()
    loss = F.gram_loss(student, teacher, backend=backend)
    assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, student)[0]).all()
    truth = F.gram_loss(student.double(), teacher.double(), backend="reference")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", ALL)
def test_equal_features_give_zero(backend):
    student = torch.randn(2, 139, 5, device=device_of(backend))
    # A GPU subtracts while it adds up.
    most = 1e-14 if student.is_cuda else 0
    assert 0 <= F.gram_loss(student, student.clone(), backend=backend) <= most


def loss_and_gradient(student, teacher, backend, **kwargs):
    loss = F.gram_loss(student, teacher, backend=backend, **kwargs)
    return loss.detach(), *torch.autograd.grad(loss, student)


# One tile, blocks in odd and even number, more images than threads and fewer.
@pytest.mark.parametrize("shape", [(1, 100, 9), (1, 500, 9), (5, 300, 9)], ids=str)
@pytest.mark.parametrize("img_level", [True, False])
def test_threads_give_the_same_bits(img_level, shape):
    student, teacher = torch.randn(shape).requires_grad_(), torch.randn(shape)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(loss_and_gradient(student, teacher, "cpp", img_level=img_level))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_give_the_same_bits(dtype, backend):
    student, teacher = (torch.randn(2, 70, 5).to(device_of(backend), dtype) for _ in range(2))
    student.requires_grad_()
    first, second = (loss_and_gradient(student, teacher, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wants_gradient", [True, False])
def test_opcheck(wants_gradient, backend):
    student, teacher = (x.to(device_of(backend)) for x in make_features(torch.float32))
    student.requires_grad_(wants_gradient)
    arguments = (student, teacher, True, False, True, wants_gradient, "", backend)
    torch.library.opcheck(torch.ops.fastssl.gram_loss, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_is_made_where_none_is_wanted(backend):
    student, teacher = (x.to(device_of(backend)) for x in make_features(torch.float32))
    with torch.no_grad():
        quiet = F.gram_loss(student.requires_grad_(), teacher, backend=backend)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, F.gram_loss(student, teacher, backend=backend).detach())
    outputs = torch.ops.fastssl.gram_loss(
        *(student.detach(), teacher, True, False, False, False, "", backend)
    )
    assert outputs[1].numel() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_features_and_autocast(backend):
    student, teacher = (x.to(device_of(backend)) for x in make_features(torch.float32))
    student, teacher = student.transpose(0, 1), teacher.transpose(0, 1)
    assert_matches_float64(student, teacher, backend)
    with torch.autocast(student.device.type, dtype=torch.bfloat16):
        actual = F.gram_loss(student, teacher, backend=backend)
    torch.testing.assert_close(actual, F.gram_loss(student, teacher, backend=backend))


def run_on_ranks(features, backend, img_level, dtype, compiled, weighted):
    size, rank = dist.get_world_size(), dist.get_rank()
    student, teacher = (x.chunk(size)[rank].to(dtype) for x in features)

    def call(s, t):
        loss = F.gram_loss(s, t, img_level=img_level, remove_neg=True, backend=backend)
        return loss * (1 + rank) if weighted else loss

    if compiled:
        # The tracing is what is tested, not the code that a compiler makes of it.
        torch.compiler.reset()
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    loss = call(student.requires_grad_(), teacher)
    # DDP's mean over ranks.
    return loss.detach() / size, torch.autograd.grad(loss, student)[0] / size


def all_ranks(gloo_pool, world_size, *arguments):
    losses, grads = zip(*gloo_pool.run(run_on_ranks, world_size, *arguments), strict=True)
    return sum(losses).double(), torch.cat(grads).double()


WORLDS = [1, 2, pytest.param(4, marks=pytest.mark.slow)]


# Two blocks of cpp's patches on each of two ranks, and more of triton's.
@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("img_level", [True, False])
@pytest.mark.parametrize("backend", backends_on_ranks("gram_loss"))
def test_ranks_equal_one_process(gloo_pool, backend, img_level, world_size):
    features = torch.randn(4, 70, 5), torch.randn(4, 70, 7)
    student, teacher = (x.double() for x in features)
    loss = F.gram_loss(student.requires_grad_(), teacher, img_level=img_level, remove_neg=True)
    dtype = torch.float64 if backend == "reference" else torch.float32
    actual = all_ranks(gloo_pool, world_size, features, backend, img_level, dtype, False, False)
    torch.testing.assert_close(actual[0], loss.detach(), rtol=1e-6, atol=0)
    gradient = torch.autograd.grad(loss, student)[0]
    atol = 3e-6 * gradient.abs().max().item()
    torch.testing.assert_close(actual[1], gradient, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("compiled", [False, True])
def test_ranks_that_weigh_the_loss_differently(gloo_pool, compiled, backend):
    features = torch.randn(4, 3, 5), torch.randn(4, 3, 7)
    expected = all_ranks(gloo_pool, 2, features, "reference", False, torch.float64, False, True)
    actual = all_ranks(gloo_pool, 2, features, backend, False, torch.float32, compiled, True)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_no_matrix_of_similarities_is_stored():
    """Of 1024 patches of 8 features, the largest thing is two tiles per thread."""
    student, teacher = (cpp_kernel.prepare(torch.randn(1024, 8), True) for _ in range(2))
    gradient = torch.empty_like(student.values)
    with Sizes() as sizes:
        cpp_kernel.compare(1, (student, teacher), None, True, True, 1.0, gradient)
    assert sizes.largest == torch.get_num_threads() * 2 * cpp_kernel.BLOCK**2


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("img_level", [True, False])
def test_compiles_without_a_graph_break(img_level, backend):
    def call(s, t):
        return F.gram_loss(s, t, img_level=img_level, backend=backend)

    student, teacher = (x.to(device_of(backend)) for x in make_features(torch.float32))
    student.requires_grad_()
    torch.compiler.reset()
    pair = torch.compile(call, fullgraph=True)(student, teacher), call(student, teacher)
    torch.testing.assert_close(*pair)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in pair))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"teacher": torch.zeros(2, 4, 5)}, "teacher must have shape [B, N, E] = [2, 3, any]"),
        ({"student": torch.zeros(2, 3)}, "student must have 3 dimensions, got shape (2, 3)"),
        (
            {"remove_neg": True, "remove_only_teacher_neg": True},
            "remove_only_teacher_neg must be False where remove_neg is True",
        ),
        (
            {"backend": "magic"},
            "backend must be one of cpp, triton, reference for gram_loss, got 'magic'",
        ),
        (
            {"backend": "cpp", "teacher": torch.zeros(2, 3, 5, dtype=torch.float64)},
            "cannot run gram_loss: dtype torch.float64 is served by the reference only",
        ),
    ],
)
def test_bad_input_is_named(arguments, message):
    features = {"student": torch.zeros(2, 3, 5), "teacher": torch.zeros(2, 3, 5)}
    with pytest.raises((TypeError, ValueError)) as error:
        F.gram_loss(**{**features, **arguments})
    assert message in str(error.value)
