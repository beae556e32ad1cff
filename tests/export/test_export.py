"""fastssl-export on runs: what is in its folders, and what their cards say."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from fastssl import cli_export, models
from fastssl.export import open_run
from fastssl.methods import Method
from fastssl.training import loop
from fastssl.training.loop import Run, train
from tests.export.runs import features_by_card
from tests.training.tiny import HIERA, make_images, saved_tensors, tiny_config

# A ViT of its own file, as users bring it.
OWN = """
from torch import nn
def encoder(width):
    return nn.Sequential(nn.Conv2d(3, width, 8, stride=8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory):
    """A run of MAE, which was evaluated, and short ones of three other encoders."""
    out = tmp_path_factory.mktemp("runs")
    (out / "own.py").write_text(OWN)
    own = [f"model={{name: '{out}/own.py:encoder', args: {{width: 8}}}}", "views.image_size=16"]
    short = ["train.steps=1", "eval.max_images=0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_report", lambda folder: None)
        return {
            "mae": loop.train(tiny_config(images, out, "name=mae", "train.steps=2")),
            "hiera": loop.train(tiny_config(images, out, "name=hiera", *short, model=HIERA)),
            "own": loop.train(
                tiny_config(images, out, "name=own", *short, "method.name=simclr", model=own)
            ),
        }


def export(*words) -> int:
    return cli_export.main([str(word) for word in words])


def card_of(folder) -> str:
    return (folder / "README.md").read_text()


def code_of(folder) -> str:
    return card_of(folder).split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("name", ["mae", "hiera", "own"])
def test_safetensors_give_the_features_of_the_run(runs, name, tmp_path):
    assert export(runs[name], "--format", "safetensors", "--out", tmp_path) == 0
    run = open_run(runs[name])
    images = torch.randn(2, 3, *run.image_size)
    with torch.no_grad():
        expected = run.method.features(images)
    features = features_by_card(code_of(tmp_path / "safetensors"), tmp_path / "safetensors", images)
    torch.testing.assert_close(features, expected)


def test_backbone_of_a_masked_autoencoder_has_no_decoder(runs, tmp_path):
    assert (
        export(runs["mae"], "--format", "safetensors", "--out", tmp_path, "--image-size", 32) == 0
    )
    model = models.VisionTransformer.from_pretrained(tmp_path / "safetensors")
    assert model.grid_size == (8, 8) and model.global_pool == "avg"
    assert not [key for key in model.state_dict() if "decoder" in key]
    preprocessing = json.loads((tmp_path / "safetensors/preprocessor_config.json").read_text())
    assert preprocessing["crop_size"] == {"height": 32, "width": 32}
    assert preprocessing["image_mean"] == [0.485, 0.456, 0.406]


def test_checkpoint_is_the_whole_run_in_one_file(runs, tmp_path):
    assert export(runs["mae"], "--format", "checkpoint", "--out", tmp_path) == 0
    names = {}
    exec(
        code_of(tmp_path / "checkpoint").replace(
            "PATH_OF_THIS_FOLDER", str(tmp_path / "checkpoint")
        ),
        names,
    )
    content = names["checkpoint"]
    assert content["step"] == 2 and "mask_ratio: 0.5" in content["config"]
    kept = saved_tensors(runs["mae"] / "checkpoints" / "step_00000002")
    found = {f"{part}.{k}": t for part in ("model", "optimizer") for k, t in content[part].items()}
    assert found.keys() == kept.keys() and all(torch.equal(kept[k], found[k]) for k in kept)
    model = open_run(runs["mae"]).model
    report = models.load_pretrained(model, tmp_path / "checkpoint" / "checkpoint.pth")
    assert report.missing == []


def test_several_formats_and_their_cards(runs, tmp_path, capsys):
    words = ["--format", "safetensors", "transformers", "--out", tmp_path]
    assert export(runs["mae"], *words) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{n}: {tmp_path / n}, see README.md there" for n in ("safetensors", "transformers")
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["safetensors", "transformers"]
    version = json.loads((runs["mae"] / "versions.jsonl").read_text().splitlines()[-1])
    scores = [json.loads(x) for x in (runs["mae"] / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in scores if line["kind"] == "eval"][-1]
    for name, library in (("safetensors", "fastssl"), ("transformers", "transformers")):
        card = card_of(tmp_path / name)
        head = card.split("---\n")[1]
        assert f"library_name: {library}\n" in head and "license" not in head
        assert "- self-supervised-learning\n" in head and '- "mae"\n' in head
        assert f"| k-NN, % | {last['knn']:.4g} |" in card and "after step 2" in card
        assert version["data"] in card and version["commit"][:40] in card
        assert f"fastssl {version['fastssl']}, commit" in card
        assert "2 of 2 steps of 8 images" in card and "mask_ratio: 0.5" in card
        assert "16 x 16 pixels in [0, 1], less (0.485, 0.456, 0.406)" in card


def test_versions_of_a_resumed_run(runs):
    (line,) = [json.loads(x) for x in (runs["own"] / "versions.jsonl").read_text().splitlines()]
    assert line["step"] == 0 and line["torch"] == torch.__version__
    assert line["commit"] is None or len(line["commit"].removesuffix("+changes")) == 40


def test_interrupted_run_is_read_from_its_checkpoint(runs, tmp_path):
    copy = tmp_path / "mae"
    shutil.copytree(runs["mae"], copy, symlinks=True)
    (copy / "weights.pth").unlink()
    whole, interrupted = open_run(runs["mae"]).model, open_run(copy).model
    for key, tensor in whole.state_dict().items():
        assert torch.equal(interrupted.state_dict()[key], tensor), key
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(FileNotFoundError, match=r"has no weights\.pth"):
        open_run(copy)


def test_a_run_that_went_on_and_died_is_read_from_its_newest_checkpoint(images, tmp_path):
    """Not from the weights that were written when it was stopped before."""
    words = ["train.steps=6", "checkpoint.every=2", "eval.max_images=0"]
    folder = train(tiny_config(images, tmp_path, "train.steps=2", *words[1:]))
    assert (folder / "weights.pth").is_file() and open_run(folder).step == 2
    real = Run.train_step

    def train_step(run):
        if run.step == 5:
            raise KeyError("the machine went away")
        real(run)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(Run, "train_step", train_step)
        train(tiny_config(images, tmp_path, *words), resume=True)
    found = open_run(folder)
    assert found.step == 4
    kept = saved_tensors(folder / "checkpoints" / "step_00000004")
    for key, tensor in found.model.state_dict().items():
        assert torch.equal(kept[f"model.model.{key}"], tensor), key


def test_errors_are_one_sentence_and_leave_nothing(runs, tmp_path, capsys):
    def fails(*words):
        assert export(*words) == 1
        error = capsys.readouterr().err
        assert error.startswith("fastssl-export: error: ") and len(error.splitlines()) == 1
        return error

    out = ["--out", tmp_path / "out"]
    assert "RUN must be the folder of a run" in fails(tmp_path, "--format", "onnx")
    assert "one or more of safetensors, checkpoint, transformers, onnx, got tf" in fails(
        runs["mae"], "--format", "safetensors", "tf", *out
    )
    assert "has no place for a Sequential" in fails(runs["own"], "--format", "transformers", *out)
    assert "image-size must be at least 1" in fails(
        runs["mae"], "--format", "onnx", "--image-size", 0
    )
    assert "--format" in fails(runs["mae"])
    # All formats or none.
    assert "has no place for a Sequential" in fails(
        runs["own"], "--format", "safetensors", "transformers", *out
    )
    assert [*(tmp_path / "out").iterdir()] == []
    assert export(runs["mae"], "--format", "safetensors", *out) == 0
    capsys.readouterr()
    assert "safetensors exists; remove it" in fails(runs["mae"], "--format", "safetensors", *out)


def test_features_of_a_method_that_averages(runs):
    assert open_run(runs["mae"]).averages_patches
    assert not open_run(runs["own"]).averages_patches
    assert type(open_run(runs["own"]).method).features is Method.features
