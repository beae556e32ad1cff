"""Uneven shares on several ranks give the numbers of one process with all samples."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fastssl.evaluation import (
    FineTuneOptions,
    SGDOptions,
    alignment,
    attentive_probe,
    feature_std,
    fine_tune,
    knn,
    knn_accuracies,
    low_shot_accuracy,
    low_shot_split,
    rankme,
    sgd_probe,
    shares,
    teacher_entropy,
    uniformity,
)
from fastssl.evaluation.encoder import Encoder
from fastssl.evaluation.shares import broadcast_rows, gather_rows
from tests.evaluation.test_finetune import WHAT, batches, encoder

# Where the shares of ranks 0, 1, ... end; the second and third have a rank without samples.
SHARES = {"uneven": (0.2, 1.0), "empty": (0.0, 1.0), "four": (0.5, 0.5, 0.6, 1.0)}


def clusters(num, seed, classes=5, dim=8):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (num,), generator=generator)
    return centres[labels] + torch.randn(num, dim, generator=generator), labels


def own(x, ends):
    """This rank's share of the rows; `ends` None: all."""
    if ends is None:
        return x
    bounds = [0, *(round(end * len(x)) for end in ends)]
    return x[bounds[dist.get_rank()] : bounds[dist.get_rank() + 1]]


def everything(ends):
    """All that knows of ranks, by name."""
    (x, y), (x_test, y_test) = clusters(101, 0), clusters(83, 1)
    y[y == 3] = 4  # so that one class is missing, and
    y_test[0] = 7  # one is on one rank only
    x[:50, 1] = x[0, 1]
    sets = [own(part, ends) for part in (x, y, x_test, y_test)]
    tokens = [own(part.unflatten(1, (2, 4)), ends) for part in (x, x_test)]
    options = SGDOptions((0.03, 0.3), epochs=2, batch_size=17)
    ids = own(torch.arange(101).flip(0), ends)
    chosen = low_shot_split(sets[1], fraction=0.2, seed=3, ids=ids)
    # Several broadcasts from each rank.
    with mock.patch.object(knn, "_TRAIN_CHUNK", 16):
        neighbours = knn_accuracies(*sets, ks=(1, 20, 500), temperature=0.2)
    return {
        "knn": neighbours,
        "linear": sgd_probe(*sets, options),
        "raw": sgd_probe(*sets, SGDOptions((0.1,), epochs=1, batch_size=30, standardize=False)),
        "attentive": attentive_probe(tokens[0], sets[1], tokens[1], sets[3], options, num_heads=2),
        "low_shot": low_shot_accuracy(*sets, per_class=2),
        "split": sorted(gather_rows(ids[chosen]).tolist()),
        "rankme": rankme(sets[0], group=None),
        "share": rankme(sets[0], normalized=True, group=None),
        "std": feature_std(sets[0], group=None),
        "alignment": alignment(sets[0], sets[0].flip(1)),
        "uniformity": uniformity(sets[0]),
        "entropy": teacher_entropy(sets[0], 0.3, x.mean(0)),
    }


@pytest.mark.parametrize(
    "shares", ["uneven", "empty", pytest.param("four", marks=pytest.mark.slow)]
)
def test_ranks_equal_one_process(gloo_pool, shares):
    (expected,) = gloo_pool.run(everything, 1, None)
    results = gloo_pool.run(everything, len(SHARES[shares]), SHARES[shares])
    exact = ("knn", "linear", "raw", "attentive", "low_shot", "split")
    for result in results:
        assert result == results[0], "the ranks agree to the last bit"
        for name in exact:
            assert result[name] == expected[name], name
        for name in ("rankme", "share", "std", "alignment", "uniformity"):
            assert result[name] == pytest.approx(expected[name], rel=1e-10), name
        assert vars(result["entropy"]) == pytest.approx(vars(expected["entropy"]), rel=1e-10)
    accuracies = [*expected["knn"].values(), expected["linear"].accuracy]
    assert all(20 < accuracy < 95 for accuracy in accuracies), "a case with errors in it"


def alone():
    """What is of the process's own samples must not wait for the other ranks."""
    x, y = clusters(30, dist.get_rank())
    if dist.get_rank() == 0:
        return None
    got = knn_accuracies(x, y, x, y, group=""), sgd_probe(x, y, x, y, group="").accuracy
    return *got, rankme(x), feature_std(x), uniformity(x, group="")


