"""InfoNCELoss and NTXentLoss against their formulas, and MoCo's queue."""

import math

import pytest
import torch
from torch.nn import functional as F

from fastssl import InfoNCELoss, NTXentLoss

N, D, M = 4, 5, 11


def pair():
    queries = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    return queries, torch.randn(N, D, dtype=torch.float64)


@pytest.mark.parametrize("in_batch", [None, True])
def test_moco_formula_and_queue(in_batch):
    loss_fn = InfoNCELoss(0.2, queue_size=M, dim=D, in_batch_negatives=in_batch).double()
    queue, pointer = loss_fn.queue.clone(), 0
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(M, dtype=torch.float64))
    # More steps than the queue has room for; N does not divide M.
    for _ in range(4):
        queries, keys = pair()
        loss = loss_fn(queries, keys)
        q, k = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
        if in_batch:
            logits, labels = torch.cat([q @ k.T, q @ queue.T], 1), torch.arange(N)
        else:
            positive = (q * k).sum(1, keepdim=True)
            logits, labels = torch.cat([positive, q @ queue.T], 1), torch.zeros(N).long()
        expected = F.cross_entropy(logits / 0.2, labels)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, queries), torch.autograd.grad(expected, queries)
        )
        for key in k:
            queue[pointer] = key
            pointer = (pointer + 1) % M
        torch.testing.assert_close(loss_fn.queue, queue)
        assert loss_fn.queue_ptr.tolist() == [pointer]
    assert sorted(loss_fn.state_dict()) == ["queue", "queue_ptr"]
    resumed = InfoNCELoss(0.2, queue_size=M, dim=D, in_batch_negatives=in_batch).double()
    resumed.load_state_dict(loss_fn.state_dict())
    queries, keys = pair()
    assert torch.equal(resumed(queries, keys), loss_fn(queries, keys))
    assert torch.equal(resumed.queue, loss_fn.queue)


def test_more_keys_than_places_leave_the_newest():
    loss_fn = InfoNCELoss(queue_size=3, dim=D)
    keys = F.normalize(torch.randn(8, D), dim=1)
    loss_fn(torch.randn(8, D), keys)
    # Key n went to place n modulo 3.
    torch.testing.assert_close(loss_fn.queue, keys[[6, 7, 5]])
    assert loss_fn.queue_ptr.tolist() == [2]


def test_step_pushes_what_was_collected_once():
    every, once = (InfoNCELoss(queue_size=M, dim=D, update_queue=flag) for flag in (True, False))
    before = once.queue.clone()
    keys, queries = torch.randn(2, N, D), torch.randn(N, D, requires_grad=True)
    for part in keys:
        every(queries, part)
        once(queries, part).backward()
        assert torch.equal(once.queue, before)
    once.step()
    torch.testing.assert_close(once.state_dict(), every.state_dict())
    once.step()
    torch.testing.assert_close(once.state_dict(), every.state_dict())


def test_in_batch_formula_and_stats():
    queries, keys = pair()
    loss, stats = InfoNCELoss(0.1)(queries, keys, return_stats=True)
    logits = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / 0.1
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.arange(N)))
    torch.testing.assert_close(stats["loss_over_log_k"], loss.detach() / math.log(N))
    _, stats = InfoNCELoss(queue_size=M, dim=D)(
        torch.zeros(N, D), torch.zeros(N, D), return_stats=True
    )
    torch.testing.assert_close(stats["loss_over_log_k"], torch.tensor(1.0))


def test_nt_xent_formula_and_stats():
    z0, z1 = pair()
    loss, stats = NTXentLoss(0.3)(z0, z1, return_stats=True)
    z = F.normalize(torch.cat([z0, z1]), dim=1)
    logits = (z @ z.T / 0.3).fill_diagonal_(-math.inf)
    expected = F.cross_entropy(logits, torch.arange(2 * N).roll(N))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, z0), torch.autograd.grad(expected, z0))
    torch.testing.assert_close(stats["loss_over_log_k"], loss.detach() / math.log(2 * N - 1))


def test_bad_arguments_are_named():
    moco = InfoNCELoss(T=0.07, K=M, dim=D)
    assert moco.queue.shape == (M, D) and moco.temperature == 0.07
    with pytest.raises(ValueError, match="in_batch_negatives must not be False"):
        InfoNCELoss(in_batch_negatives=False)
    with pytest.raises(ValueError, match=r"keys must have the shape .* got \[3, 5\] beside"):
        moco(torch.zeros(N, D), torch.zeros(3, D))
    with pytest.raises(ValueError, match="keys must have dim 5, got 4"):
        moco(torch.zeros(N, 4), torch.zeros(N, 4))
    with pytest.raises(ValueError, match="keys requires grad and queries does not"):
        moco(torch.zeros(N, D), torch.zeros(N, D, requires_grad=True))
