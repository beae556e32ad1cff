"""A run that is killed at any moment loses the steps since its last checkpoint, and no more."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time

import pytest

from fastssl.training import checkpoint
from fastssl.training.loop import train
from tests.faults.runs import last_step, run, start
from tests.training.tiny import assert_same_tensors, saved_tensors, tiny_config

EVERY = 2


def wait_for_a_save(saved, process):
    """Return within one: a folder that is being written is there."""
    while process.is_alive():
        with contextlib.suppress(OSError):
            if any(entry.name.endswith(".writing") for entry in os.scandir(saved)):
                return


def step_of(path):
    return 0 if path is None else int(path.name.removeprefix("step_"))


def kill_at_some_moment(process, saved, draw, in_a_save):
    """By SIGKILL, up to 8 steps after where the run goes on."""
    target = step_of(checkpoint.newest(saved)[0]) + draw.randint(1, 8)
    deadline = time.monotonic() + 100
    while process.is_alive() and last_step(saved.parent) < target:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.03))
    if in_a_save:
        wait_for_a_save(saved, process)
        time.sleep(draw.uniform(0, 0.004))
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.parametrize(
    "asynchronous, kills",
    [
        pytest.param("false", 3, id="3 kills"),
        pytest.param("false", 20, id="20 kills", marks=pytest.mark.slow),
        pytest.param("true", 20, id="20 kills, asynchronous", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("no_report")
def test_killed_again_and_again_a_run_ends_as_one_undisturbed(
    images, tmp_path, asynchronous, kills
):
    more = [f"train.steps={12 * kills}", f"checkpoint.every={EVERY}", "eval.max_images=0"]
    config = tiny_config(images, tmp_path, *more, f"checkpoint.asynchronous={asynchronous}")
    saved, log = tmp_path / "tiny" / "checkpoints", tmp_path / "log"
    draw, within_a_save = random.Random(kills), 0
    for kill in range(kills):
        process = start(run, config, log)
        kill_at_some_moment(process, saved, draw, in_a_save=kill % 2 == 1)
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        within_a_save += any(saved.glob("*.writing"))
        newest, skipped = checkpoint.newest(saved)
        there, done = step_of(newest), last_step(saved.parent)
        # A step is in the metrics before it is saved; what is written beside the training may be
        # one checkpoint late.
        due = (done - 1) // EVERY * EVERY - (EVERY if asynchronous == "true" else 0)
        assert skipped == [] and there >= due, f"step {there} is saved of {done}"
    assert within_a_save >= kills // 5, "too few kills came within a save to say anything"
    print(f"{kills} kills, {within_a_save} of them within a save")

    process = start(run, config, log)
    process.join(300)
    assert process.exitcode == 0, log.read_text()
    assert log.read_text().count("going on after step") >= kills // 2
    undisturbed = train(tiny_config(images, tmp_path, *more, "name=undisturbed"))
    ours, theirs = (checkpoint.newest(f)[0] for f in (saved, undisturbed / "checkpoints"))
    assert ours.name == theirs.name == f"step_{12 * kills:08d}"
    assert_same_tensors(saved_tensors(ours), saved_tensors(theirs))
