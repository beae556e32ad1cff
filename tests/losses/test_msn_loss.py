"""MSNLoss against the formulas of its paper and code."""

import math

import pytest
import torch
from torch.nn import functional as F

from fastssl import MSNLoss
from tests.losses.test_ibot_patch_loss import sinkhorn

V, B, D, K = 3, 4, 5, 6


def published(anchors, targets, prototypes, tau, T, iterations, me_max_weight, entropy_weight):
    prototypes = F.normalize(prototypes, dim=1)
    p = (F.normalize(anchors, dim=1) @ prototypes.T / tau).softmax(1)
    q = (F.normalize(targets, dim=1) @ prototypes.T / tau).softmax(1).detach() ** (1 / T)
    q = q / q.sum(1, keepdim=True)
    if iterations:
        # The loop of Sinkhorn starts from the probabilities.
        q = sinkhorn(q.log(), 1.0, iterations)
    loss = -(q.repeat(V, 1) * p.log()).sum(1).mean()
    mean = p.mean(0)
    loss = loss + me_max_weight * ((mean * mean.log()).sum() + math.log(K))
    return loss - entropy_weight * (p * p.log()).sum(1).mean()


@pytest.mark.parametrize("iterations", [0, 3])
@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, 0.0), (0.7, 0.2)])
def test_formula_and_gradients(iterations, weights):
    anchors, targets, prototypes = (
        torch.randn(rows, D, dtype=torch.float64) for rows in (V * B, B, K)
    )
    anchors.requires_grad_()
    prototypes.requires_grad_()
    loss_fn = MSNLoss(
        V,
        0.2,
        weights[0] > 0,
        me_max_weight=weights[0] or 9.0,
        entropy_weight=weights[1],
        sinkhorn_iterations=iterations,
    )
    loss = loss_fn(anchors, targets, prototypes, 0.4)
    expected = published(anchors, targets, prototypes, 0.2, 0.4, iterations, *weights)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (anchors, prototypes)),
        torch.autograd.grad(expected, (anchors, prototypes)),
    )


def test_stats_of_equal_prototypes():
    loss, stats = MSNLoss()(
        torch.randn(B, D), torch.randn(B, D), torch.ones(K, D), return_stats=True
    )
    torch.testing.assert_close(loss, torch.tensor(math.log(K)))
    torch.testing.assert_close(stats["loss_over_log_k"], torch.tensor(1.0))
    for name in ("teacher_entropy", "mean_entropy"):
        torch.testing.assert_close(stats[name], torch.tensor(math.log(K)))


def test_bad_arguments_are_named():
    loss_fn = MSNLoss(V, temperature=0.2, regularization_weight=2)
    assert (loss_fn.tau, loss_fn.me_max_weight) == (0.2, 2)
    anchors, targets, prototypes = (torch.zeros(rows, D) for rows in (V * B, B, K))
    with pytest.raises(ValueError, match=r"anchor_views must have 3 \* B rows .* swapped"):
        loss_fn(targets, anchors, prototypes)
    with pytest.raises(ValueError, match=r"prototypes must have shape .* got \[6, 4\]"):
        loss_fn(anchors, targets, prototypes[:, :4])
    with pytest.raises(ValueError, match="target_views requires grad"):
        MSNLoss()(targets, torch.zeros(B, D, requires_grad=True), prototypes)
    with pytest.raises(ValueError, match="T must be positive, got 0"):
        loss_fn(anchors, targets, prototypes, 0)
