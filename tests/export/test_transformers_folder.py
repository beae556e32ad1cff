"""Folders for transformers: loaded there, and back here, they compute what the run's model does."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from fastssl import models
from fastssl.export.transformers_folder import write_transformers
from tests.export.runs import DECODER, HIERA, VIT, features_by_card, random_run
from tests.models.vit_keys import assert_relative

TOLERANCE = 1e-5
DINOV2 = {**VIT, "init_values": 0.5}
REGISTERS = {"num_register_tokens": 2, "interpolate_antialias": True}
# model type: (method, model, its arguments, size of the images)
CASES = {
    "vit": ("simclr", "VisionTransformer", VIT, (32, 32)),
    "vit_pooled": ("simclr", "VisionTransformer", {**VIT, "global_pool": "avg"}, (32, 32)),
    "vit_oblong": ("simclr", "VisionTransformer", {**VIT, "qkv_bias": False}, (32, 48)),
    "vit_average": ("data2vec", "VisionTransformer", VIT, (32, 32)),
    "dinov2": ("simclr", "VisionTransformer", DINOV2, (32, 32)),
    "dinov2_gates": ("simclr", "VisionTransformer", {**VIT, "ffn_layer": "swiglu"}, (32, 32)),
    "dinov2_with_registers": ("simclr", "VisionTransformer", DINOV2 | REGISTERS, (32, 32)),
    "hiera": ("simclr", "Hiera", HIERA, (48, 96)),
    "vit_mae": ("mae", "MaskedAutoencoderViT", VIT | DECODER, (32, 32)),
}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, tmp_path):
    method, name, args, size = CASES[case]
    run = random_run(method, name, args, size, {"top_k": 2} if method == "data2vec" else None)
    usage = write_transformers(run, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert case.startswith(config["model_type"])
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = run.method.features(images)
        assert_relative(features_by_card(usage.code, tmp_path, images), expected, TOLERANCE)
        back = getattr(models, name).from_pretrained(tmp_path)
        assert not back.training
        again = back(images) if name == "VisionTransformer" else back.features(images)
        assert_relative(again, expected, TOLERANCE)


def test_of_an_oblong_masked_autoencoder_the_encoder_is_written(tmp_path):
    """Their decoder takes square pictures only."""
    run = random_run("mae", "MaskedAutoencoderViT", VIT | DECODER, (32, 48))
    usage = write_transformers(run, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "vit"
    assert any("not square, got (4, 6) patches" in note for note in usage.notes)
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        expected = run.method.features(images)
    assert_relative(features_by_card(usage.code, tmp_path, images), expected, TOLERANCE)


def test_masked_autoencoders_predict_the_same(tmp_path):
    run = random_run("mae", "MaskedAutoencoderViT", VIT | DECODER, args={"mask_ratio": 0.5})
    write_transformers(run, tmp_path)
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path)
    back = models.MaskedAutoencoderViT.from_pretrained(tmp_path)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    with torch.no_grad():
        expected, (_, pred, mask) = theirs(images, noise=noise), run.model(images, 0.5, noise)
        assert torch.equal(mask, expected.mask)
        assert_relative(pred, expected.logits, TOLERANCE)
        assert torch.equal(back(images, 0.5, noise)[1], pred)


def test_masked_hieras_predict_the_same(tmp_path):
    run = random_run("hiera_mae", "MaskedAutoencoderHiera", HIERA | DECODER, (64, 64))
    usage = write_transformers(run, tmp_path)
    assert "HieraForPreTraining" in usage.code
    theirs = transformers.HieraForPreTraining.from_pretrained(tmp_path).eval()
    back = models.MaskedAutoencoderHiera.from_pretrained(tmp_path)
    images, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
    with torch.no_grad():
        expected, (pred, visible) = (
            theirs(images, noise=noise),
            run.model.predict(images, noise=noise),
        )
        assert torch.equal(visible, expected.bool_masked_pos)
        assert_relative(pred, expected.logits, TOLERANCE)
        assert torch.equal(back.predict(images, noise=noise)[0], pred)
        assert torch.equal(back.features(images), run.method.features(images))


def test_encoder_where_the_decoder_has_no_place(tmp_path):
    args = VIT | DECODER | {"mask_in_encoder": True}
    run = random_run("mae", "MaskedAutoencoderViT", args)
    usage = write_transformers(run, tmp_path)
    assert "decoder was left out: transformers has no place for a ViTMAE" in usage.notes[0]
    images = torch.randn(2, 3, 32, 32)
    features = features_by_card(usage.code, tmp_path, images)
    assert_relative(features, run.method.features(images), TOLERANCE)


@pytest.mark.parametrize(
    "name, args, size, reason",
    [
        ("ResNet", {"depths": [1, 1, 1, 1], "width": 8}, (32, 32), "a ResNet, only for"),
        ("VisionTransformer", DINOV2, (32, 48), "a Dinov2 that is not square"),
        ("VisionTransformer", {**DINOV2, "mlp_ratio": 2.5}, (32, 32), "no whole number, got 2.5"),
        ("Hiera", {**HIERA, "mask_unit_size": [8, 8]}, (64, 64), r"units other than \(4, 4\)"),
    ],
)
def test_what_has_no_place(name, args, size, reason, tmp_path):
    with pytest.raises(ValueError, match=f"transformers has no place for .*{reason}"):
        write_transformers(random_run("simclr", name, args, size), tmp_path)
