"""The losses without state of their own: they hand every argument on, and refuse what is wrong."""

import math

import pytest
import torch
from torch.nn import functional as F

import fastssl.losses as L

N, D = 6, 5


def views(*shape):
    return [
        torch.randn(shape or (N, D), dtype=torch.float64).requires_grad_(i == 0) for i in range(2)
    ]


def off_diagonal(matrix):
    return matrix.square().sum() - matrix.diagonal().square().sum()


def barlow(z0, z1, lambd=0.01):
    z0, z1 = (F.batch_norm(z, None, None, training=True) for z in (z0, z1))
    c = z0.T @ z1 / N
    return (1 - c.diagonal()).square().sum() + lambd * off_diagonal(c)


def vicreg(z0, z1):
    loss = 2.0 * F.mse_loss(z0, z1)
    for z in (z0, z1):
        loss = loss + 3.0 / 2 * F.relu(1 - (z.var(0) + 1e-3).sqrt()).mean()
        loss = loss + 4.0 * off_diagonal(z.T.cov()) / D
    return loss


def koleo(z, _):
    z = F.normalize(z, dim=1)
    distances = torch.cdist(z, z) + 1e9 * torch.eye(N, dtype=z.dtype)
    return -(distances.min(1).values + 1e-3).log().mean()


def gram(student, teacher, only_teacher=False):
    s, t = (F.normalize(x, dim=-1) for x in (student, teacher))
    s, t = s @ s.mT, t @ t.mT
    return F.mse_loss(s if only_teacher else s.relu(), t.relu())


def cosine(x0, x1):
    return -((x0 * x1).sum(1) / (x0.norm(dim=1) * x1.norm(dim=1))).mean()


CASES = {
    "barlow": (L.BarlowTwinsLoss(lambda_param=0.01), barlow, (N, D)),
    "vicreg": (L.VICRegLoss(2, 3, nu_param=4, eps=1e-3), vicreg, (N, D)),
    "koleo": (L.KoLeoLoss(eps=1e-3), koleo, (N, D)),
    "gram": (L.GramLoss(), gram, (2, N, D)),
    "gram_teacher": (
        L.GramLoss(remove_neg=False, remove_only_teacher_neg=True),
        lambda s, t: gram(s, t, True),
        (2, N, D),
    ),
    "cosine": (L.NegativeCosineSimilarity(), cosine, (N, D)),
}


@pytest.mark.parametrize("case", CASES)
def test_formula_and_gradient(case):
    loss_fn, formula, shape = CASES[case]
    x0, x1 = views(*shape)
    loss = loss_fn(x0) if case == "koleo" else loss_fn(x0, x1)
    expected = formula(x0, x1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x0), torch.autograd.grad(expected, x0))
    assert not loss_fn.state_dict()


def test_published_defaults():
    assert L.BarlowTwinsLoss().lambd == 0.0051
    vicreg = L.VICRegLoss()
    assert (vicreg.sim_coeff, vicreg.std_coeff, vicreg.cov_coeff) == (25, 25, 1)
    assert math.isclose(vicreg.epsilon, 1e-4)
    assert L.NTXentLoss().temperature == 0.5 and L.NTXEntLoss is L.NTXentLoss


def test_bad_arguments_are_named():
    learns, fixed = torch.zeros(N, D, requires_grad=True), torch.zeros(N, D)
    with pytest.raises(ValueError, match="x1 requires grad and x0 does not: are the two swapped"):
        L.NegativeCosineSimilarity()(fixed, learns)
    with pytest.raises(ValueError, match=r"x1 must have the shape of x0 \[6, 5\], got \[5, 5\]"):
        L.NegativeCosineSimilarity()(learns, fixed[:5])
    with pytest.raises(ValueError, match="target_feats requires grad"):
        L.GramLoss()(fixed[None], learns[None])
    with pytest.raises(ValueError, match=r"target_feats must have the B and N .* got \[1, 5, 5\]"):
        L.GramLoss()(learns[None], fixed[None, :5])
    with pytest.raises(ValueError, match="remove_neg must be False"):
        L.GramLoss(remove_only_teacher_neg=True)
    with pytest.raises(ValueError, match="p must be 2, got 1"):
        L.KoLeoLoss(p=1)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        L.NTXentLoss(0)


def no_exchange():
    """Losses of a process alone inside a group of two: rank 1's data are its own."""
    import torch.distributed as dist

    torch.manual_seed(dist.get_rank())
    z0, z1 = torch.randn(4, 3), torch.randn(4, 3)
    return [
        (kind(gather_distributed=False)(z0, z1), kind(gather_distributed=True)(z0, z1))
        for kind in (L.BarlowTwinsLoss, L.VICRegLoss)
    ]


def test_gather_distributed_false_is_a_process_alone(gloo_pool):
    torch.manual_seed(1)
    z0, z1 = torch.randn(4, 3), torch.randn(4, 3)
    results = gloo_pool.run(no_exchange, 2)
    for i, kind in enumerate((L.BarlowTwinsLoss, L.VICRegLoss)):
        torch.testing.assert_close(results[1][i][0], kind()(z0, z1))
        assert not torch.equal(*results[1][i])
