"""Every logger gets the same lines, drops what a resumed run writes again, and may be missing."""

import csv
import json
import math
import sys
import types

import numpy as np
import pytest
from PIL import Image

from fastssl.training.config import Config, LogConfig
from fastssl.training.loggers import Csv, JsonLines, open_loggers, require
from fastssl.training.loop import train
from tests.training.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("no_report")


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def events_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def test_lines_continue_where_a_resumed_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path, 0)
    for step in (1, 2, 3):
        log.write(step, "train", {"loss": float(step)})
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 1, "ki')  # cut short by a crash
    log = JsonLines(path, 2)
    log.write(3, "train", {"loss": math.nan})
    log.write(3, "eval", {"knn": 1.0})
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"step": 1, "kind": "train", "loss": 1.0},
        {"step": 2, "kind": "train", "loss": 2.0},
        {"step": 3, "kind": "train", "loss": None},
        {"step": 3, "kind": "eval", "knn": 1.0},
    ]


def test_a_table_for_each_kind_grows_by_columns(tmp_path):
    log = Csv(tmp_path, 0)
    log.write(1, "train", {"loss": 0.5, "lr": 1e-3})
    log.write(1, "eval", {"knn": 50.0})
    log.write(2, "train", {"loss": 0.25, "lr": 2e-3, "mfu": 0.4})
    log.write(3, "train", {"lr": 3e-3, "loss": math.inf})
    log.close()
    assert (tmp_path / "metrics_train.csv").read_text() == (
        "step,loss,lr,mfu\n1,0.5,0.001,\n2,0.25,0.002,0.4\n3,inf,0.003,\n"
    )
    assert (tmp_path / "metrics_eval.csv").read_text() == "step,knn\n1,50.0\n"


def test_tables_continue_where_a_resumed_run_goes_on(tmp_path):
    log = Csv(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, "train", {"loss": float(step)})
    with open(tmp_path / "metrics_train.csv", "a") as file:
        file.write("1,0.")  # cut short by a crash
    log = Csv(tmp_path, 2)
    log.write(3, "train", {"loss": 30.0, "mfu": 0.5})
    expected = [("1", "1.0", ""), ("2", "2.0", ""), ("3", "30.0", "0.5")]
    rows = rows_of(tmp_path / "metrics_train.csv")
    assert [(row["step"], row["loss"], row["mfu"]) for row in rows] == expected


def test_a_table_whose_header_was_cut_short_starts_anew(tmp_path):
    (tmp_path / "metrics_train.csv").write_text("step,lo")
    Csv(tmp_path, 5).write(6, "train", {"loss": 1.0})
    assert (tmp_path / "metrics_train.csv").read_text() == "step,loss\n6,1.0\n"


def test_a_run_fills_all_of_them_alike(images, tmp_path):
    config = tiny_config(
        images, tmp_path, "train.steps=2", "log={every: 1, csv: true, tensorboard: true}"
    )
    folder = train(config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["kind"]) for line in lines] == [
        (0, "eval"), (1, "train"), (2, "train"), (2, "eval")
    ]  # fmt: skip
    events = events_of(folder / "tensorboard")
    for kind in ("train", "eval"):
        of_kind = [line for line in lines if line["kind"] == kind]
        rows = rows_of(folder / f"metrics_{kind}.csv")
        for name in set(of_kind[0]) - {"kind", "step"}:
            expected = [(line["step"], line[name]) for line in of_kind]
            assert [(int(row["step"]), float(row[name])) for row in rows] == expected
            shown = [(event.step, event.value) for event in events.Scalars(f"{kind}/{name}")]
            assert shown == [(step, pytest.approx(value)) for step, value in expected]
    pictures = events.Images("reconstructions")
    assert [event.step for event in pictures] == [0, 2]
    with Image.open(folder / "reconstructions.png") as sheet:
        assert (pictures[1].width, pictures[1].height) == sheet.size


class FakeRun:
    def __init__(self, given):
        self.given, self.id = given, given["id"] or "abc123"
        self.logged, self.axes, self.finished = [], [], False

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A module with what is used of wandb; `runs` are those that were begun."""
    module = types.ModuleType("wandb")
    module.runs = []
    module.Error = type("Error", (Exception,), {})
    module.Image = lambda path: ("image", path)

    def init(**given):
        module.runs.append(FakeRun(given))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_weights_and_biases_gets_the_run(images, tmp_path, wandb):
    config = tiny_config(images, tmp_path, "train.steps=2", "log.wandb=true", "name=seen")
    folder = train(config)
    (run,) = wandb.runs
    assert run.given["name"] == "seen" and run.given["dir"] == str(folder)
    assert run.given["config"]["train"]["steps"] == 2
    assert ("*", "step") in run.axes and run.finished
    losses = [(v["step"], v["train/loss"]) for v in run.logged if "train/loss" in v]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses == [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
    assert [v["step"] for v in run.logged if "eval/knn" in v] == [0, 2]
    picture = ("image", str(folder / "reconstructions.png"))
    assert [v["reconstructions"] for v in run.logged if "reconstructions" in v] == [picture] * 2

    train(config, resume=True)
    assert [run.given["id"] for run in wandb.runs] == [None, "abc123"], "the same run there"


def test_what_weights_and_biases_refuses_is_said(images, tmp_path, wandb):
    def init(**given):
        raise wandb.Error("no API key")

    wandb.init = init
    with pytest.raises(ValueError, match=r"log\.wandb=true: no API key \(WANDB_MODE=offline"):
        train(tiny_config(images, tmp_path, "log.wandb=true"))


def test_a_package_that_is_missing_is_named_before_anything_is_deleted(
    images, tmp_path, monkeypatch
):
    folder = train(tiny_config(images, tmp_path, "train.steps=1"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"log\.wandb=true needs wandb: .*'fastssl\[wandb\]'"):
        train(tiny_config(images, tmp_path, "log.wandb=true", "overwrite=true"))
    assert (folder / "metrics.jsonl").is_file()
    require(LogConfig(tensorboard=False))


def test_pictures_keep_their_colours(tmp_path):
    config = Config(log=LogConfig(tensorboard=True))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    loggers = open_loggers(config, tmp_path, 0)
    for logger in loggers:
        logger.picture(3, "reconstructions", tmp_path / "p.png")
        logger.close()
    (event,) = events_of(tmp_path / "tensorboard").Images("reconstructions")
    (tmp_path / "shown.png").write_bytes(event.encoded_image_string)
    with Image.open(tmp_path / "shown.png") as shown:
        np.testing.assert_array_equal(np.asarray(shown.convert("RGB")), pixels)
