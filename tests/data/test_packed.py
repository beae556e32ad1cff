"""Packs: the pixels of the source, in any number of goes, checked; and their command."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl import cli_data
from fastssl.data.build import build_datasets, open_pictures
from fastssl.data.crops import Request
from fastssl.data.labelled import build_labelled
from fastssl.data.packed import Damaged, PackedImages, is_pack, shrunk

NUM = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of several sizes; two of them broken."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(NUM):
        pixels = rng.integers(0, 256, (300 + 20 * i, 400, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.{'jpg' if i % 2 else 'png'}")
    (root / "3.jpg").write_text("no image")
    (root / "8.png").write_bytes((root / "8.png").read_bytes()[:200])
    return root


def pack(*words):
    return cli_data.main(["pack", *map(str, words)])


def content(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".lock"}


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("packs") / "whole"
    # Two pictures fill a shard.
    assert pack(folder, out, "--shard-mb", 1) == 0
    return out


def test_pixels_are_those_of_the_source(folder, packed):
    source, pictures = open_pictures(str(folder)), open_pictures(str(packed))
    assert isinstance(pictures, PackedImages) and len(pictures) == NUM - 2
    assert len(list(packed.glob("*.pixels"))) == 3
    kept = [i for i in range(NUM) if i not in (3, 8)]
    for position, i in enumerate(kept):
        assert pictures.path(position) == source.path(i)
        assert np.array_equal(pictures.read(position), source.read(i))
        assert not pictures.read(position).flags.writeable
    assert {path.rpartition("/")[2] for path in pictures.skipped} == {"3.jpg", "8.png"}


def test_batches_are_those_of_the_source(folder, packed, tmp_path):
    good = tmp_path / "good"
    good.mkdir()
    for path in folder.iterdir():
        if path.name not in ("3.jpg", "8.png"):
            os.link(path, good / path.name)
    # So large that no JPEG is decoded at a smaller scale.
    sets = [build_datasets(str(data), image_size=224, seed=5)[0] for data in (good, packed)]
    batches = [one[Request(torch.arange(12), epoch=2)] for one in sets]
    assert torch.equal(batches[0].images, batches[1].images)


def test_any_number_of_workers_writes_the_same(folder, packed, tmp_path):
    assert pack(folder, tmp_path / "out", "--shard-mb", 1, "--workers", 2) == 0
    assert content(tmp_path / "out") == content(packed)


@pytest.mark.parametrize("moment", [0.0, 0.3, 0.9])
def test_a_pack_that_was_killed_is_gone_on_with(folder, packed, tmp_path, moment):
    out = tmp_path / "out"
    code = "import sys, time\nfrom fastssl.data import decode, folder\nreal = folder.decode_image\n"
    code += "folder.decode_image = lambda *a: time.sleep(0.15) or real(*a)\n"
    code += "from fastssl import cli_data\ncli_data.main(sys.argv[1:])"
    words = ["pack", str(folder), str(out), "--shard-mb", "1"]
    process = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out / "00000.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert is_pack(out) and json.loads((out / "pack.json").read_text())["shards"] is None
    with pytest.raises(ValueError, match="was not written to the end"):
        PackedImages(out)
    first = (out / "00000.pixels").stat().st_ino
    assert pack(*words[1:]) == 0
    assert (out / "00000.pixels").stat().st_ino == first, "what was there was kept"
    assert content(out) == content(packed)


def test_what_was_changed_is_found(packed, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for name, bytes_ in content(packed).items():
        (out / name).write_bytes(bytes_)
    assert cli_data.main(["verify", str(out)]) == 0
    assert "are as they were written" in capsys.readouterr().out
    damaged = bytearray((out / "00001.pixels").read_bytes())
    damaged[1000] ^= 1
    (out / "00001.pixels").write_bytes(damaged)
    assert cli_data.main(["verify", str(out)]) == 1
    assert "00001.pixels does not have the checksum" in capsys.readouterr().err
    (out / "00002.pixels").write_bytes(b"short")
    with pytest.raises(Damaged, match=r"00002\.pixels has 5 of \d+ bytes"):
        open_pictures(str(out))
    text = (out / "00001.json").read_text()
    (out / "00001.json").write_text(text.replace("400", "401"))
    with pytest.raises(Damaged, match=r"00001\.json is not what .* another checksum"):
        PackedImages(out)
    (out / "00001.json").unlink()
    with pytest.raises(Damaged, match=r"00001\.json is not what .*FileNotFound"):
        PackedImages(out)


def test_pictures_are_shrunk(folder, tmp_path, capsys):
    assert pack(folder, tmp_path / "out", "--shortest-side", 100) == 0
    pictures = PackedImages(tmp_path / "out")
    assert [pictures.read(p).shape for p in (0, 1)] == [(100, 133, 3), (100, 125, 3)]
    assert min(min(pictures.read(p).shape[:2]) for p in range(len(pictures))) == 100
    said = capsys.readouterr().out
    assert f"skipped {folder}/3.jpg: cannot identify" in said
    assert "7 pictures of " in said and "2 broken ones left out" in said
    assert shrunk(pictures.read(0), 200) is pictures.read(0)


def test_a_disk_that_is_full_leaves_what_is_whole(folder, packed, tmp_path, monkeypatch, capsys):
    out, real, calls = tmp_path / "out", os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert pack(folder, out, "--shard-mb", 1) == 1
    assert "No space left on device; the same command goes on after the shards" in (
        capsys.readouterr().err
    )
    assert not list(out.glob("*.writing"))
    assert pack(folder, out, "--shard-mb", 1) == 0
    assert content(out) == content(packed)


def test_other_names_are_other_data(folder, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    assert pack(source, tmp_path / "out") == 0
    (source / "0.png").rename(source / "0a.png")
    assert pack(source, tmp_path / "out") == 1
    assert "names must be" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_is_stopped_says_so(folder, packed, tmp_path, number):
    code = "import sys, os, signal\nfrom fastssl.data import packed, folder\n"
    # What a shell runs in the background ignores SIGINT, and so does all that it starts.
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "real = folder.decode_image\nsent = []\n"
    code += "def decode(path, side):\n"
    code += f"    if path.endswith('5.jpg'): os.kill(os.getpid(), {int(number)})\n"
    code += "    return real(path, side)\n"
    code += "folder.decode_image = decode\nfrom fastssl import cli_data\n"
    code += "sys.exit(cli_data.main(sys.argv[1:]))"
    words = ["pack", str(folder), str(tmp_path / "out"), "--shard-mb", "1"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert "fastssl-data: error: stopped; the same command goes on" in done.stderr
    assert "Traceback" not in done.stderr and not list((tmp_path / "out").glob("*.writing"))
    assert pack(*words[1:]) == 0
    assert content(tmp_path / "out") == content(packed)


def test_a_window_of_shards(packed):
    pictures = PackedImages(packed, shard_window=2)
    assert pictures.window.num_open == 2 and pictures.window.starts[-1] == len(pictures)


def test_what_cannot_be_done_is_said(folder, packed, tmp_path, capsys):
    def fails(*words):
        assert cli_data.main([*map(str, words)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("fastssl-data: error: ") and len(error.splitlines()) == 1
        return error

    assert "shortest_side must be None to go on with" in fails(
        "pack", folder, packed, "--shard-mb", 1, "--shortest-side", 9
    )
    assert "shard_bytes must be 1048576 to go on" in fails("pack", folder, packed)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("not mine")
    assert "OUT must be new" in fails("pack", folder, tmp_path / "other")
    assert "pack takes 2 paths, got 1" in fails("pack", folder)
    assert "OUT must be a folder of fastssl-data pack" in fails("verify", folder)
    assert "shard-mb must be at least 1, got 0" in fails("pack", folder, packed, "--shard-mb", 0)
    assert "ACTION" in fails("unpack", folder)
    manifest = tmp_path / "pack.json"
    manifest.write_text('{"kind": "fastssl-data pack", "format": 9, "options": {}, "shards": []}')
    assert "must be a pack of format 1, got 9" in fails("info", tmp_path)
    manifest.write_text('{"name": "of something else"}')
    assert not is_pack(tmp_path)
    assert "OUT must not hold DATA" in fails("pack", folder, folder.parent, "--overwrite")
    assert "OUT must not hold DATA" in fails("pack", folder, folder, "--overwrite")
    assert len(list(folder.iterdir())) == NUM
    with pytest.raises(ValueError, match="was made by fastssl-data pack"):
        build_labelled(packed, image_size=8)
    assert pack(folder, tmp_path / "new", "--shard-mb", 1) == 0
    assert "does not exist" in fails("pack", tmp_path / "mistyped", tmp_path / "new", "--overwrite")
    assert is_pack(tmp_path / "new"), "not deleted for nothing"
    assert pack(folder, tmp_path / "new", "--overwrite", "--shard-mb", 2) == 0
    assert len(list((tmp_path / "new").glob("*.pixels"))) == 2
    assert cli_data.main(["info", str(tmp_path / "new")]) == 0
