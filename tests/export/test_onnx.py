"""ONNX graphs: onnxruntime computes the run's features of any number of images."""

from __future__ import annotations

import sys

import pytest
import torch

from fastssl.export import onnx_file
from fastssl.export.onnx_file import write_onnx
from tests.export.runs import DECODER, HIERA, VIT, features_by_card, random_run

# A pooling and both kinds of attention in three blocks.
FLAT = {"embed_dim": 8, "stages": [1, 2], "q_pool": 1, "mask_unit_size": [2, 2]}
FLAT |= {"mask_unit_attn": [True, False], **DECODER}


@pytest.mark.parametrize(
    "method, model, args, size",
    [
        pytest.param(
            "mae", "MaskedAutoencoderViT", VIT | DECODER | {"depth": 1}, (32, 32), id="mae"
        ),
        pytest.param("hiera_mae", "MaskedAutoencoderHiera", FLAT, (32, 32), id="hiera_mae"),
        pytest.param("simclr", "Hiera", HIERA, (64, 64), marks=pytest.mark.slow, id="hiera"),
        pytest.param(
            "simclr",
            "VisionTransformer",
            VIT | {"init_values": 0.5, "num_register_tokens": 2, "ffn_layer": "swiglu"},
            (32, 48),
            marks=pytest.mark.slow,
            id="registers",
        ),
        pytest.param(
            "simclr",
            "ResNet",
            {"depths": [1, 1, 1, 1], "width": 8},
            (32, 32),
            marks=pytest.mark.slow,
            id="resnet",
        ),
    ],
)
def test_onnxruntime_gives_the_features(method, model, args, size, tmp_path):
    pytest.importorskip("onnxruntime")
    run = random_run(method, model, args, size)
    usage = write_onnx(run, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert "gives the model's features" in usage.notes[0]
    for batch in (1, 3):
        images = torch.randn(batch, 3, *size)
        with torch.no_grad():
            expected = run.method.features(images)
        features = features_by_card(usage.code, tmp_path, images.numpy())
        torch.testing.assert_close(torch.from_numpy(features), expected, rtol=1e-4, atol=1e-4)


def test_other_features_are_an_error(tmp_path, monkeypatch):
    """The comparison that the export makes by itself, on a graph of another model."""
    onnxruntime = pytest.importorskip("onnxruntime")

    class Session:
        def __init__(self, *args, **kwargs):
            pass

        def run(self, names, inputs):
            return [torch.zeros(len(inputs["images"]), 24).numpy()]

    run = random_run("mae", "MaskedAutoencoderViT", VIT | DECODER)
    features = onnx_file._Features(run.method)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(ArithmeticError, match=r"differ from the model's by 1\.0e"):
        onnx_file._compare(features, tmp_path / "model.onnx", (32, 32))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "was not compared" in onnx_file._compare(features, tmp_path / "model.onnx", (32, 32))


def test_without_onnx(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'fastssl\[onnx\]'"):
        write_onnx(random_run("mae", "MaskedAutoencoderViT", VIT | DECODER), tmp_path)
