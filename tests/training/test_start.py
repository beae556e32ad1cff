"""Runs that start from released weights: what is taken of the file, and what the run says of it."""

from __future__ import annotations

import argparse

import pytest
import torch

from fastssl import distributed
from fastssl.models import VisionTransformer
from fastssl.nn import DINOHead
from fastssl.training import setup
from tests.models.vit_keys import randomise
from tests.training.tiny import HIERA, VIT, tiny_config

ENCODER = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
HEAD = {"out_dim": 12, "hidden_dim": 8, "bottleneck_dim": 4}
VIEWS = "views.groups=[{number: 2}, {number: 2, size: 8}]"
DINO = ["model.name=VisionTransformer", f"model.args={ENCODER}", "views.image_size=16", VIEWS]
DINO += [f"method={{name: dino, args: {HEAD}}}"]
DINOV2 = [*DINO[:2], "views.image_size=16", VIEWS]
DINOV2 += [f"method={{name: dinov2, args: {HEAD | {'patch_out_dim': 10}}}}"]


def start(config):
    """The method as it is before the first step."""
    with distributed.session("cpu") as world:
        train_set, _ = setup.datasets(config)
        return setup.method_and_optimizer(config, world, train_set)[0]


def released(**kwargs) -> VisionTransformer:
    model = VisionTransformer(**{"img_size": 16, **ENCODER, **kwargs})
    randomise(model)
    return model


def under(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}


def dino_checkpoint(encoder, out_dim=12):
    """As main_dino.py saves it."""
    head = DINOHead(16, out_dim, hidden_dim=8, bottleneck_dim=4)
    networks = under("backbone.", encoder.state_dict()) | under("head.", head.state_dict())
    content = {"student": under("module.", networks), "teacher": networks, "epoch": 1}
    return head, {**content, "args": argparse.Namespace(arch="vit_small")}


def test_dino_goes_on_with_its_head(images, tmp_path, capsys):
    encoder = released()
    head, content = dino_checkpoint(encoder)
    torch.save(content, tmp_path / "dino.pth")
    method = start(tiny_config(images, tmp_path, *DINO, f"model.weights={tmp_path / 'dino.pth'}"))
    for network in (method.student, method.teacher):
        assert torch.equal(network.backbone.pos_embed, encoder.pos_embed)
        assert torch.equal(network.head.mlp[2].weight, head.mlp[2].weight)
        assert torch.equal(network.head.last_layer.weight_v, head.last_layer.weight_v)
    said = capsys.readouterr().out
    assert said.startswith(
        f"loaded 30 tensors from {tmp_path / 'dino.pth'}; heads of the file: head"
    )
    assert "not used" not in said and "as initialised" not in said


def test_head_of_another_size_is_made_anew(images, tmp_path, capsys):
    encoder = released()
    _, content = dino_checkpoint(encoder, out_dim=20)
    torch.save(content, tmp_path / "dino.pth")
    method = start(tiny_config(images, tmp_path, *DINO, f"model.weights={tmp_path / 'dino.pth'}"))
    assert torch.equal(method.student.backbone.pos_embed, encoder.pos_embed)
    assert method.student.head.last_layer.weight_v.shape == (12, 4)
    said = capsys.readouterr().out
    assert "in the file, not used: head (8)" in said
    assert "new in method DINO, as initialised: student.head" in said
    assert "teacher" not in said, "it is a copy"


def test_dinov2_backbone_at_another_resolution(images, tmp_path, capsys):
    """Released without heads, in float16 or float32, for larger images, with blocks in chunks."""
    encoder = released(img_size=32, init_values=0.5, num_register_tokens=2, use_mask_token=True)
    state = encoder.state_dict()
    torch.save(state, tmp_path / "dinov2.pth")
    words = [f"model.weights={tmp_path / 'dinov2.pth'}", "model.args.init_values=1.0"]
    words += ["model.args.num_register_tokens=2"]
    method = start(tiny_config(images, tmp_path, *DINOV2, *words))
    backbone = method.teacher.backbone
    assert torch.equal(backbone.register_tokens, encoder.register_tokens)
    assert torch.equal(backbone.mask_token, encoder.mask_token)
    assert torch.equal(backbone.blocks[1].ls2.gamma, encoder.blocks[1].ls2.gamma)
    assert backbone.pos_embed.shape == (1, 17, 16)
    said = capsys.readouterr().out
    assert "resampled to the model's grid: pos_embed" in said
    assert "as initialised: student.head, student.patch_head" in said


@pytest.mark.parametrize("model", [VIT, HIERA], ids=["mae", "hiera"])
def test_encoder_of_a_masked_autoencoder_gets_a_new_decoder(
    model, images, tmp_path, capsys, caplog
):
    config = tiny_config(images, tmp_path, "seed=1", model=model)
    source = start(config).model
    encoder = {k: t for k, t in source.state_dict().items() if "decoder" not in k}
    del encoder["mask_token"]
    torch.save({"model" if model is VIT else "model_state": encoder}, tmp_path / "mae.pth")
    words = ["seed=2", f"model.weights={tmp_path / 'mae.pth'}"]
    method = start(tiny_config(images, tmp_path, *words, model=model))
    assert torch.equal(method.model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert not torch.equal(method.model.decoder_pred.weight, source.decoder_pred.weight)
    said = capsys.readouterr().out
    assert (
        "not in the file, as initialised: mask_token, decoder_pos_embed, decoder_embed (2)" in said
    )
    assert "new in method" not in said
    assert caplog.records == [], "the run says it, and once"


def test_projector_of_another_method_is_new(images, tmp_path, capsys):
    torch.save(released().state_dict(), tmp_path / "vit.pth")
    words = ["model.name=VisionTransformer", f"model.args={ENCODER}", "views.image_size=16"]
    words += ["method={name: simclr, args: {}}", f"model.weights={tmp_path / 'vit.pth'}"]
    start(tiny_config(images, tmp_path, *words))
    assert "new in method SimCLR, as initialised: head" in capsys.readouterr().out
