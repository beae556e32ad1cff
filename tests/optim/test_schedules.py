"""Schedules against their closed forms."""

import math

import pytest

from fastssl.optim import Schedule, scale_lr


def test_warm_up_then_cosine():
    schedule = Schedule(base=2.0, start=1.0, final=0.5, warmup_steps=4)
    assert [schedule(s, 12) for s in range(5)] == [1.0, 1.25, 1.5, 1.75, 2.0]
    for step in range(4, 12):
        expected = 0.5 + 0.5 * (2.0 - 0.5) * (1 + math.cos(math.pi * (step - 4) / 8))
        assert schedule(step, 12) == pytest.approx(expected, rel=1e-12)
    assert schedule(8, 12) == pytest.approx(1.25), "half way"
    assert schedule(12, 12) == pytest.approx(0.5)
    assert schedule(20, 12) == pytest.approx(0.5), "never beyond the end"


def test_cosine_upwards_as_teacher_momentum():
    schedule = Schedule(base=0.996, final=1.0)
    assert schedule(0, 100) == 0.996
    assert schedule(50, 100) == pytest.approx(0.998)
    assert schedule(100, 100) == pytest.approx(1.0)
    values = [schedule(s, 100) for s in range(101)]
    assert values == sorted(values)


def test_linear():
    schedule = Schedule(base=1.0, final=0.0, kind="linear", warmup_steps=2)
    assert [schedule(s, 6) for s in range(7)] == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_constant_after_warm_up_as_teacher_temperature():
    schedule = Schedule(base=0.07, start=0.04, final=9.0, warmup_steps=3, kind="constant")
    expected = [0.04, 0.05, 0.06, 0.07, 0.07, 0.07]
    assert [schedule(s, 6) for s in range(6)] == pytest.approx(expected)


def test_without_final_it_stays():
    assert {Schedule(base=0.05)(s, 9) for s in range(9)} == {0.05}


def test_hold_is_a_window_then_the_warm_up_begins():
    window = Schedule(base=1.0, start=0.0, hold_steps=3, kind="constant")
    assert [window(s, 6) for s in range(6)] == [0, 0, 0, 1, 1, 1]
    held = Schedule(base=1.0, start=0.2, hold_steps=2, warmup_steps=2, kind="constant")
    assert [held(s, 9) for s in range(5)] == pytest.approx([0.2, 0.2, 0.2, 0.6, 1.0])


def test_warm_up_longer_than_the_run():
    schedule = Schedule(base=1.0, final=0.0, warmup_steps=10)
    assert [schedule(s, 5) for s in range(5)] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_unknown_kind_is_named():
    with pytest.raises(
        ValueError, match="kind must be one of cosine, linear, constant, steps, got 'cos'"
    ):
        Schedule(base=1.0, kind="cos")(0, 10)


@pytest.mark.parametrize(
    "scaling, batch, reference, expected",
    [
        ("linear", 4096, 256, 2.4e-3),  # MAE's rule at its batch
        ("linear", 64, 256, 3.75e-5),
        ("sqrt", 1024, 256, 3e-4),
        ("sqrt", 2048, 1024, 1.5e-4 * math.sqrt(2)),  # DINOv2's rule
        ("none", 4096, 256, 1.5e-4),
    ],
)
def test_lr_scales_with_the_global_batch(scaling, batch, reference, expected):
    lr = scale_lr(1.5e-4, batch, scaling=scaling, reference=reference)
    assert lr == pytest.approx(expected, rel=1e-12)


def test_unknown_scaling_is_named():
    with pytest.raises(ValueError, match="scaling must be one of linear, sqrt, none, got 'lin'"):
        scale_lr(1.0, 256, scaling="lin")


def test_steps_divide_at_their_milestones():
    schedule = Schedule(base=0.4, warmup_steps=2, kind="steps", milestones=[4, 6], gamma=0.5)
    values = [schedule(s, 8) for s in range(8)]
    assert values == pytest.approx([0.0, 0.2, 0.4, 0.4, 0.2, 0.2, 0.1, 0.1])
    assert Schedule(base=0.4, kind="steps")(7, 8) == 0.4
