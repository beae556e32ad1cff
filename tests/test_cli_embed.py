"""fastssl-embed: what is in its files, in which order, by one process or two."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl import cli_embed
from fastssl.data.labelled import CenterCrop
from fastssl.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize
from fastssl.models import MaskedAutoencoderViT, load_pretrained
from fastssl.training import loop
from fastssl.training.config import load
from tests.training.tiny import make_images, tiny_config

LATIN = os.fsdecode(b"3\xff.png")
SUFFIXES = ("safetensors", "parquet")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    images = make_images(out / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_report", lambda folder: None)
        words = ["train.steps=1", "eval.max_images=0", "name=tiny"]
        return loop.train(tiny_config(images, out, *words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight pictures at two depths, one's name no UTF-8, and two broken files between them."""
    root = make_images(tmp_path_factory.mktemp("pictures"), 4)
    make_images(root / "1.d" / "ü", 3)
    (root / LATIN).write_bytes((root / "3.png").read_bytes())
    for name in ("1.d/broken.png", os.fsdecode(b"2\xff.jpg")):
        (root / name).write_bytes(b"not a picture")
    return root


def read(file):
    """Features and paths, by the words of the docstring."""
    commands = cli_embed.__doc__.split('python -c "')[1:]
    code = next(c for c in commands if f"out.{file.suffix[1:]}" in c).partition('\n    "')[0]
    names = {}
    exec(textwrap.dedent(code).replace(f"out{file.suffix}", str(file)), names)
    paths = names.get("paths") or names["table"]["path"].to_pylist()
    return np.array(names["features"]), paths


def expected(run, folder):
    config = load(str(run / "config.yaml"))
    model = MaskedAutoencoderViT(img_size=16, **config.model.args).eval()
    load_pretrained(model, run / "weights.pth", strict=True)
    paths = ["0.png", "1.d/ü/0.png", "1.d/ü/1.png", "1.d/ü/2.png", "1.png", "2.png", "3.png", LATIN]
    crops = []
    for path in paths:
        with Image.open(folder / path) as image:
            crops.append(CenterCrop((16, 16))(np.array(image.convert("RGB"))))
    with torch.no_grad():
        images = normalize(torch.stack(crops), IMAGENET_MEAN, IMAGENET_STD)
        return model.features(images).numpy(), paths


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip(run, folder, tmp_path, capsys, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / f"out.{suffix}"
    words = [str(run), str(folder), str(out), "--batch-size", "2", "--device", "cpu"]
    assert cli_embed.main(words) == 0
    features, paths = read(out)
    by_hand, its_paths = expected(run, folder)
    assert features.dtype == np.float32 and features.shape == (8, 16)
    if suffix == "parquet":
        its_paths[-1] = r"3\udcff.png"
    assert paths == its_paths
    np.testing.assert_allclose(features, by_hand, atol=1e-5)
    assert np.abs(by_hand[1:] - by_hand[0]).max(axis=1)[[0, 2, 4]].any(), "rows that differ"
    said = capsys.readouterr().out
    assert "features of 8 images, 16 numbers each" in said
    assert "2 broken files were skipped" in said
    assert str(folder / r"2\udcff.jpg") in said and str(folder / "1.d/broken.png") in said
    assert os.listdir(tmp_path) == [out.name], "nothing is left beside it"


def test_what_else_the_files_say(run, folder, tmp_path):
    import safetensors

    out = tmp_path / "out.safetensors"
    assert cli_embed.main([str(run), str(folder), str(out), "--device", "cpu"]) == 0
    with safetensors.safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["folder"] == str(folder)
    assert len(json.loads(metadata["skipped"])) == 2
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "out.parquet"
    assert cli_embed.main([str(run), str(folder), str(out), "--device", "cpu"]) == 0
    schema = parquet.read_schema(out)
    assert str(schema.field("feature").type).startswith("fixed_size_list") and "[16]" in str(
        schema.field("feature").type
    )
    assert schema.metadata[b"folder"].decode() == str(folder)


def embedded(words):
    torch.set_num_threads(1)
    return cli_embed.main(words)


@pytest.mark.parametrize("batch_size", [2, 64], ids=["shares", "a rank without images"])
def test_two_processes_write_what_one_does(run, folder, tmp_path, gloo_pool, batch_size):
    files = [tmp_path / f"{size}.safetensors" for size in (1, 2)]
    for size, file in zip((1, 2), files, strict=True):
        words = [str(run), str(folder), str(file), "--device", "cpu"]
        words += ["--batch-size", str(batch_size)]
        assert gloo_pool.run(embedded, size, words) == [0] * size
    (one, its_paths), (two, paths) = map(read, files)
    assert paths == its_paths and np.array_equal(one, two)
    assert sorted(os.listdir(tmp_path)) == [file.name for file in files]


def test_released_weights_and_image_size(folder, tmp_path):
    from fastssl.models import VisionTransformer

    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=2)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    out = tmp_path / "out.safetensors"
    words = ["--model", "VisionTransformer", "--weights", str(tmp_path / "vit.pth")]
    words += ["--model-args", "{patch_size: 4, embed_dim: 8, depth: 1, num_heads: 2}"]
    words += ["--image-size", "16", str(folder), "--device", "cpu", str(out)]
    assert cli_embed.main(words) == 0
    features, paths = read(out)
    with Image.open(folder / paths[0]) as image:
        crop = CenterCrop((16, 16))(np.array(image.convert("RGB")))
    with torch.no_grad():
        row = model.eval()(normalize(crop[None], IMAGENET_MEAN, IMAGENET_STD))
    np.testing.assert_allclose(features[:1], row, atol=1e-5)


