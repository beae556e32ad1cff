"""report.html holds what the run left, whole or in part, and the sheet its reconstructions."""

import base64
import io
import json
import time
from html.parser import HTMLParser
from itertools import pairwise
from math import nan

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.training import report
from fastssl.training.loop import Run, train
from fastssl.training.report import LiveReport, read_metrics, save_reconstructions, write_report
from fastssl.training.watch import NonFiniteError
from tests.training.tiny import tiny_config

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Checks that every element is closed, and collects text, attributes and tags."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.tags, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def page_of(run_dir):
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "my & run"
    folder.mkdir()
    lines = [
        {"step": 0, "kind": "eval", "knn": 50.0, "linear": 61.25, "rankme": 9.0},
        {"step": 1, "kind": "train", "loss": 1.5, "lr": 0.1, "images_per_second": 90.0,
         "data_wait": 0.25, "peak_memory_mb": 700.0, "grad_norm": 1.0},
        {"step": 2, "kind": "train", "loss": 0.875, "lr": 0.05, "images_per_second": 110.0,
         "data_wait": 0.35, "peak_memory_mb": 650.0, "grad_norm": 0.5},
        {"step": 2, "kind": "eval", "knn": 64.5, "linear": 60.0, "rankme": 12.0},
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (folder / "config.yaml").write_text("name: <script>alert(1)</script>\nseed: 7\n")
    (folder / "skipped.json").write_text(json.dumps({"/data/<b>.png": "truncated & broken"}))
    Image.new("RGB", (9, 9), "red").save(folder / "reconstructions.png")
    return folder


def test_the_page_holds_the_run(run_dir):
    page = page_of(run_dir)
    words = page.words
    assert "my & run" in words
    assert "step 0 step 2 change k-NN, % 50.0 64.5 +14.5 linear probe, % 61.2 60.0 -1.2" in words
    assert "RankMe 9.0 12.0 +3.0" in words
    assert "steps 2 loss, last 0.8750 images/s, median 100.0" in words
    assert "time waiting for data, median 30.0% peak memory, MB 700" in words
    assert "Skipped files: 1" in words and "/data/<b>.png truncated & broken" in words
    assert "name: <script>alert(1)</script> seed: 7" in words


def test_the_page_is_self_contained_and_escaped(run_dir):
    page = page_of(run_dir)
    assert "script" not in page.tags and "b" not in page.tags
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    images = [value for value in sources if not value.startswith("#")]
    assert [value.startswith("data:image/png;base64,") for value in images] == [True]
    data = base64.b64decode(images[0].removeprefix("data:image/png;base64,"))
    assert data == (run_dir / "reconstructions.png").read_bytes()


def test_the_curves_are_drawn(run_dir):
    page = page_of(run_dir)
    series = {value for name, value in page.attributes if name == "id"}
    of_train = {f"train-{name}" for name in ("loss", "images_per_second", "lr", "grad_norm")}
    of_eval = {f"eval-{name}" for name in ("knn", "linear", "rankme")}
    assert of_train | of_eval <= series
    assert page.tags.count("svg") == 1
    assert "k-NN" in page.text and "images/s" in page.text, "text stays text"
    assert "train-mfu" not in series and "MFU" not in page.text, "nothing is known of it"


def test_speed_of_a_device_and_mfu_where_there_are_any(run_dir):
    line = {"step": 3, "kind": "train", "images_per_second": 100.0, "mfu": 0.4125}
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line | {"images_per_second_per_device": 50.0}) + "\n")
    page = page_of(run_dir)
    assert "images/s of one device, median 50.0" in page.words and "MFU, median 41.2%" in page.words
    assert ("id", "train-mfu") in page.attributes


def test_a_long_curve_is_thinned_and_ends_with_the_newest(tmp_path):
    points = [{"step": i, "kind": "train", "loss": 1 + i / 1e4} for i in range(10_001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, points)))
    short, long = tmp_path / "short", tmp_path
    short.mkdir()
    (short / "metrics.jsonl").write_text("\n".join(map(json.dumps, points[-401:])))
    sizes = [write_report(folder).stat().st_size for folder in (short, long)]
    assert sizes[1] < 1.5 * sizes[0]
    page = (tmp_path / "report.html").read_text()
    assert "<td>10000</td>" in page and "<td>2.0000</td>" in page


def pictures_of(page):
    """The pixels of every <img>, all of which lie in the page itself."""
    sources = [value for name, value in page.attributes if name == "src"]
    assert page.tags.count("img") == len(sources)
    pictures = []
    for source in sources:
        kind, data = source.split(",", 1)
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
            pictures.append(np.asarray(picture.convert("RGB")))
    return pictures


