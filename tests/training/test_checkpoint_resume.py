"""Runs that go on: from the newest whole checkpoint, or from one that is named."""

import json
import os
import shutil
from dataclasses import replace

import pytest

from fastssl import cli
from fastssl.training import checkpoint
from fastssl.training.config import dump
from fastssl.training.loop import Run, train
from fastssl.training.report import read_metrics
from tests.training.test_checkpoint_whole import damage
from tests.training.tiny import assert_same_tensors, saved_tensors, tiny_config

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def run(images, tmp_path):
    """Its configuration and folder: checkpoints after steps 2, 4 and 6."""
    config = tiny_config(images, tmp_path, "checkpoint.keep=3")
    return config, train(config)


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_damaged_checkpoint_is_skipped_and_written_again(run, capsys):
    config, folder = run
    saved = folder / "checkpoints"
    expected = saved_tensors(saved / "step_00000006")
    damage(saved / "step_00000006", "truncated tensors")
    damage(saved / "step_00000004", "a changed bit")
    capsys.readouterr()
    train(config, resume=True)
    out = capsys.readouterr().out
    assert f"skipping checkpoint {saved / 'step_00000006'}: __0_0.distcp has " in out
    assert f"skipping checkpoint {saved / 'step_00000004'}: __0_0.distcp does not have" in out
    assert "going on after step 2" in out
    assert f"is set aside as {saved / 'step_00000006.aside'}" in out
    assert names(folder) == ["latest", "step_00000002", "step_00000004", "step_00000006"]
    assert checkpoint.newest(saved) == (saved / "step_00000006", [])
    assert_same_tensors(saved_tensors(saved / "step_00000006"), expected)
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")[0]] == [*range(1, 7)]


def test_what_a_run_only_tells_people_may_be_damaged(run):
    config, folder = run
    (folder / "skipped.json").write_text("")
    train(config, resume=True)
    assert json.loads((folder / "skipped.json").read_text()) == {}


def test_a_disk_that_is_full_leaves_the_configuration_alone(run, monkeypatch):
    config, folder = run
    before = (folder / "config.yaml").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        train(config, resume=True)
    assert (folder / "config.yaml").read_bytes() == before


def test_damaged_checkpoints_do_not_push_out_good_ones(images, tmp_path):
    config = tiny_config(images, tmp_path, "train.steps=4", "checkpoint={every: 1, keep: 2}")
    folder = train(config)
    damage(folder / "checkpoints" / "step_00000004", "no tensors")
    config.train.steps = 3
    train(config, resume=True)
    assert names(folder) == ["latest", "step_00000003", "step_00000004.aside"]


def test_a_run_without_a_whole_checkpoint_does_not_start_anew(run, capsys, tmp_path):
    config, folder = run
    for path in checkpoint.complete(folder / "checkpoints"):
        damage(path, "no tensors")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    file = tmp_path / "run.yaml"
    file.write_text(dump(config))
    assert cli.main([str(file), "--resume"]) == 1
    error = capsys.readouterr().err
    assert "has no whole checkpoint to go on from (skipping checkpoint" in error
    assert "Traceback" not in error
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_run_goes_on_from_the_one_that_is_named(run, capsys):
    config, folder = run
    saved = folder / "checkpoints"
    expected = saved_tensors(saved / "step_00000006")
    train(config, resume=saved / "step_00000002")
    assert "going on after step 2" in capsys.readouterr().out
    assert_same_tensors(saved_tensors(saved / "step_00000006"), expected)
    assert names(folder) == ["latest", "step_00000002", "step_00000004", "step_00000006"]


def test_a_run_begins_from_a_checkpoint_of_another(run, images, tmp_path):
    _, folder = run
    before = names(folder)
    other = tiny_config(images, tmp_path, "name=other", "checkpoint.keep=3")
    fork = train(other, resume=folder / "checkpoints" / "step_00000002")
    own = [f"step_0000000{step}" for step in (2, 4, 6)]
    assert names(fork) == ["latest", *own] and names(folder) == before
    assert_same_tensors(
        *(saved_tensors(path / "checkpoints/step_00000006") for path in (fork, folder))
    )


def test_a_run_from_another_ones_checkpoint_is_gone_on_with(run, images, tmp_path, monkeypatch):
    """Though it dies before it has saved a step of its own."""
    _, folder = run
    more = ["name=other", "train.steps=8", "checkpoint.every=0", "schedules.lr.base=0.01"]
    other = tiny_config(images, tmp_path, *more)

    def dies(run):
        raise KeyError("the machine went away")

    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(Run, "train_step", dies)
        train(other, resume=folder / "checkpoints" / "step_00000004")
    assert names(tmp_path / "other") == ["latest", "step_00000004"]
    train(other, resume=True)
    assert [line["step"] for line in read_metrics(tmp_path / "other" / "metrics.jsonl")[0]] == [
        *range(5, 9)
    ]


def test_one_that_is_named_must_be_whole(run, tmp_path):
    config, folder = run
    damage(folder / "checkpoints" / "step_00000004", "truncated tensors")
    before = names(folder)
    with pytest.raises(ValueError, match=r"of .*step_00000004 __0_0.distcp has \d+ of"):
        train(config, resume=folder / "checkpoints" / "step_00000004")
    with pytest.raises(ValueError, match=r"--resume must name a whole checkpoint; of .*nowhere"):
        train(config, resume=tmp_path / "nowhere")
    assert names(folder) == before


def test_of_another_model_is_an_error_and_not_skipped(run, images, tmp_path):
    _, folder = run
    other = tiny_config(images, tmp_path, "checkpoint.keep=3", "model.args.embed_dim=32")
    before = names(folder)
    with pytest.raises(ValueError, match=r"does not fit the checkpoint .*step_00000006: .* there"):
        train(other, resume=True)
    assert names(folder) == before


def test_of_a_newer_version_is_an_error_and_not_skipped(run, monkeypatch):
    config, folder = run
    monkeypatch.setattr(checkpoint.files, "FORMAT", 2)
    train(replace(config, name="newer"))
    monkeypatch.undo()
    newer = folder.parent / "newer"
    shutil.copytree(newer / "checkpoints" / "step_00000006", folder / "checkpoints/step_00000008")
    with pytest.raises(ValueError, match=r"step_00000008 has format 2, written by fastssl .*"):
        train(config, resume=True)


@pytest.mark.parametrize(
    "words, resume",
    [
        ([], False),
        (["--resume"], True),
        (["--resume", "auto"], True),
        (["--resume=auto"], True),
        (["--resume", "runs/a/checkpoints/step_00000002"], "runs/a/checkpoints/step_00000002"),
        (["--resume", "runs/a/checkpoints/latest/"], "runs/a/checkpoints/latest"),
        (["--resume=anything"], "anything"),
        (["train.steps=3", "--resume", "seed=1"], True),
    ],
)
def test_the_word_after_resume(monkeypatch, words, resume):
    asked = []
    monkeypatch.setattr(
        "fastssl.training.loop.train", lambda c, resume, **_: asked.append((c, resume))
    )
    assert cli.main(["photos_dino", *words]) == 0
    if words[:1] == ["--resume"]:
        assert cli.main([*words, "photos_dino"]) == 0, "the recipe may come last"
    for config, given in asked:
        assert config.name == "photos_dino"
        assert given is resume if isinstance(resume, bool) else str(given) == resume
