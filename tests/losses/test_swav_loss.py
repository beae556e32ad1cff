"""SwAVLoss against the loop of its official code, with its queue."""

import math

import pytest
import torch
from torch.nn import functional as F

from fastssl import SwAVLoss
from fastssl.losses import SwaVLoss
from tests.losses.test_ibot_patch_loss import sinkhorn

S, B, D, K = 5, 3, 4, 6
ASSIGN = (0, 2)


def official_step(output, embedding, weight, queue):
    """One step over all views; pushes to `queue` [T, Q, D]; queue counts once its end is filled."""
    views, loss = output.chunk(S), 0.0
    for i, view in enumerate(ASSIGN):
        scores = views[view].detach()
        if queue is not None and queue[i, -1].any():
            scores = torch.cat([queue[i] @ weight.detach().T, scores])
        q = sinkhorn(scores, 0.05)[-B:]
        for v in range(S):
            if v != view:
                loss -= (q * (views[v] / 0.1).log_softmax(1)).sum(1).mean() / (S - 1)
        if queue is not None:
            queue[i] = torch.cat([embedding.chunk(S)[view], queue[i]])[: queue.shape[1]].detach()
    return loss / len(ASSIGN)


@pytest.mark.parametrize("length", [0, 6])
def test_steps_of_the_official_code(length):
    loss_fn = SwAVLoss(ASSIGN, (3, 2), queue_length=length, feat_dim=D).double()
    queue = torch.zeros(2, length, D, dtype=torch.float64) if length else None
    weight = torch.randn(K, D, dtype=torch.float64)
    for step in range(4):
        embedding = F.normalize(torch.randn(S * B, D, dtype=torch.float64), dim=1)
        output = (embedding @ F.normalize(weight, dim=1).T).requires_grad_()
        normalized = F.normalize(weight, dim=1)
        given = {}
        if length:
            given = {"embedding": embedding, "prototypes": normalized}
            if step % 2:
                given["prototypes"] = lambda x, w=normalized: x @ w.T
        loss = loss_fn(output, **given)
        expected = official_step(output, embedding, normalized, queue)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, output), torch.autograd.grad(expected, output)
        )
        if length:
            torch.testing.assert_close(loss_fn.queue, queue)
    assert list(loss_fn.state_dict()) == (["queue"] if length else [])


def test_stats_and_embeddings_of_the_assigned_views():
    whole, part = (SwAVLoss(ASSIGN, (S,), queue_length=4, feat_dim=D) for _ in range(2))
    embedding, weight = torch.randn(S, B, D), torch.randn(K, D)
    output = torch.zeros(S * B, K)
    loss, stats = whole(output, embedding.flatten(0, 1), weight, return_stats=True)
    part(output, embedding[list(ASSIGN)].flatten(0, 1), weight)
    assert torch.equal(whole.queue, part.queue) and whole.queue.any()
    torch.testing.assert_close(loss, torch.tensor(math.log(K)))
    torch.testing.assert_close(stats["loss_over_log_k"], torch.tensor(1.0))
    torch.testing.assert_close(stats["teacher_entropy"], torch.tensor(math.log(K)))


def test_step_pushes_what_was_collected_once():
    every, once = (
        SwAVLoss((0, 1), (2,), queue_length=8, feat_dim=D, update_queue=flag)
        for flag in (True, False)
    )
    weight = torch.randn(K, D)
    parts = torch.randn(2, 2 * B, D)
    for embedding in parts:
        once(embedding @ weight.T, embedding, weight)
    assert not once.queue.any()
    once.step()
    every(
        *[torch.cat([p.unflatten(0, (2, B)) for p in parts], dim=1).flatten(0, 1) @ weight.T],
        torch.cat([p.unflatten(0, (2, B)) for p in parts], dim=1).flatten(0, 1),
        weight,
    )
    assert torch.equal(once.queue, every.queue)
    before = once.queue.clone()
    once.step()
    assert torch.equal(once.queue, before)


def test_bad_arguments_are_named():
    assert SwaVLoss(sinkhorn_epsilon=0.03).epsilon == 0.03
    with pytest.raises(ValueError, match="crops_for_assign must be at least 0 and at most 1"):
        SwAVLoss((0, 2), (2,))
    with pytest.raises(ValueError, match="crops_for_assign must be different views"):
        SwAVLoss((0, 0), (2,))
    plain, queued = SwAVLoss(), SwAVLoss(queue_length=4, feat_dim=D)
    output, embedding, weight = torch.zeros(4, K), torch.zeros(4, D), torch.zeros(K, D)
    with pytest.raises(ValueError, match=r"output must have shape \[2 \* B, K\], got \[3, 6\]"):
        plain(output[:3])
    with pytest.raises(ValueError, match="embedding must be None for a loss of queue_length 0"):
        plain(output, embedding, weight)
    with pytest.raises(ValueError, match="prototypes must be given"):
        queued(output, embedding)
    with pytest.raises(ValueError, match="embedding must be given"):
        queued(output, prototypes=weight)
    with pytest.raises(ValueError, match=r"embedding must have 4 or 4 rows .* got \[3, 4\]"):
        queued(output, embedding[:3], weight)
    with pytest.raises(ValueError, match=r"prototypes must have shape .* got \[6, 3\]"):
        queued(output, embedding, weight[:, :3])