def test_the_page_of_a_run_shows_pictures_and_curves(images, tmp_path):
    folder = train(tiny_config(images, tmp_path, "train.steps=2"))
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    (sheet,) = pictures_of(page)
    assert sheet.shape[0] > 100 and sheet.std() > 20, "not blank"
    assert {"train-loss", "eval-knn"} <= {v for name, v in page.attributes if name == "id"}
    # Namespaces are names. Nothing is fetched from anywhere.
    fetched = [v for name, v in page.attributes if "://" in v and not name.startswith("xmlns")]
    assert fetched == [] and {"script", "link", "iframe"}.isdisjoint(page.tags)
    # A finished run's page stays as it is.
    assert "http-equiv" not in dict(page.attributes) and "The run goes on" not in page.words


def test_the_page_of_a_hopeless_run_stays_and_says_why_it_ended(images, tmp_path, monkeypatch):
    real = Run._forward_backward

    def spoiled(run, batch):
        outputs = real(run, batch)
        return outputs if run.step < 2 else {"loss": torch.tensor(nan)}

    monkeypatch.setattr(Run, "_forward_backward", spoiled)
    # The lines of a long log would come later than the end.
    more = ["train.max_bad_steps=3", "log.every=2", "checkpoint.every=0", "eval.max_images=0"]
    with pytest.raises(NonFiniteError) as error:
        train(tiny_config(images, tmp_path, *more))
    page = Page((tmp_path / "tiny" / "report.html").read_text(encoding="utf-8"))
    assert f"The run ended early: {error.value}" in page.words
    assert "not finite at step 5: loss nan" in page.words
    assert "steps 5" in page.words and "steps skipped, not finite 3" in page.words
    assert ("id", "train-loss") in page.attributes
    assert "http-equiv" not in dict(page.attributes)


def test_the_page_loads_itself_again_while_the_run_goes_on(run_dir):
    page = Page(write_report(run_dir, reload_every=30.0).read_text(encoding="utf-8"))
    assert dict(page.attributes)["http-equiv"] == "refresh"
    assert dict(page.attributes)["content"] == "30" and "The run goes on" in page.words
    assert sorted(p.name for p in run_dir.iterdir()) == [
        "config.yaml", "metrics.jsonl", "reconstructions.png", "report.html", "skipped.json"
    ]  # fmt: skip


class Watched:
    """Stands for write_report and for the time, which only this class lets pass."""

    def __init__(self, monkeypatch, cost):
        self.now, self.cost, self.written = 100.0, cost, []
        monkeypatch.setattr(report, "write_report", self.write)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def write(self, folder, *, reload_every):
        self.written.append((self.now, reload_every))
        self.now += self.cost


@pytest.mark.parametrize("cost, share", [(0.001, 0.001 / 30), (5.0, 0.01)])
def test_refreshes_keep_their_pace_and_their_share(monkeypatch, tmp_path, cost, share):
    watched = Watched(monkeypatch, cost)
    live = LiveReport(tmp_path, 30.0)
    while watched.now < 10_100:
        watched.now += 0.1
        live.refresh()
    starts = [at for at, _ in watched.written]
    assert starts[0] == pytest.approx(130, abs=0.2)
    pauses = [b - a for a, b in pairwise(starts)]
    assert min(pauses) >= 30 and cost * len(starts) / 10_000 <= 1.01 * share
    assert len(starts) > 0.9 * 10_000 / max(30, 101 * cost), "nor more seldom than need be"
    assert {every for _, every in watched.written} == {30.0}


def test_a_refresh_that_failed_is_not_tried_at_once_again(monkeypatch, tmp_path):
    watched = Watched(monkeypatch, 0.0)
    live = LiveReport(tmp_path, 30.0)
    watched.now += 31

    def fail(folder, *, reload_every):
        raise OSError("disk full")

    monkeypatch.setattr(report, "write_report", fail)
    with pytest.raises(OSError):
        live.refresh()
    assert not live.refresh()
    monkeypatch.setattr(report, "write_report", watched.write)
    watched.now += 31
    assert live.refresh()


def test_no_refreshes_where_none_are_wanted(monkeypatch, tmp_path):
    watched = Watched(monkeypatch, 0.0)
    live = LiveReport(tmp_path, 0.0)
    watched.now += 1e6
    assert not live.refresh() and watched.written == []