def test_errors_are_one_sentence(run, folder, tmp_path, capsys, monkeypatch):
    def fails(*words):
        assert cli_embed.main([str(word) for word in words]) == 1
        error = capsys.readouterr().err
        assert error.startswith("fastssl-embed: error: ") and len(error.splitlines()) == 1
        return error

    out = tmp_path / "out.safetensors"
    assert "RUN FOLDER OUT must be given" in fails(run, folder)
    assert "FOLDER OUT must be given" in fails("--model", "vit_tiny", folder)
    assert "must end in .safetensors or .parquet" in fails(run, folder, tmp_path / "out.npy")
    assert "a folder that exists" in fails(run, folder, tmp_path / "no" / "out.parquet")
    assert "FOLDER must be a folder of images, got /nowhere" in fails(run, "/nowhere", out)
    assert "has no config.yaml" in fails(folder, folder, out)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "1.png").write_bytes(b"not a picture")
    assert "at least one readable image" in fails(run, broken, out, "--device", "cpu")
    monkeypatch.setattr(cli_embed, "_LONGEST_HEADER", 100)
    assert "OUT must be .parquet for the paths of 10 images" in fails(run, folder, out)
    assert os.listdir(tmp_path) == ["broken"], "nothing is left of what failed"
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'fastssl[parquet]'" in fails(run, folder, Path("out.parquet"))


def test_ten_broken_files_are_listed(run, folder, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "0.png").write_bytes((folder / "0.png").read_bytes())
    for i in range(12):
        (pictures / f"broken{i:02}.png").write_bytes(b"not a picture")
    words = [str(run), str(pictures), str(tmp_path / "out.safetensors"), "--device", "cpu"]
    assert cli_embed.main(words) == 0
    said = capsys.readouterr().out
    assert "12 broken files" in said and said.count("\n  /") == 10
    assert said.endswith("  ...\n")


def test_an_older_file_stays_where_writing_fails(run, folder, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"
    out.write_text("older")

    def fail(file, *rest):
        file.write_text("half")
        raise OSError("the disk is full")

    monkeypatch.setattr(cli_embed, "_write_safetensors", fail)
    assert cli_embed.main([str(run), str(folder), str(out), "--device", "cpu"]) == 1
    assert out.read_text() == "older" and os.listdir(tmp_path) == [out.name]
