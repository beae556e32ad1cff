"""The loop: what a run leaves, and that stopping and going on changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from fastssl import nn
from fastssl.data import loader
from fastssl.training import checkpoint, loop, setup
from fastssl.training.config import load
from fastssl.training.loop import Run, train
from fastssl.training.report import read_metrics
from tests.training.tiny import (
    DINO,
    DROPPING,
    HIERA,
    VIT,
    assert_same_tensors,
    make_images,
    saved_tensors,
    tiny_config,
)

pytestmark = pytest.mark.usefixtures("no_report")


def lines_of(folder, kind="train"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def trained(folder):
    """Step, loss and gradient norm of each line: what must not depend on interruptions."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines_of(folder)]


def interrupt(monkeypatch, after_step, how):
    """Let something happen within the training step `after_step`, once."""
    real = Run.train_step

    def train_step(run):
        real(run)
        if run.step == after_step:
            how()

    monkeypatch.setattr(Run, "train_step", train_step)


def crash():
    raise KeyError("the machine went away")


def stop_signal():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    config = tiny_config(images, tmp_path_factory.mktemp("runs"), "name=whole", "eval.every=3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_report", lambda folder: None)
        return train(config)


def test_every_step_and_evaluation_is_in_the_metrics(uninterrupted):
    train_lines, evals = lines_of(uninterrupted), lines_of(uninterrupted, "eval")
    assert [line["step"] for line in train_lines] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in evals] == [0, 3, 6]
    for line in train_lines:
        assert line["loss"] > 0 and line["grad_norm"] > 0 and line["images_per_second"] > 0
        assert 0 <= line["data_wait"] <= 1 and line["peak_memory_mb"] > 50
    # base 0.05 per 256 images, 8 of them; 2 of 6 steps warm-up, then a cosine to 0.
    peak = 0.05 * 8 / 256
    half = [0.0, 0.5, 1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]
    assert [line["lr"] for line in train_lines] == pytest.approx([peak * h for h in half])
    assert train_lines[0]["weight_decay"] == 0.1
    assert train_lines[3]["weight_decay"] == pytest.approx(0.15)
    assert all(0 <= line["knn"] <= 100 and 0 <= line["linear"] <= 100 for line in evals)


def test_evaluation_does_not_touch_training(images, tmp_path, uninterrupted):
    folder = train(tiny_config(images, tmp_path, "name=bare", "eval.max_images=0"))
    assert lines_of(folder, "eval") == []
    # Without held-out halves the crops differ; the number of evaluations must not matter.
    often = train(tiny_config(images, tmp_path, "name=often", "eval.every=1"))
    assert trained(often) == trained(uninterrupted)
    last = "checkpoints/step_00000006"
    assert_same_tensors(saved_tensors(often / last), saved_tensors(uninterrupted / last))


@pytest.mark.parametrize(
    "how, after_step", [(crash, 3), (crash, 4), (stop_signal, 3), (stop_signal, 1), (crash, 1)]
)
def test_interrupted_and_resumed_is_bit_identical(
    images, tmp_path, monkeypatch, capsys, uninterrupted, how, after_step
):
    config = tiny_config(images, tmp_path, "eval.every=3")
    with monkeypatch.context() as patch:
        interrupt(patch, after_step, how)
        if how is crash:
            with pytest.raises(KeyError):
                train(config)
        else:
            folder = train(config)
            assert [p.name for p in checkpoint.complete(folder / "checkpoints")][-1] == (
                f"step_{after_step:08d}"
            )
            assert f"stopped after step {after_step} of 6; go on with: fastssl-train " in (
                capsys.readouterr().out
            )
    torch.rand(5)
    folder = train(load(str(tmp_path / "tiny" / "config.yaml")), resume=True)
    last = "checkpoints/step_00000006"
    assert_same_tensors(saved_tensors(folder / last), saved_tensors(uninterrupted / last))
    assert trained(folder) == trained(uninterrupted)
    ours, theirs = lines_of(folder, "eval"), lines_of(uninterrupted, "eval")
    assert ours == theirs


