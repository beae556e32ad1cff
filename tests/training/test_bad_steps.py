"""Steps that are not finite, in the loop: skipped, counted, and a run ended where they last."""

from __future__ import annotations

import pytest

from fastssl.training import checkpoint
from fastssl.training.loop import Run, train
from fastssl.training.report import read_metrics
from fastssl.training.watch import NonFiniteError
from tests.training.tiny import assert_same_tensors, saved_tensors, tiny_config

pytestmark = pytest.mark.usefixtures("no_report")


def spoil(monkeypatch, what, steps):
    """The loss, the gradient or the parameters are not finite in these steps."""
    real = Run.train_step

    def train_step(run):
        model = run.method.model
        if run.step + 1 in steps:
            if what == "parameters":
                model.decoder_pred.bias.data.fill_(float("nan"))
            handle = (
                model.decoder_pred.bias.register_hook(lambda grad: grad * float("inf"))
                if what == "gradient"
                else model.decoder_pred.register_forward_hook(lambda *a: a[2] + float("nan"))
            )
            real(run)
            handle.remove()
        else:
            real(run)

    monkeypatch.setattr(Run, "train_step", train_step)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(images, tmp_path, monkeypatch, what):
    spoil(monkeypatch, what, {3})
    folder = train(tiny_config(images, tmp_path, "train.steps=5"))
    lines, _ = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line.get("skipped_steps", 0) for line in lines] == [0, 0, 1, 1, 1]
    assert "loss" not in lines[2] and all("loss" in line for line in lines if line["step"] != 3)
    for tensor in saved_tensors(checkpoint.complete(folder / "checkpoints")[-1]).values():
        assert tensor.isfinite().all()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_skipped_step_leaves_the_parameters_alone(images, tmp_path, monkeypatch, what):
    train(tiny_config(images, tmp_path, "train.steps=4", "checkpoint.every=2"))
    kept = checkpoint.complete(tmp_path / "tiny" / "checkpoints")
    expected = saved_tensors(kept[0])
    spoil(monkeypatch, what, {3, 4})
    train(tiny_config(images, tmp_path, "train.steps=4", "overwrite=true"))
    got = saved_tensors(checkpoint.complete(tmp_path / "tiny" / "checkpoints")[-1])
    assert_same_tensors(got, expected)


def test_many_bad_steps_in_a_row_stop_the_run(images, tmp_path, monkeypatch):
    spoil(monkeypatch, "loss", {4, 5, 6})
    with pytest.raises(NonFiniteError) as error:
        train(tiny_config(images, tmp_path, "train.max_bad_steps=2", "log.every=100"))
    for part in (
        "not finite at step 5: loss nan, grad_norm nan. The 2 last steps were skipped; step 5 is "
        "saved and finite",
        "--resume",
        "schedules.lr",
    ):
        assert part in str(error.value)
    saved = checkpoint.complete(tmp_path / "tiny" / "checkpoints")
    assert [path.name for path in saved] == ["step_00000002", "step_00000005"]
    for tensor in saved_tensors(saved[-1]).values():
        assert tensor.isfinite().all()


def test_parameters_that_are_not_finite_are_not_saved(images, tmp_path, monkeypatch):
    spoil(monkeypatch, "parameters", {4})
    with pytest.raises(NonFiniteError, match="step 2 is saved and finite"):
        train(tiny_config(images, tmp_path, "train.max_bad_steps=3", "checkpoint.every=2"))
    saved = checkpoint.complete(tmp_path / "tiny" / "checkpoints")
    assert [path.name for path in saved] == ["step_00000002"]
