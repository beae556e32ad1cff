"""The report as a browser shows it: a headless Chromium, where the machine has one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from math import nan
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.training.loop import Run, train
from fastssl.training.report import write_report
from fastssl.training.watch import NonFiniteError
from tests.training.tiny import tiny_config

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTH, HEIGHT = 1000, 1500
# What the browser itself found: the natural sizes of pictures, the shown sizes of curves and text.
PROBE = """<script>addEventListener("load", () => {
  const size = e => Math.round(e.getBoundingClientRect().width * 100) / 100;
  const of = (query, f) => [...document.querySelectorAll(query)].map(f).join(" ");
  document.title = "images " + of("img", e => e.naturalWidth + "x" + e.naturalHeight)
    + "; curves " + of("svg [id^=train-] path, svg [id^=eval-] path",
        e => e.closest("[id^=train-],[id^=eval-]").id + ":" + size(e))
    + "; bold " + of("p strong", e => e.innerText.replaceAll(" ", "_") + size(e))
    + "; reloads " + document.querySelectorAll("meta[http-equiv=refresh]").length;
})</script>"""


@pytest.fixture(scope="module")
def browser():
    """Runs Chromium on a page with options, and returns what it printed."""
    names = [os.environ["FASTSSL_BROWSER"]] if "FASTSSL_BROWSER" in os.environ else NAMES
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on the path")

    def run(page: Path, *options: str) -> str:
        profile = page.parent / "profile"
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        # Of the network it needs nothing.
        command += ["--disable-quic", "--no-first-run", "--disable-background-networking"]
        command += ["--disable-component-update", "--disable-sync"]
        command += [f"--user-data-dir={profile}", f"--window-size={WIDTH},{HEIGHT}", *options]
        done = subprocess.run(
            [*command, page.absolute().as_uri()], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    return train(tiny_config(images, tmp_path_factory.mktemp("runs"), "train.steps=4"))


def seen_by(browser, page: Path) -> dict[str, list[str]]:
    """What the probe finds in a copy of the page."""
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text(encoding="utf-8").replace("</head>", PROBE + "</head>"))
    (title,) = re.findall(r"<title>(images [^<]*)</title>", browser(probed, "--dump-dom"))
    parts = (part.split(" ") for part in title.split("; "))
    return {name: [value for value in values if value] for name, *values in parts}


def test_pictures_and_curves_are_shown(browser, folder):
    seen = seen_by(browser, folder / "report.html")
    with Image.open(folder / "reconstructions.png") as sheet:
        assert seen["images"] == [f"{sheet.width}x{sheet.height}"]
    widths: dict[str, float] = {}
    for curve in seen["curves"]:
        name, width = curve.split(":")
        widths[name] = max(widths.get(name, 0.0), float(width))
    assert {"train-loss", "train-lr", "train-images_per_second", "eval-knn"} <= widths.keys()
    assert min(widths.values()) > 100, "pixels"
    assert seen["reloads"] == ["0"] and seen["bold"] == []


def test_of_a_hopeless_run_curves_and_the_end_are_shown(browser, images, tmp_path, monkeypatch):
    real = Run._forward_backward

    def spoiled(run, batch):
        outputs = real(run, batch)
        return outputs if run.step < 3 else {"loss": torch.tensor(nan)}

    monkeypatch.setattr(Run, "_forward_backward", spoiled)
    with pytest.raises(NonFiniteError):
        train(tiny_config(images, tmp_path, "train.max_bad_steps=2"))
    seen = seen_by(browser, tmp_path / "tiny" / "report.html")
    (bold,) = seen["bold"]
    text, width = bold.split(":")
    assert text == "The_run_ended_early" and float(width) > 50, "pixels"
    assert any(curve.startswith("train-loss:") for curve in seen["curves"])
    assert len(seen["images"]) == 1 and seen["reloads"] == ["0"]


def test_the_page_is_not_blank(browser, folder, tmp_path):
    shot = tmp_path / "shot.png"
    browser(folder / "report.html", f"--screenshot={shot}")
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert pixels.std() > 10
    # Text and curves: black ink, and the blue and orange lines, in the upper and the lower half.
    for half in np.split(pixels, 2):
        assert (half.max(axis=2) < 60).sum() > 500
    for colour in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):
        assert (np.abs(pixels.astype(int) - colour).max(axis=2) < 8).sum() > 50


def test_a_page_that_loads_itself_again_is_shown_too(browser, folder, tmp_path):
    live = tmp_path / "live"
    shutil.copytree(folder, live, ignore=shutil.ignore_patterns("checkpoints", "profile"))
    seen = seen_by(browser, write_report(live, reload_every=30.0))
    assert seen["reloads"] == ["1"] and len(seen["images"]) == 1 and seen["curves"]