def test_a_group_of_oneself(gloo_pool):
    assert gloo_pool.run(alone, 2)[1][0].keys() == {10, 20}


def streamed(dtype, group_by_name):
    rank = dist.get_rank()
    rows = torch.arange(rank * 10, rank * 10 + 3 + 4 * rank).to(dtype)[:, None].expand(-1, 2)
    group = dist.group.WORLD.group_name if group_by_name else dist.group.WORLD
    places, parts = zip(*broadcast_rows(rows, 2, group), strict=True)
    return places, torch.cat(parts), gather_rows(rows, group)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_by_name", [False, True])
def test_rows_come_in_order(gloo_pool, dtype, group_by_name):
    expected = torch.tensor([0, 1, 2, 10, 11, 12, 13, 14, 15, 16]).to(dtype)[:, None].expand(-1, 2)
    for places, parts, gathered in gloo_pool.run(streamed, 2, dtype, group_by_name):
        assert places == (0, 2, 3, 5, 7, 9)
        assert torch.equal(parts, expected) and torch.equal(gathered, expected)


def gathered():
    rows = torch.arange(7 if dist.get_rank() else 2)
    with mock.patch.object(shares, "_CHUNK", 3):
        return gather_rows(rows)


def test_ranks_with_more_rows_than_a_chunk_cut_alike(gloo_pool):
    for rows in gloo_pool.run(gathered, 2):
        assert rows.tolist() == [*range(2), *range(7)]


def tuned(sizes_by_rank):
    """Every rank takes its part of each of the batches that one process has whole."""
    whole = batches([12, 12, 6], 0)
    ranks = range(len(sizes_by_rank))
    train, test = whole, batches([40, 60], 1)
    if len(ranks) > 1:
        sizes = sizes_by_rank[dist.get_rank()]
        starts = [sum(sizes_by_rank[r][i] for r in range(dist.get_rank())) for i in range(3)]
        parts = [
            (x[start : start + size], y[start : start + size])
            for (x, y), start, size in zip(whole, starts, sizes, strict=True)
        ]
        # A rank may have fewer batches than another.
        train = [part for part in parts if len(part[1])]
        test = test[dist.get_rank() :: len(ranks)]
    model = encoder().double()
    train, test = ([(x.double(), y) for x, y in part] for part in (train, test))
    options = FineTuneOptions(lr=0.02, epochs=2, warmup_epochs=1)
    accuracy = fine_tune(model, train, test, **WHAT, options=options)
    return accuracy, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_fine_tuning_on_ranks_equals_one_process(gloo_pool):
    ((accuracy, parameters),) = gloo_pool.run(tuned, 1, [(12, 12, 6)])
    assert 35 < accuracy < 95, "a case with errors in it"
    results = gloo_pool.run(tuned, 2, [(4, 5, 6), (8, 7, 0)])
    for got, others in results:
        assert got == accuracy
        assert torch.equal(others, results[0][1])
        torch.testing.assert_close(others, parameters, rtol=1e-9, atol=1e-11)


def tuned_with_batch_norm(sizes_by_rank):
    whole = batches([12, 12, 6, 0, 1], 0)
    rank = dist.get_rank()
    train = []
    for i, (x, y) in enumerate(whole):
        start = sum(sizes[i] for sizes in sizes_by_rank[:rank])
        part = slice(start, start + sizes_by_rank[rank][i])
        train.append((x[part].double(), y[part]))
    test = [(x.double(), y) for x, y in batches([100], 1)]
    torch.manual_seed(3)
    layers = [torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU()]
    model = Encoder(torch.nn.Sequential(*layers, torch.nn.Linear(8, 8)).double())
    model._run = lambda function, images: function(images)  # in float64
    model = model.trainable_copy()
    options = FineTuneOptions(lr=0.02, epochs=2, warmup_epochs=0)
    accuracy = fine_tune(model, train, test, **WHAT, options=options)
    return accuracy, torch.cat([v.detach().double().flatten() for v in model.state_dict().values()])


def test_batch_norm_of_fine_tuning_is_over_all_ranks(gloo_pool):
    ((accuracy, state),) = gloo_pool.run(tuned_with_batch_norm, 1, [(12, 12, 6, 0, 1)])
    results = gloo_pool.run(tuned_with_batch_norm, 2, [(4, 5, 6, 0, 1), (8, 7, 0, 0, 0)])
    for got, others in results:
        assert got == accuracy
        torch.testing.assert_close(others, state, rtol=1e-8, atol=1e-10)
