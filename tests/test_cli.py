"""The command: a whole run from the outside, its help and its errors."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from fastssl import cli
from fastssl.training import recipes
from fastssl.training.config import Config, keys, load
from tests.training.tiny import VIT, assert_same_tensors, make_images, saved_tensors

REPOSITORY = Path(__file__).parents[1]


def arguments(images, out, *more):
    return [
        "photos",
        f"data={images}",
        f"out={out}",
        "name=first",
        *VIT,
        "train={steps: 4, global_batch_size: 8, device: cpu}",
        "schedules.lr.warmup_steps=1",
        "eval={every: 2, crops: 2, max_images: 3, pictures: 2}",
        "log.every=2",
        *more,
    ]


def test_a_run_leaves_everything_behind(tmp_path, capsys):
    images = make_images(tmp_path / "images")
    (images / "broken.png").write_bytes(b"not a picture")
    assert cli.main(arguments(images, tmp_path / "runs")) == 0
    folder = tmp_path / "runs" / "first"

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("eval", 0),
        ("train", 2),
        ("eval", 2),
        ("train", 4),
        ("eval", 4),
    ]
    config = load(str(folder / "config.yaml"))
    assert (config.train.steps, config.data) == (4, str(images))
    with Image.open(folder / "reconstructions.png") as picture:
        assert picture.width > picture.height > 100
    report = (folder / "report.html").read_text()
    assert "first" in report and "data:image/png;base64," in report and "<svg" in report
    assert any((folder / "tensorboard").glob("events.*"))
    assert (folder / "checkpoints" / "latest" / "state.json").is_file()
    assert [Path(name).name for name in json.loads((folder / "skipped.json").read_text())] == [
        "broken.png"
    ]

    out = capsys.readouterr().out
    for key, name in (("knn", "k-NN"), ("linear", "linear probe")):
        before, after = lines[0][key], lines[-1][key]
        assert re.search(
            rf"{name} +{before:.1f} % +{after:.1f} % +{re.escape(f'{after - before:+.1f}')}", out
        )
    assert re.search(r"\d+ images/s", out)
    assert f"report: {folder / 'report.html'}" in out
    assert f"1 broken files were skipped, see {folder / 'skipped.json'}" in out


def test_a_second_run_of_the_name_is_an_error_that_says_what_to_do(tmp_path, capsys):
    images = make_images(tmp_path / "images")
    words = arguments(images, tmp_path, "train.steps=1", "eval.max_images=0", "log.every=1")
    assert cli.main(words) == 0
    capsys.readouterr()
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastssl-train: error: run ")
    assert "--resume" in error and "overwrite=true" in error
    assert cli.main([*words, "--resume"]) == 0
    assert "the run begins" not in capsys.readouterr().out
    # The run's folder stands for its configuration.
    assert cli.main([error.split()[3], "--resume", "train.steps=2"]) == 0
    assert cli.main([error.split()[3], "--resume", "train.steps=1"]) == 1
    assert "train.steps must be at least 2, up to which " in capsys.readouterr().err
    assert cli.main([*words, "overwrite=true"]) == 0
    assert cli.main([*words, "name=misspelt", "--resume"]) == 0
    assert "misspelt/checkpoints: the run begins" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["photos", "train.step=1"], "unknown key train.step; the nearest is train.steps"),
        (["train.steps=x"], "train.steps must be int, got 'x' (str)"),
        (["nothing"], "recipe must be a YAML file, a run's folder or one of "),
        (["mae_vit_bas"], "got 'mae_vit_bas', the nearest is mae_vit_base"),
        (["photos", "data=/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_errors_are_one_line_without_a_traceback(tmp_path, capsys, words, message):
    assert cli.main([*words, f"out={tmp_path}"] if "=" in words[-1] else words) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastssl-train: error: ") and message in error
    assert "Traceback" not in error and len(error.splitlines()) == 1


def test_traceback_on_demand(capsys):
    with pytest.raises(ValueError, match="unknown key"):
        cli.main(["photos", "no.key=1", "--traceback"])


def test_help_lists_every_key_and_recipe(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for key in keys(Config()):
        assert re.search(rf"^ *{re.escape(key.name)}[=:]", text, re.MULTILINE), key.name
        assert key.help in text
    for name in recipes.names():
        assert name in text
    for word in ("--resume", "--traceback", "torchrun", "key.sub=value"):
        assert word in text


def test_missing_packages_are_named_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastssl.training", None)
    assert cli.main(["photos"]) == 1
    assert 'pip install "fastssl[train]"' in capsys.readouterr().err


def test_the_recipe_may_be_left_out(monkeypatch):
    loaded = []
    monkeypatch.setattr(
        "fastssl.training.loop.train",
        lambda config, resume, profile: loaded.append((config, resume)),
    )
    assert cli.main(["train.steps=5", "--resume"]) == 0
    assert cli.main(["--resume", "photos", "train.steps=6"]) == 0
    assert [(c.name, c.train.steps, resume) for c, resume in loaded] == [
        ("photos", 5, True),
        ("photos", 6, True),
    ]


def start(words, ranks=0):
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"] if ranks else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "fastssl.cli", *words],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "FASTSSL_BACKEND": "reference"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for(path, process):
    deadline = time.monotonic() + 200
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


def descendants(pid):
    """`pid` and every process below it."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it may have ended by now
            parent = stat.read_text().rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("ranks", [0, 2], ids=["alone", "torchrun"])
def test_stopped_from_outside_and_resumed(tmp_path, ranks, number):
    """As in life: a signal to all processes of a run with workers at some time, then --resume."""
    images = make_images(tmp_path / "images")
    more = ["train.steps=100", "checkpoint.every=3", "log.tensorboard=false", "log.every=1"]
    more += ["eval.every=0", "loader.num_workers=1"]
    whole = [*arguments(images, tmp_path, *more), "name=whole"]
    finish(start(whole, ranks))

    parts = [*arguments(images, tmp_path, *more), "name=parts"]
    process = start(parts, ranks)
    wait_for(tmp_path / "parts" / "checkpoints" / "step_00000006", process)
    for pid in descendants(process.pid):
        os.kill(pid, number)
    output = process.communicate(timeout=300)[0]
    assert number == signal.SIGKILL or "go on with: fastssl-train" in output, output
    assert not (tmp_path / "parts" / "checkpoints" / "step_00000100").exists(), "stopped too late"
    finish(start([*parts, "--resume"], ranks))

    last = "checkpoints/step_00000100"
    expected = saved_tensors(tmp_path / "whole" / last)
    assert_same_tensors(saved_tensors(tmp_path / "parts" / last), expected)
