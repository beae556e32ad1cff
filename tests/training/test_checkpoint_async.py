"""Checkpoints that are written beside the training are those that a run which waits would write."""

import threading

import pytest
import torch

from fastssl.training import checkpoint, loop
from fastssl.training.config import load
from fastssl.training.loop import Run, train
from fastssl.training.rng import rng_state
from tests.training.test_checkpoint import POSITION, make, state, step
from tests.training.tiny import assert_same_tensors, saved_tensors, tiny_config

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def held(monkeypatch):
    """Lets the writing thread go on when it is set."""
    go_on, real = threading.Event(), checkpoint._save_tensors

    def save_tensors(*args):
        assert go_on.wait(60)
        real(*args)

    monkeypatch.setattr(checkpoint, "_save_tensors", save_tensors)
    yield go_on
    go_on.set()


def test_what_is_written_is_what_was_there_at_the_time_of_the_call(tmp_path, held):
    module, optimizer = make()
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=3, asynchronous=True)
    for number in (1, 2):  # the second time into the copies of the first
        held.clear()
        step(module, optimizer)
        before = state(module, optimizer)
        torch.manual_seed(number)
        checkpoints.save(number, module, optimizer, position=POSITION)
        assert checkpoints.outcome() is None
        torch.rand(3)
        step(module, optimizer)
        assert checkpoint.complete(tmp_path) == [tmp_path / "step_00000001"][: number - 1]
        held.set()
        outcome = checkpoints.outcome(wait=True)
        assert (outcome.step, outcome.error) == (number, None)
        assert checkpoints.outcome(wait=True) is None, "once"
        assert_same_tensors(saved_tensors(outcome.path), before)
        other, other_optimizer = make(seed=5)
        checkpoint.restore(outcome.path, other, other_optimizer, position=POSITION)
        assert torch.get_rng_state().equal(torch.manual_seed(number).get_state())
    checkpoints.close()


def test_what_is_under_way_is_waited_for_at_the_end(tmp_path, held):
    module, optimizer = make()
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=3, asynchronous=True)
    checkpoints.save(1, module, optimizer, position=POSITION)
    threading.Timer(0.2, held.set).start()
    checkpoints.close()
    assert checkpoint.newest(tmp_path) == (tmp_path / "step_00000001", [])


def test_an_error_of_the_thread_is_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_save_tensors", lambda *_: 1 / 0)
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=3, asynchronous=True)
    checkpoints.save(1, *make(), position=POSITION)
    with pytest.raises(ZeroDivisionError):
        checkpoints.outcome(wait=True)
    checkpoints.close()


def asynchronous(images, tmp_path, *more):
    return tiny_config(
        images, tmp_path, "checkpoint={asynchronous: true, every: 1, keep: 9}", *more
    )


def all_saved(folder):
    return {path.name: saved_tensors(path) for path in checkpoint.complete(folder / "checkpoints")}


def test_a_run_saves_the_same(images, tmp_path):
    every = "checkpoint={asynchronous: false, every: 1, keep: 9}"
    expected = all_saved(train(tiny_config(images, tmp_path, every, "name=waits")))
    found = all_saved(train(asynchronous(images, tmp_path)))
    assert list(found) == list(expected) == [f"step_{number:08d}" for number in range(1, 7)]
    for name, tensors in expected.items():
        assert_same_tensors(found[name], tensors)


def test_a_run_that_fails_finishes_what_is_under_way_and_goes_on_from_it(
    images, tmp_path, monkeypatch
):
    expected = all_saved(train(asynchronous(images, tmp_path, "name=whole")))
    real = Run.train_step

    def train_step(run):
        if run.step == 3:
            raise KeyError("the machine went away")
        real(run)

    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(Run, "train_step", train_step)
        train(asynchronous(images, tmp_path))
    saved = tmp_path / "tiny" / "checkpoints"
    assert checkpoint.newest(saved) == (saved / "step_00000003", [])
    folder = train(load(str(tmp_path / "tiny" / "config.yaml")), resume=True)
    assert_same_tensors(all_saved(folder)["step_00000006"], expected["step_00000006"])


def train_in_ranks(config):
    loop.write_report = lambda folder: None
    return train(config)


def test_two_ranks_save_the_same(gloo_pool, images, tmp_path):
    every = "checkpoint={asynchronous: false, every: 1, keep: 9}"
    gloo_pool.run(train_in_ranks, 2, tiny_config(images, tmp_path, every, "name=waits"))
    gloo_pool.run(train_in_ranks, 2, asynchronous(images, tmp_path))
    expected, found = all_saved(tmp_path / "waits"), all_saved(tmp_path / "tiny")
    assert list(found) == list(expected) == [f"step_{number:08d}" for number in range(1, 7)]
    for name, tensors in expected.items():
        assert_same_tensors(found[name], tensors)


def test_copies_on_the_cpu_are_written_without_asking_for_a_gpu(tmp_path, monkeypatch):
    """torch's writer looks ahead on the current GPU wherever there is one: the first, in a thread
    of whatever rank."""
    asked, real = [], checkpoint._Writer

    def writer(path, **options):
        asked.append(options)
        return real(path, **options)

    monkeypatch.setattr(checkpoint, "_Writer", writer)
    checkpoint._save_tensors(tmp_path / "saved", {"model": {"weight": torch.ones(2)}}, None)
    assert asked == [{"per_thread_copy_ahead": 0}]


def test_generators_of_a_gpu_that_is_not_used_are_left_alone(monkeypatch):
    def get_rng_state():
        raise AssertionError("a context was made")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_rng_state", get_rng_state)
    assert "cuda" not in rng_state()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.zeros(16, dtype=torch.uint8))
    assert "cuda" in rng_state()