def test_stochastic_depth_resumes_with_its_random_numbers(images, tmp_path, monkeypatch):
    modes = []

    def careless_evaluate(features, *args, **kwargs):
        modes.append(features.__self__.method.training)
        torch.rand(3)
        return {"knn": 0.0, "linear": 0.0}

    drop = [*HIERA, "model.args.drop_path_rate=0.5"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", careless_evaluate)
        whole = train(tiny_config(images, tmp_path, "name=whole", "eval.every=1", model=drop))
    assert modes == [False] * 7
    config = tiny_config(images, tmp_path, "name=parts", model=drop)
    with monkeypatch.context() as patch:
        interrupt(patch, 3, crash)
        with pytest.raises(KeyError):
            train(config)
    parts = train(config, resume=True)
    assert trained(parts) == trained(whole)
    last = "checkpoints/step_00000006"
    assert_same_tensors(saved_tensors(parts / last), saved_tensors(whole / last))


def train_in_ranks(config, resume, stop_at):
    """The loop in a rank of the pool, which rank 0 alone is asked to stop after a step."""
    loop.write_report = lambda folder: None
    if stop_at:
        real = Run.train_step

        def train_step(run):
            real(run)
            if run.step == stop_at and run.world.is_main:
                os.kill(os.getpid(), signal.SIGTERM)

        Run.train_step = train_step
    try:
        return train(config, resume=resume)
    finally:
        if stop_at:
            Run.train_step = real


def test_two_ranks_stop_together_and_resume_bit_identically(
    gloo_pool, images, tmp_path, uninterrupted
):
    whole = tiny_config(images, tmp_path, "name=whole", "eval.every=3")
    gloo_pool.run(train_in_ranks, 2, whole, False, 0)
    parts = tiny_config(images, tmp_path, "name=parts", "eval.every=3")
    gloo_pool.run(train_in_ranks, 2, parts, False, 3)
    saved = checkpoint.complete(tmp_path / "parts" / "checkpoints")
    assert saved[-1].name == "step_00000003"
    assert {p.name for p in saved[-1].glob("rank_*")} == {"rank_0.json", "rank_1.json"}
    gloo_pool.run(train_in_ranks, 2, parts, True, 0)

    last = "checkpoints/step_00000006"
    expected = saved_tensors(tmp_path / "whole" / last)
    assert_same_tensors(saved_tensors(tmp_path / "parts" / last), expected)
    assert trained(tmp_path / "parts") == trained(tmp_path / "whole")
    # And it is the run of one process, up to the order of sums.
    for name, tensor in saved_tensors(uninterrupted / last).items():
        torch.testing.assert_close(expected[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    for key in ("knn", "linear", "rankme"):
        ours = [line[key] for line in lines_of(tmp_path / "whole", "eval")]
        assert ours == pytest.approx([line[key] for line in lines_of(uninterrupted, "eval")], 1e-3)


def test_two_ranks_go_on_with_what_one_saved(
    gloo_pool, images, tmp_path, monkeypatch, uninterrupted
):
    config = tiny_config(images, tmp_path)
    with monkeypatch.context() as patch:
        interrupt(patch, 3, stop_signal)
        train(config)
    gloo_pool.run(train_in_ranks, 2, config, True, 0)
    last = "checkpoints/step_00000006"
    ours = saved_tensors(tmp_path / "tiny" / last)
    for name, tensor in saved_tensors(uninterrupted / last).items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mae", "dino"])
def test_a_run_goes_on_from_two_ranks_to_two_copies_of_two_to_one(
    gloo_pool, images, tmp_path, method
):
    model = {"mae": VIT, "dino": DINO}[method]
    whole = tiny_config(images, tmp_path, "name=whole", model=model)
    gloo_pool.run(train_in_ranks, 1, whole, False, 0)
    for ranks, shard_ranks, stop_at in ((2, 0, 2), (4, 2, 4), (1, 0, 0)):
        config = tiny_config(images, tmp_path, f"train.shard_ranks={shard_ranks}", model=model)
        gloo_pool.run(train_in_ranks, ranks, config, stop_at > 2 or not stop_at, stop_at)
        saved = checkpoint.complete(tmp_path / "tiny" / "checkpoints")[-1]
        assert saved.name == f"step_{stop_at or 6:08d}"
        assert len([*saved.glob("rank_*.json")]) == ranks
    expected = saved_tensors(tmp_path / "whole/checkpoints/step_00000006")
    got = saved_tensors(saved)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("steps", [4, 9])
def test_a_warm_up_that_outlasts_the_run_is_said(images, tmp_path, capsys, steps):
    train(tiny_config(images, tmp_path, f"schedules.lr.warmup_steps={steps}"))
    said = f"warning: the warm-up of the learning rate takes {steps} steps"
    assert (said in capsys.readouterr().out) == (steps > 6)


def test_a_finished_run_that_is_resumed_stays_as_it_is(images, tmp_path):
    config = tiny_config(images, tmp_path)
    folder = train(config)
    before = (folder / "metrics.jsonl").read_text()
    train(config, resume=True)
    assert (folder / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("model", [VIT, DROPPING], ids=["mae", "dropping"])
def test_accumulation_equals_the_big_batch(images, tmp_path, model):
    big = train(tiny_config(images, tmp_path, "name=big", model=model))
    small = train(tiny_config(images, tmp_path, "name=small", "train.accumulation=4", model=model))
    for ours, theirs in zip(trained(small), trained(big), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    last = "checkpoints/step_00000006"
    expected = saved_tensors(big / last)
    for name, tensor in saved_tensors(small / last).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_loop_keys_stochastic_depth(images, tmp_path, monkeypatch):
    plain = trained(train(tiny_config(images, tmp_path, "name=plain", model=DINO)))
    real, seen = nn.DropPath.draw, []

    def draw(path, x, uniform=None):
        if path.is_active:
            seen.append((uniform < 1 - path.drop_prob).tolist())
        return real(path, x, uniform)

    monkeypatch.setattr(nn.DropPath, "draw", draw)
    dropping = trained(train(tiny_config(images, tmp_path, "name=dropping", model=DROPPING)))
    kept = [k for decisions in seen for k in decisions]
    # 6 steps, 2 branches of the block that drops, 8 samples, 2 views of one size and 1 of another.
    assert len(kept) == 6 * 2 * 8 * 3
    assert 0.8 < sum(kept) / len(kept) < 1
    assert dropping != plain


def test_workers_draw_the_same_batches(images, tmp_path, uninterrupted):
    config = tiny_config(images, tmp_path, "name=workers", "loader.num_workers=1", "eval.every=3")
    folder = train(config)
    assert trained(folder) == trained(uninterrupted)


def test_bf16_trains_close_to_fp32_and_keeps_fp32_parameters(images, tmp_path, uninterrupted):
    folder = train(tiny_config(images, tmp_path, "train.precision=bf16", "eval.every=3"))
    losses = [line[1] for line in trained(folder)]
    expected = [line[1] for line in trained(uninterrupted)]
    assert losses != expected
    assert losses == pytest.approx(expected, rel=0.02)
    tensors = saved_tensors(folder / "checkpoints/step_00000006")
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_an_existing_run_is_not_touched(images, tmp_path):
    config = tiny_config(images, tmp_path, "train.steps=2")
    folder = train(config)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(FileExistsError) as error:
        train(config)
    for part in (str(folder), "--resume", "overwrite=true", "name="):
        assert part in str(error.value)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_overwrite_starts_anew_but_not_before_the_configuration_is_good(images, tmp_path):
    folder = train(tiny_config(images, tmp_path, "train.steps=2"))
    bads = ["data=/nowhere", "model.args.nothing=1", "train.accumulation=3", "train.steps=-1"]
    for bad in (*bads, "loader.num_workers=-1", "eval.crops=0", "optim.lr_reference_batch=0"):
        with pytest.raises(ValueError):
            train(tiny_config(images, tmp_path, "overwrite=true", bad))
    assert len(lines_of(folder)) == 2
    train(tiny_config(images, tmp_path, "overwrite=true", "train.steps=1", "checkpoint.every=0"))
    assert len(lines_of(folder)) == 1
    saved = checkpoint.complete(folder / "checkpoints")
    assert [path.name for path in saved] == ["step_00000001"]


def test_a_folder_that_is_no_run_is_never_deleted(images, tmp_path):
    mine = tmp_path / "tiny" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    with pytest.raises(FileExistsError, match="exists and is no run"):
        train(tiny_config(images, tmp_path, "overwrite=true"))
    assert mine.read_text() == "years of work"


def test_resume_without_a_run_starts_one(images, tmp_path):
    folder = train(tiny_config(images, tmp_path, "train.steps=1"), resume=True)
    assert [line["step"] for line in lines_of(folder)] == [1]


def test_resume_with_another_batch_is_refused(images, tmp_path):
    train(tiny_config(images, tmp_path, "train.steps=2"))
    with pytest.raises(ValueError, match=r"train.global_batch_size must be 8 to resume .* got 4"):
        train(tiny_config(images, tmp_path, "train.global_batch_size=4"), resume=True)


def test_a_resume_that_is_refused_changes_nothing(images, tmp_path):
    folder = train(tiny_config(images, tmp_path, "train.steps=2"))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for other in ("seed=5", "model.args.depth=1", "model.args.depth=3"):
        with pytest.raises(ValueError, match=r"to resume|does not fit the checkpoint"):
            train(tiny_config(images, tmp_path, "train.steps=4", other), resume=True)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_the_configuration_of_a_run_means_that_run_from_anywhere(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = train(tiny_config(images, Path("runs"), "train.steps=2", "overwrite=true"))
    assert folder == Path("runs/tiny")
    monkeypatch.chdir(tmp_path / "runs" / "tiny")
    config = load("config.yaml", ["train.steps=3"])
    assert not config.overwrite
    train(config, resume=True)
    assert [line["step"] for line in lines_of(tmp_path / "runs/tiny")] == [1, 2, 3]


def test_broken_files_are_still_known_after_a_resume(images, tmp_path):
    mine = tmp_path / "images"
    shutil.copytree(images, mine)
    (mine / "broken.png").write_text("no image")
    config = tiny_config(mine, tmp_path, "train.steps=3")
    folder = train(config)
    skipped = (folder / "skipped.json").read_text()
    assert "broken.png" in skipped
    train(config, resume=True)
    assert (folder / "skipped.json").read_text() == skipped


def test_signals_are_what_they_were_after_the_run(images, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    train(tiny_config(images, tmp_path, "train.steps=1"))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_signal_ends_a_process_alone_at_once(images, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    interrupt(monkeypatch, 2, twice)
    # A shell lets what it starts in the background ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(images, tmp_path))
    finally:
        signal.signal(signal.SIGINT, before)


def test_weights_to_start_from_are_loaded(images, tmp_path, capsys):
    source = train(tiny_config(images, tmp_path, "name=source", "train.steps=2"))
    weights = source / "weights.pth"
    config = tiny_config(images, tmp_path, "seed=3", "train.steps=0", f"model.weights={weights}")
    folder = train(config)
    assert f"tensors from {weights}" in capsys.readouterr().out
    kept, loaded = (torch.load(path / "weights.pth")["model"] for path in (source, folder))
    assert_same_tensors(kept, loaded)
    assert checkpoint.complete(folder / "checkpoints") == []
    assert lines_of(folder, "eval")[0]["rankme"] == lines_of(source, "eval")[-1]["rankme"]


@pytest.mark.slow
def test_compiled_training_agrees_with_eager(images, tmp_path, uninterrupted):
    folder = train(tiny_config(images, tmp_path, "train.compile=true", "eval.every=3"))
    for ours, theirs in zip(trained(folder), trained(uninterrupted), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_device_batch_size_is_an_accumulation(images, tmp_path, capsys):
    config = tiny_config(images, tmp_path, "train.steps=2", "train.device_batch_size=2")
    folder = train(config)
    assert (
        "global batch 8 = 1 ranks x 4 micro-batches x 2 images a device" in capsys.readouterr().out
    )
    got = saved_tensors(checkpoint.complete(folder / "checkpoints")[-1])
    train(tiny_config(images, tmp_path, "train.steps=2", "train.accumulation=4", "overwrite=true"))
    assert_same_tensors(got, saved_tensors(checkpoint.complete(folder / "checkpoints")[-1]))


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.device_batch_size=3", "multiple of ranks x train.device_batch_size = 1 x 3, got 8"),
        ("train.device_batch_size=16", "train.device_batch_size = 1 x 16, got 8"),
        ("train.accumulation=3", "multiple of ranks x train.accumulation = 1 x 3, got 8"),
    ],
)
def test_batch_sizes_that_do_not_fit_are_named(images, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_config(images, tmp_path, override))


def test_accumulation_and_device_batch_size_exclude_each_other(images, tmp_path):
    with pytest.raises(ValueError, match=r"train.accumulation must be left out"):
        tiny_config(images, tmp_path, "train.device_batch_size=2", "train.accumulation=2")


def test_labelled_images_judge_where_they_are_named(images, tmp_path):
    labelled = tmp_path / "labelled"
    for label in "ab":
        make_images(labelled / label, 5)
    config = tiny_config(images, tmp_path, "train.steps=2", f"eval.data={labelled}")
    folder = train(config)
    train_set, (learn, test) = setup.datasets(config)
    assert not train_set.held_out and (len(learn), len(test)) == (8, 2)
    evals = lines_of(folder, "eval")
    assert [line["step"] for line in evals] == [0, 2]
    assert all(0 <= line["knn"] <= 100 for line in evals)


def test_what_has_no_blocks_cannot_be_checkpointed(images, tmp_path):
    with pytest.raises(ValueError, match=r"train.grad_checkpointing: .*TinyEncoder has no blocks"):
        train(
            tiny_config(
                images,
                tmp_path,
                "train.grad_checkpointing=true",
                model=["method={name: rotation}", "model.name=tests.methods.checks:TinyEncoder"],
            )
        )


def test_views_made_where_the_run_trains_are_those_of_the_workers(
    images, tmp_path, no_report, monkeypatch
):
    made, losses = [], []
    real = loader.make_views
    monkeypatch.setattr(loader, "make_views", lambda *a, **k: made.append(1) or real(*a, **k))
    for name, where in (("there", "null"), ("here", "true")):
        more = [f"name={name}", f"loader.views_on_device={where}", "eval.max_images=0"]
        folder = train(tiny_config(images, tmp_path, "train.steps=3", *more))
        assert len(made) == (3 if name == "here" else 0)
        lines, _ = read_metrics(folder / "metrics.jsonl")
        losses.append([line["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
