"""A disk that fails while a run saves: the run goes on, and the checkpoint before stays good."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from fastssl import cli
from fastssl.training import checkpoint, checkpoint_files, loop
from fastssl.training.checkpoint import Checkpoints
from fastssl.training.config import dump, load
from fastssl.training.loop import train
from fastssl.training.report import read_metrics
from tests.training.tiny import assert_same_tensors, make_images, saved_tensors, tiny_config

REPOSITORY = Path(__file__).parents[2]


@contextmanager
def no_file_larger_than(size):
    """What the system refuses to write is an OSError like that of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fail_at(patch, steps, size=2000, rank=None):
    """Saves of these steps find a disk that takes files of up to `size` bytes only."""
    real = Checkpoints._write

    def write(self, tensors, generators, state):
        if state["step"] not in steps or (rank is not None and dist.get_rank() != rank):
            return real(self, tensors, generators, state)
        with no_file_larger_than(size):
            return real(self, tensors, generators, state)

    patch.setattr(Checkpoints, "_write", write)


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# A file of tensors takes some 60,000 bytes, one of generators 20,000.
@pytest.mark.parametrize("size", [2000, 30_000])
@pytest.mark.parametrize("asynchronous", ["false", "true"])
@pytest.mark.usefixtures("no_report")
def test_a_save_that_fails_leaves_the_one_before_and_the_run(
    images, tmp_path, monkeypatch, capsys, asynchronous, size
):
    fail_at(monkeypatch, {4}, size)
    more = ["train.steps=5", f"checkpoint.asynchronous={asynchronous}"]
    folder = train(tiny_config(images, tmp_path, *more))
    out = capsys.readouterr().out
    assert "warning: step 4 could not be saved: [Errno 27] File too large" in out
    assert "step 2 is saved and good, and the run goes on" in out
    assert names(folder) == ["latest", "step_00000002", "step_00000005"]
    for name in names(folder):
        assert checkpoint.why_not_whole(folder / "checkpoints" / name) is None
    monkeypatch.undo()
    monkeypatch.setattr(loop, "write_report", lambda folder: None)
    undisturbed = train(tiny_config(images, tmp_path, *more, "name=undisturbed"))
    ours, theirs = (saved_tensors(f / "checkpoints/step_00000005") for f in (folder, undisturbed))
    assert_same_tensors(ours, theirs)


@pytest.mark.parametrize("function", ["make_anew", "write_state", "publish", "checksums"])
@pytest.mark.usefixtures("no_report")
def test_wherever_it_fails(images, tmp_path, monkeypatch, capsys, function):
    """No folder, no last file, no name, and one that cannot be read again."""
    real, calls = getattr(checkpoint_files, function), []

    def fail_the_second_time(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(checkpoint_files, function, fail_the_second_time)
    folder = train(tiny_config(images, tmp_path, "train.steps=6"))
    assert "step 4 could not be saved: [Errno 28] No space left" in capsys.readouterr().out
    assert names(folder) == ["latest", "step_00000002", "step_00000006"]


@pytest.mark.usefixtures("no_report")
def test_the_last_save_must_not_fail(images, tmp_path, monkeypatch, capsys):
    fail_at(monkeypatch, {6})
    file = tmp_path / "run.yaml"
    file.write_text(dump(tiny_config(images, tmp_path)))
    assert cli.main([str(file)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        "fastssl-train: error: the last step, 6, could not be saved: [Errno 27] File too large; "
        "--resume goes on after step 4"
    )
    assert (tmp_path / "tiny" / "weights.pth").is_file(), "the smaller file is tried all the same"
    monkeypatch.undo()
    monkeypatch.setattr(loop, "write_report", lambda folder: None)
    assert cli.main([str(file), "--resume"]) == 0
    assert names(tmp_path / "tiny") == ["latest", "step_00000004", "step_00000006"]


def train_with_a_full_disk(config, rank):
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, {4}, rank=rank)
        patch.setattr(loop, "write_report", lambda folder: None)
        train(config)
    return dist.get_rank()


@pytest.mark.parametrize("asynchronous", ["false", "true"])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_disk_of_one_rank_is_that_of_all(gloo_pool, images, tmp_path, asynchronous, rank):
    config = tiny_config(images, tmp_path, f"checkpoint.asynchronous={asynchronous}")
    assert gloo_pool.run(train_with_a_full_disk, 2, config, rank) == [0, 1]
    assert names(tmp_path / "tiny") == ["latest", "step_00000002", "step_00000006"]


@pytest.mark.usefixtures("no_report")
def test_metrics_that_cannot_be_written_are_said_once(images, tmp_path, monkeypatch, capsys):
    real = loop.Run.train_step

    def train_step(run):
        full = 3 <= run.step < 5
        file = run.log._loggers[0]._file.fileno()
        if full and not hasattr(run, "spare"):
            run.spare = os.dup(file)
            os.dup2(os.open("/dev/full", os.O_WRONLY), file)
        elif not full and hasattr(run, "spare"):
            os.dup2(run.spare, file)
            del run.spare
        real(run)

    monkeypatch.setattr(loop.Run, "train_step", train_step)
    folder = train(tiny_config(images, tmp_path, "checkpoint.every=0"))
    out = capsys.readouterr().out
    assert out.count("the metrics of step 4 could not be written: [Errno 28] No space left") == 1
    assert "the metrics of step 5" not in out
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")[0]] == [*range(1, 7)]


FILLS = """
import sys
from pathlib import Path
from fastssl import cli
from fastssl.training.loop import Run

disk, real = Path(sys.argv[1]), Run.train_step

def train_step(run):
    filler = disk / "filler"
    if run.step == 2:  # after the first checkpoint
        try:
            with open(filler, "wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        except OSError:
            pass
    if run.step == 5:
        run.learn_outcome(wait=True)  # of the save after step 4
        filler.unlink()
    real(run)

Run.train_step = train_step
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["false", "true"])
@pytest.mark.parametrize("tensorboard", ["false", "true"])
def test_a_disk_that_is_full_for_a_while(tmp_path, asynchronous, tensorboard):
    """A real one: from step 2 to 5 of 8 not one byte is free."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small disk")
    try:
        images = make_images(tmp_path / "images")
        config = tiny_config(images, tmp_path, "train.steps=8", "name=run")
        config.out = str(disk / "runs")
        config.eval.max_images = 0
        config.log.tensorboard = tensorboard == "true"
        config.checkpoint.asynchronous = asynchronous == "true"
        file = tmp_path / "run.yaml"
        file.write_text(dump(config))
        done = subprocess.run(
            [sys.executable, "-c", FILLS, str(disk), str(file)],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "step 4 could not be saved: [Errno 28] No space left on device" in done.stdout
        folder = disk / "runs" / "run"
        assert names(folder) == ["latest", "step_00000006", "step_00000008"]
        assert load(str(folder / "config.yaml")).name == "run"
        ours = saved_tensors(folder / "checkpoints" / "step_00000008")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    undisturbed = train(tiny_config(images, tmp_path, "train.steps=8", "eval.max_images=0"))
    assert_same_tensors(ours, saved_tensors(undisturbed / "checkpoints" / "step_00000008"))
