"""DINOLoss against the loops of its paper, its center, and one process against several."""

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounter

from fastssl import nn as fnn
from fastssl.losses import DINOLoss
from tests.losses.test_ibot_patch_loss import sinkhorn


def make_loss(K=11, S=4, **kwargs):
    return DINOLoss(K, S, 0.04, 0.07, 3, 10, **kwargs)


def paper_loss(student, teacher, center, student_temp, teacher_temp, S):
    """The pairwise loop of the paper's Algorithm 1, extended to S views."""
    terms = []
    for t, q in enumerate(((teacher - center) / teacher_temp).softmax(-1).chunk(2)):
        for s, p in enumerate((student / student_temp).log_softmax(-1).chunk(S)):
            if s != t:
                terms.append(-(q * p).sum(-1).mean())
    return sum(terms) / len(terms)


def test_formula_and_gradient_in_float64():
    loss_fn = make_loss()
    loss_fn.center.normal_()
    student = torch.randn(4 * 5, 11, requires_grad=True)
    teacher = torch.randn(2 * 5, 11)
    reference = student.detach().double().requires_grad_()
    expected = paper_loss(reference, teacher.double(), loss_fn.center.double(), 0.1, 0.055, 4)
    loss = loss_fn(student, teacher, epoch=1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(student.grad.double(), reference.grad, rtol=1e-4, atol=1e-6)


def test_temperature_schedule():
    loss_fn = make_loss()
    expected = [0.04, 0.055, 0.07, 0.07, 0.07]
    assert [loss_fn.teacher_temp(e) for e in (0, 1, 2, 9, 50)] == pytest.approx(expected)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_temperature_takes_the_place_of_the_epochs(fused, as_tensor):
    loss_fn = make_loss()
    loss_fn.center.normal_()
    center = loss_fn.center.clone().double()
    outputs = [fnn.HeadOutput(torch.randn(rows, 5), torch.randn(11, 5), True) for rows in (20, 10)]
    temp = torch.tensor(0.3) if as_tensor else 0.3
    if fused:
        loss = loss_fn.linear(*outputs, teacher_temp=temp)
    else:
        loss = loss_fn(*(output.logits() for output in outputs), epoch=9, teacher_temp=temp)
    logits = [output.logits().double() for output in outputs]
    expected = paper_loss(*logits, center, 0.1, 0.3, 4)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_epoch_or_temperature_must_be_given():
    student, teacher = torch.randn(8, 11), torch.randn(4, 11)
    with pytest.raises(ValueError, match="epoch must be given where teacher_temp is not, got None"):
        make_loss()(student, teacher)
    with pytest.raises(ValueError, match="teacher_temp must be positive, got 0"):
        make_loss()(student, teacher, teacher_temp=0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_sinkhorn_over_both_teacher_views(fused, as_tensor):
    loss_fn = make_loss(centering="sinkhorn_knopp").double()
    student, teacher = (
        fnn.HeadOutput(torch.randn(rows, 5, dtype=torch.float64), torch.randn(11, 5).double(), True)
        for rows in (20, 10)
    )
    student.features.requires_grad_()
    temp = torch.tensor(0.3, dtype=torch.float64) if as_tensor else 0.3
    if fused:
        loss = loss_fn.linear(student, teacher, teacher_temp=temp)
    else:
        loss = loss_fn(student.logits(), teacher.logits(), teacher_temp=temp)
    q = sinkhorn(teacher.logits(), 0.3).chunk(2)
    p = (student.logits() / 0.1).log_softmax(1).chunk(4)
    terms = [-(q[t] * p[s]).sum(1).mean() for t in range(2) for s in range(4) if s != t]
    expected = sum(terms) / len(terms)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, student.features), torch.autograd.grad(expected, student.features)
    )
    assert loss_fn.center.abs().sum() == 0


def test_center_moves_in_forward_as_the_official_one():
    loss_fn = make_loss(center_momentum=0.8)
    teacher = torch.randn(10, 11)
    loss_fn(torch.randn(20, 11), teacher, 0)
    torch.testing.assert_close(loss_fn.center, 0.2 * teacher.mean(0, keepdim=True))
    assert list(loss_fn.state_dict()) == ["center"]


def test_accumulation_moves_the_center_once():
    whole, parts = make_loss(update_center=False), make_loss(update_center=False)
    teacher = torch.randn(2, 6, 11)
    student = torch.randn(4, 6, 11)
    whole(student.flatten(0, 1), teacher.flatten(0, 1), 0)
    whole.step()
    for half in (slice(0, 3), slice(3, 6)):
        parts(student[:, half].flatten(0, 1), teacher[:, half].flatten(0, 1), 0)
        assert parts.center.abs().sum() == 0
    parts.step()
    torch.testing.assert_close(parts.center, whole.center)
    parts.step()
    torch.testing.assert_close(parts.center, whole.center, msg="nothing collected: no move")


