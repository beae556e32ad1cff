"""iBOTPatchLoss against the formulas of DINOv2 and iBOT, its center and its fixed capacity."""

import math

import pytest
import torch

from fastssl import iBOTPatchLoss
from fastssl.losses import IBOTPatchLoss

K, M, USED = 9, 8, 5


def rows(student, teacher, center, teacher_temp=0.04):
    """The cross-entropy of each row."""
    p = ((teacher - center) / teacher_temp).softmax(-1)
    return -(p * (student / 0.1).log_softmax(-1)).sum(-1)


def sinkhorn(teacher, temp, iterations=3):
    """The loop of SwAV and DINOv2."""
    q = (teacher / temp).exp().T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True) * q.shape[0]
        q /= q.sum(0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).T


def tokens():
    student = torch.randn(M, K, dtype=torch.float64, requires_grad=True)
    return student, torch.randn(M, K, dtype=torch.float64), torch.rand(M, dtype=torch.float64)


def test_dinov2_formula_and_gradient_with_rows_to_spare():
    student, teacher, weights = tokens()
    teacher[USED:] = math.nan
    loss_fn = iBOTPatchLoss(K, center_momentum=0.8).double()
    loss_fn.center.normal_()
    center = loss_fn.center.clone().flatten()
    loss, stats = loss_fn(
        student,
        teacher,
        teacher_temp=0.05,
        n_masked_patches=torch.tensor([USED]),
        masks_weight=weights,
        num_images=3,
        return_stats=True,
    )
    per_row = rows(student[:USED], teacher[:USED], center, 0.05)
    expected = (per_row * weights[:USED]).sum() / 3
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, student), torch.autograd.grad(expected, student)
    )
    mean = teacher[:USED].mean(0)
    torch.testing.assert_close(loss_fn.center.flatten(), 0.8 * center + 0.2 * mean)
    assert list(loss_fn.state_dict()) == ["center"] and loss_fn.center.shape == (1, 1, K)
    p = ((teacher[:USED] - center) / 0.05).softmax(-1)
    torch.testing.assert_close(stats["teacher_entropy"], -(p * p.log()).sum(-1).mean())
    weighted = (per_row * weights[:USED]).sum() / weights[:USED].sum()
    torch.testing.assert_close(stats["loss_over_log_k"], weighted.detach() / math.log(K))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_over_rows_without_a_number_of_images(weighted):
    student, teacher, weights = tokens()
    loss = iBOTPatchLoss(K)(student, teacher, masks_weight=weights if weighted else None)
    per_row = rows(student, teacher, 0)
    w = weights if weighted else torch.ones_like(weights)
    torch.testing.assert_close(loss, (per_row * w).sum() / w.sum())


def test_sinkhorn_formula():
    student, teacher, _ = tokens()
    loss_fn = iBOTPatchLoss(K, centering="sinkhorn_knopp", teacher_temp=0.3)
    loss = loss_fn(student, teacher, n_masked_patches=torch.tensor(USED))
    q = sinkhorn(teacher[:USED], 0.3)
    expected = -(q * (student[:USED] / 0.1).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    assert loss_fn.center.abs().sum() == 0


def test_accumulation_moves_the_center_once_and_by_rows():
    whole, parts = (iBOTPatchLoss(K, update_center=flag) for flag in (True, False))
    student, teacher = torch.randn(M, K), torch.randn(M, K)
    whole(student, teacher)
    # Unequal parts: every row counts the same.
    for part in (slice(0, 2), slice(2, M)):
        parts(student[part], teacher[part])
        assert parts.center.abs().sum() == 0
    parts.step()
    torch.testing.assert_close(parts.center, whole.center)


def test_nothing_masked():
    student = torch.randn(M, K, requires_grad=True)
    loss_fn = iBOTPatchLoss(K)
    loss, stats = loss_fn(
        student, torch.randn(M, K), n_masked_patches=torch.tensor(0), return_stats=True
    )
    loss.backward()
    assert loss == 0 and student.grad.abs().sum() == 0 and loss_fn.center.abs().sum() == 0
    assert stats["loss_over_log_k"] == 0


def test_bad_arguments_are_named():
    assert IBOTPatchLoss(output_dim=4).center.shape == (1, 1, 4)
    with pytest.raises(TypeError, match="patch_out_dim and its alias out_dim were both given"):
        iBOTPatchLoss(patch_out_dim=4, out_dim=4)
    with pytest.raises(ValueError, match="centering must be one of softmax, sinkhorn_knopp, got"):
        iBOTPatchLoss(4, centering="mean")
    loss_fn, x = iBOTPatchLoss(4), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"student_patch_tokens must have shape .*got \[3, 5\]"):
        loss_fn(torch.zeros(3, 5), x)
    with pytest.raises(ValueError, match=r"teacher_patch_tokens must have shape .*got \[2, 4\]"):
        loss_fn(x, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"teacher_patch_tokens requires grad .* swapped"):
        loss_fn(x, torch.zeros(3, 4, requires_grad=True))
    with pytest.raises(ValueError, match="num_images must be at least 1, got 0"):
        loss_fn(x, x, num_images=0)
