"""Bad steps and collapse."""

import torch
from torch import nn

from fastssl.training.watch import BadSteps, CollapseWatch, all_finite

INF = float("inf")


def test_steps_are_refused_and_counted():
    bad = BadSteps(nn.Identity())
    one, nan = torch.tensor(1.0), torch.tensor(float("nan"))
    came = [(one, one), (nan, one), (one, torch.tensor(INF)), (one, one), (nan, nan)]
    assert [bad.refuse(*values) for values in came] == [False, True, True, False, True]
    assert (bad.total, bad.in_a_row) == (3, 1)


def refused_here_or_there():
    rank = torch.distributed.get_rank()
    bad = BadSteps(nn.Identity())
    one = torch.tensor(1.0)
    return [bad.refuse(torch.tensor(INF) if rank == 1 else one, one), bad.refuse(one, one)]


def test_ranks_agree_on_a_refusal(gloo_pool):
    assert gloo_pool.run(refused_here_or_there, 2) == [[True, False]] * 2


def test_batch_statistics_of_a_refused_step_are_put_back():
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
    module(torch.randn(4, 3))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    bad = BadSteps(module)
    bad.remember()
    loss = module(torch.full((4, 3), float("nan"))).sum()
    assert not all_finite(module)
    assert bad.refuse(loss, torch.tensor(1.0))
    assert all_finite(module)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    bad.remember()
    module(torch.randn(4, 3))
    assert not bad.refuse(torch.tensor(1.0), torch.tensor(1.0))
    assert not torch.equal(module[0].running_mean, before["0.running_mean"])


def test_features_are_measured_once():
    watch = CollapseWatch()
    assert watch.measure() == {}
    watch.see(torch.eye(8))
    values = watch.measure()
    assert abs(values["rankme"] - 8) < 1e-3
    assert watch.measure() == {}
    watch.see(torch.full((4, 8), float("nan")))
    assert watch.measure() == {}


def of_all_ranks():
    watch = CollapseWatch()
    watch.see(torch.eye(8)[torch.distributed.get_rank() :: 2])
    return watch.measure()


def test_measures_are_of_all_ranks(gloo_pool):
    first, second = gloo_pool.run(of_all_ranks, 2)
    assert abs(first["rankme"] - 8) < 1e-3
    # The rank that writes the log measures for all.
    assert second == {}


def test_a_collapse_is_said_once_with_its_beginning():
    watch = CollapseWatch()
    assert watch.warnings(10, {"feature_std": 0.5, "rankme": 20.0, "loss": 1.0}) == []
    (said,) = watch.warnings(20, {"feature_std": 0.04, "rankme": 20.0})
    for part in ("feature_std is 0.04 since step 20", "0.5 at first", "usually help"):
        assert part in said
    assert watch.warnings(30, {"feature_std": 0.03, "rankme": 20.0}) == []
    assert watch.warnings(40, {"feature_std": 0.3}) == []
    assert len(watch.warnings(50, {"feature_std": 0.01, "rankme": 1.2})) == 2


def test_a_teacher_that_says_nothing_is_named():
    watch = CollapseWatch()
    assert watch.warnings(10, {"teacher_entropy_over_log_k": 0.9}) == []
    (said,) = watch.warnings(20, {"teacher_entropy_over_log_k": 0.9999})
    assert "lower teacher_temp" in said


def test_a_run_that_goes_on_remembers_how_it_began():
    watch = CollapseWatch({"feature_std": 0.5})
    (said,) = watch.warnings(30, {"feature_std": 0.001})
    assert "0.5 at first" in said


def test_what_is_seen_is_small():
    watch = CollapseWatch()
    tokens = torch.randn(4, 100, 8)
    watch.see(tokens[:, 0])
    assert watch._features.untyped_storage().nbytes() == 4 * 8 * 4
