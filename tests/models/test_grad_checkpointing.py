"""Activation checkpointing changes what is kept, not what is computed."""

import pytest
import torch

from fastssl.models import (
    Hiera,
    MaskedAutoencoderHiera,
    MaskedAutoencoderViT,
    VisionTransformer,
)

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
HIERA = {"input_size": (64, 64), "embed_dim": 8, "stages": (1, 1, 1, 1)}
DECODER = {"decoder_embed_dim": 8, "decoder_depth": 2, "decoder_num_heads": 2}
MODELS = {
    "vit": (lambda: VisionTransformer(**VIT, drop_path_rate=0.3), 32, lambda m, x: m(x)),
    "hiera": (lambda: Hiera(**HIERA, drop_path_rate=0.3), 64, lambda m, x: m(x)),
    "mae_vit": (lambda: MaskedAutoencoderViT(**VIT, **DECODER), 32, lambda m, x: m(x)[0]),
    "mae_hiera": (
        lambda: MaskedAutoencoderHiera(**HIERA, **DECODER, q_pool=2),
        64,
        lambda m, x: m(x)[0],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_stay_and_blocks_run_twice(name):
    build, side, run = MODELS[name]
    torch.manual_seed(0)
    model, images = build().train(), torch.randn(4, 3, side, side)
    calls = []
    model.blocks[-1].register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        calls.clear()
        torch.manual_seed(1)
        loss = run(model, images).square().mean()
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = gradients()
    assert len(calls) == 1
    model.set_grad_checkpointing()
    actual = gradients()
    assert len(calls) == 2
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    model.set_grad_checkpointing(False)
    gradients()
    assert len(calls) == 1