def test_a_run_refreshes_its_page_and_survives_a_full_disk(
    images, tmp_path, monkeypatch, capsys, no_report
):
    refreshes = []

    def refresh(folder, *, reload_every):
        train_lines, _ = read_metrics(folder / "metrics.jsonl")
        refreshes.append((train_lines[-1]["step"], reload_every))
        if len(refreshes) == 2:
            raise OSError("disk full")

    monkeypatch.setattr(report, "write_report", refresh)
    monkeypatch.setattr(report, "_SHARE", 1e9)
    words = ["train.steps=3", "log.report_every=1.0e-9", "eval.max_images=0"]
    train(tiny_config(images, tmp_path, *words))
    assert refreshes == [(1, 1.0), (2, 1.0), (3, 1.0)], "seconds are whole ones"
    assert "warning: report.html of step 2 could not be written: disk full" in (
        capsys.readouterr().out
    )


def test_the_page_is_reproducible(run_dir):
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


@pytest.mark.parametrize(
    "missing", ["metrics.jsonl", "config.yaml", "reconstructions.png", "skipped.json"]
)
def test_any_part_may_be_missing(run_dir, missing):
    (run_dir / missing).unlink()
    words = page_of(run_dir).words
    assert ("No evaluation was made" in words) == (missing == "metrics.jsonl")
    assert ("Configuration" in words) == (missing != "config.yaml")
    assert ("Reconstructions" in words) == (missing != "reconstructions.png")
    assert ("Skipped files" in words) == (missing != "skipped.json")


def test_an_empty_run(tmp_path):
    words = page_of(tmp_path).words
    assert "No evaluation was made" in words and "No training step was logged" in words


def test_partial_lines(run_dir):
    (run_dir / "metrics.jsonl").write_text(
        '{"step": 4, "kind": "train", "loss": NaN}\n{"step": 5, "kind": "eval", "linear": 1.0}\n'
    )
    words = page_of(run_dir).words
    assert "loss, last nan" in words and "linear probe, % 1.0 1.0 +0.0" in words
    assert "k-NN, %" not in words.split("Curves")[0]


def test_read_metrics_of_a_resumed_and_a_killed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "kind": "train", "loss": 3}\n'
        '{"step": 2, "kind": "train", "loss": 2}\n'
        '{"step": 3, "kind": "train", "loss": 9}\n'
        '{"step": 2, "kind": "eval", "knn": 1}\n'
        '{"step": 3, "kind": "train", "loss": 1}\n'
        '{"step": 3, "kind": "other"}\n'
        '[1, 2]\n"text"\n'
        '{"step": 4, "kind": "tra'
    )
    train, evals = read_metrics(path)
    assert [(line["step"], line["loss"]) for line in train] == [(1, 3), (2, 2), (3, 1)]
    assert evals == [{"step": 2, "kind": "eval", "knn": 1}]


def test_many_skipped_files_are_counted_and_cut(run_dir):
    skipped = {f"/data/{i}.png": "broken" for i in range(300)}
    (run_dir / "skipped.json").write_text(json.dumps(skipped))
    words = page_of(run_dir).words
    assert "Skipped files: 300" in words and "The first 200 are shown" in words
    assert "/data/199.png" in words and "/data/200.png" not in words


def test_reconstruction_sheet(tmp_path):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.1)
    values = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9], [0.0, 1.0, 2.0]])
    columns = []
    for shift in (0.0, 0.05, 0.1):
        level = (values + shift).view(4, 3, 1, 1).expand(4, 3, 64, 64)
        columns.append((level - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    path = tmp_path / "r.png"
    save_reconstructions(path, *columns, mean=mean, std=std, max_rows=3)
    sheet = np.asarray(Image.open(path)).astype(int)
    cell = 128 + 4
    assert sheet.shape == (3 * cell + 4 + 16, 3 * cell + 4, 3)
    for column, shift in enumerate((0.0, 0.05, 0.1)):
        for row in range(3):
            top, left = 20 + row * cell, 4 + column * cell
            tile = sheet[top : top + 128, left : left + 128]
            expected = ((values[row] + shift) * 255).round().clamp(0, 255).int().tolist()
            np.testing.assert_allclose(tile, np.broadcast_to(expected, tile.shape), atol=1)
    header = sheet[:16]
    for column in range(3):
        assert (header[:, 4 + column * cell : 132 + column * cell] < 128).any(), "a label"


def test_reconstruction_shapes_must_agree(tmp_path):
    x = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"masked, predicted and true must be one shape"):
        save_reconstructions(tmp_path / "r.png", x, x[:1], x, mean=(0,) * 3, std=(1,) * 3)