def _distributed_loss(student, teacher, update_center):
    B = student.shape[1] // dist.get_world_size()
    mine = slice(dist.get_rank() * B, (dist.get_rank() + 1) * B)
    loss_fn = make_loss(update_center=update_center)
    leaf = student[:, mine].clone().requires_grad_()
    loss = loss_fn(leaf.flatten(0, 1), teacher[:, mine].flatten(0, 1), 0)
    loss.backward()
    if not update_center:
        loss_fn.step()
    return loss.detach(), leaf.grad, loss_fn.center


@pytest.mark.parametrize("update_center", [True, False])
def test_two_processes_equal_one(gloo_pool, update_center):
    student, teacher = torch.randn(4, 6, 11), torch.randn(2, 6, 11)
    (loss, grad, center), *_ = gloo_pool.run(_distributed_loss, 1, student, teacher, update_center)
    results = gloo_pool.run(_distributed_loss, 2, student, teacher, update_center)
    losses, grads, centers = zip(*results, strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), loss)
    # DDP's mean divides each rank's gradient by the number of ranks.
    torch.testing.assert_close(torch.cat(grads, dim=1) / 2, grad)
    for other in centers:
        torch.testing.assert_close(other, center)


def test_finite_for_extreme_logits_and_a_batch_of_one():
    loss_fn = make_loss()
    student = torch.full((4, 11), 1e4).requires_grad_()
    loss = loss_fn(student, torch.full((2, 11), -1e4), 0)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and loss_fn.center.isfinite().all()


@pytest.mark.parametrize(
    ("student_rows", "teacher_rows", "K", "message"),
    [
        (10, 20, 11, "student_output must have shape [4 * B, 11]"),
        (8, 16, 11, "are the two swapped?"),
        (20, 10, 7, "student_output must have shape [4 * B, 11], got [20, 7]"),
        (20, 9, 11, "teacher_output must have shape [2 * B, 11], got [9, 11]"),
    ],
)
def test_bad_shapes_are_named(student_rows, teacher_rows, K, message):
    with pytest.raises(ValueError) as error:
        make_loss()(torch.zeros(student_rows, K), torch.zeros(teacher_rows, K), 0)
    assert message in str(error.value)


def test_bad_constructor_arguments_are_named():
    with pytest.raises(ValueError, match="teacher_temp must be positive, got 0"):
        DINOLoss(8, 2, 0.04, 0, 0, 1)
    with pytest.raises(ValueError, match="ncrops must be at least 2, got 1"):
        DINOLoss(8, 1, 0.04, 0.04, 0, 1)
    with pytest.raises(ValueError, match="centering must be one of softmax, sinkhorn_knopp, got"):
        DINOLoss(8, 2, centering="mean")


def test_stats_on_request():
    loss_fn = make_loss()
    teacher = torch.randn(4, 11)
    loss, stats = loss_fn(torch.zeros(8, 11), teacher, 0, return_stats=True)
    torch.testing.assert_close(stats["loss_over_log_k"], torch.tensor(1.0))
    torch.testing.assert_close(loss, torch.tensor(11.0).log())
    q = (teacher / 0.04).softmax(-1)
    expected = torch.distributions.Categorical(q).entropy().mean()
    torch.testing.assert_close(stats["teacher_entropy"], expected, rtol=1e-4, atol=1e-5)


def test_a_new_epoch_is_no_new_graph():
    loss_fn = make_loss()
    counter = CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(loss_fn, backend=counter, fullgraph=True)
    student, teacher = torch.randn(8, 11), torch.randn(4, 11)
    for epoch in range(1, 3):
        compiled(student, teacher, epoch)
    graphs = counter.frame_count
    for epoch in range(3, 9):
        compiled(student, teacher, epoch)
    assert counter.frame_count <= graphs + 1


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn_knopp"])
def test_a_new_temperature_is_no_new_graph(centering):
    loss_fn = make_loss(centering=centering)
    counter = CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(loss_fn, backend=counter, fullgraph=True)
    student, teacher, temp = torch.randn(8, 11), torch.randn(4, 11), torch.tensor(0.04)
    compiled(student, teacher, teacher_temp=temp)
    graphs = counter.frame_count
    for value in (0.05, 0.06, 0.07):
        compiled(student, teacher, teacher_temp=temp.fill_(value))
    assert counter.frame_count == graphs


def test_a_learning_teacher_is_refused_and_aliases_are_known():
    loss_fn = DINOLoss(
        output_dim=11,
        ncrops=2,
        warmup_teacher_temp=0.04,
        teacher_temp=0.07,
        warmup_teacher_temp_epochs=0,
        num_epochs=3,
    )
    with pytest.raises(ValueError, match="teacher_output requires grad and student_output does"):
        loss_fn(torch.zeros(4, 11), torch.zeros(4, 11, requires_grad=True), 0)
