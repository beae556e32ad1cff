"""Which parameters decay, how fast each depth learns, and the optimizer on them."""

import pytest
import torch
from torch import nn

from fastssl.models import MaskedAutoencoderHiera, MaskedAutoencoderViT, VisionTransformer
from fastssl.optim import build_adamw, param_groups, set_hyperparameters
from fastssl.optim.param_groups import layer_id


def tiny_vit(**kwargs):
    return VisionTransformer(
        img_size=8, patch_size=4, embed_dim=8, depth=3, num_heads=2, num_register_tokens=2, **kwargs
    )


def tiny_hiera():
    return MaskedAutoencoderHiera(
        input_size=(64, 64),
        embed_dim=8,
        stages=(1, 2, 1),
        q_pool=2,
        mask_unit_attn=(True, False, False),
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=2,
    )


def by_name(module, **kwargs):
    names = {id(p): n for n, p in module.named_parameters()}
    groups = param_groups(module, **kwargs)
    return {names[id(p)]: group for group in groups for p in group["params"]}


@pytest.mark.parametrize("make", [tiny_vit, tiny_hiera], ids=["vit", "hiera"])
def test_each_trained_parameter_is_in_one_group(make):
    module = make()
    module.get_parameter("patch_embed.proj.bias").requires_grad_(False)
    grouped = [id(p) for group in param_groups(module, layer_decay=0.7) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in module.parameters() if p.requires_grad)


def test_matrices_decay_and_nothing_else_does():
    vit = MaskedAutoencoderViT(
        img_size=8,
        patch_size=4,
        embed_dim=8,
        depth=2,
        num_heads=2,
        decoder_embed_dim=8,
        decoder_depth=1,
        decoder_num_heads=2,
    )
    for model in (tiny_vit(init_values=1.0), vit, tiny_hiera()):
        for name, group in by_name(model).items():
            matrix = name.endswith(".weight") and "norm" not in name
            assert group["decay"] == matrix, name


def test_layer_decay_by_depth_in_vit():
    groups = by_name(tiny_vit(num_classes=5), layer_decay=0.5)
    distance = {
        "cls_token": 4,
        "pos_embed": 4,
        "register_tokens": 4,
        "patch_embed.proj.weight": 4,
        "blocks.0.attn.qkv.weight": 3,
        "blocks.1.norm1.bias": 2,
        "blocks.2.mlp.fc2.weight": 1,
        "norm.weight": 0,
        "head.weight": 0,
    }
    for name, steps in distance.items():
        assert groups[name]["lr_scale"] == 0.5**steps, name


def test_layer_decay_by_depth_in_hiera_with_a_decoder():
    groups = by_name(tiny_hiera(), layer_decay=0.5)
    distance = {
        "pos_embed": 5,
        "patch_embed.proj.bias": 5,
        "blocks.0.attn.qkv.weight": 4,
        "blocks.1.proj.weight": 3,
        "blocks.3.mlp.fc1.bias": 1,
        "encoder_norm.weight": 0,
        "multi_scale_fusion_heads.0.weight": 0,
        "mask_token": 0,
        "decoder_pos_embed": 0,
        "decoder_blocks.0.attn.qkv.weight": 0,
    }
    for name, steps in distance.items():
        assert groups[name]["lr_scale"] == 0.5**steps, name


def test_layer_by_name_under_prefixes_and_chunks():
    assert layer_id("student.backbone.blocks.2.norm1.weight", 12) == 3
    assert layer_id("blocks.1.5.mlp.fc1.weight", 12) == 6
    assert layer_id("model.patch_embed.proj.weight", 12) == 0
    assert layer_id("model.decoder_blocks.2.norm1.weight", 12) == 13
    assert layer_id("model.pos_embed_spatial", 12) == 0


def test_hyperparameters_reach_the_groups():
    head = nn.ModuleDict({"mlp": nn.Linear(4, 4), "last_layer": nn.Linear(4, 4, bias=False)})
    optimizer = build_adamw(head)
    set_hyperparameters(optimizer, lr=0.1, weight_decay=0.04, last_layer_lr=0.0)
    for group in optimizer.param_groups:
        assert group["lr"] == (0.0 if group["last_layer"] else 0.1)
        assert group["weight_decay"] == (0.04 if group["decay"] else 0.0)
        assert group["fused"]
    assert {group["last_layer"] for group in optimizer.param_groups} == {True, False}


def test_frozen_last_layer_stays_where_it_is():
    head = nn.ModuleDict({"mlp": nn.Linear(4, 4), "last_layer": nn.Linear(4, 4, bias=False)})
    optimizer = build_adamw(head)
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    head["last_layer"](head["mlp"](torch.ones(2, 4))).sum().backward()
    set_hyperparameters(optimizer, lr=0.1, weight_decay=0.5, last_layer_lr=0.0)
    optimizer.step()
    assert torch.equal(head["last_layer"].weight, before["last_layer.weight"])
    assert not torch.equal(head["mlp"].weight, before["mlp.weight"])


def test_state_made_beforehand_gives_the_steps_of_plain_adamw():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_adamw(ours, betas=(0.9, 0.95), eps=1e-6)
    set_hyperparameters(optimizer, lr=0.01, weight_decay=0.1)
    groups = [
        {"params": [theirs.weight], "weight_decay": 0.1},
        {"params": [theirs.bias], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-6, foreach=False)
    for _ in range(4):
        x = torch.randn(7, 5)
        for module, opt in ((ours, optimizer), (theirs, plain)):
            opt.zero_grad()
            module(x).square().mean().backward()
            opt.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_module_without_trained_parameters_is_refused():
    with pytest.raises(ValueError, match="require a gradient"):
        param_groups(nn.ReLU())


def test_a_fixed_rate_stays():
    module = nn.ModuleDict({"model": nn.Linear(3, 3), "predictor": nn.Linear(3, 3)})
    groups = by_name(module, fixed_lr=["predictor"])
    assert {n for n, g in groups.items() if g["fixed_lr"]} == {"predictor.weight", "predictor.bias"}
    optimizer = build_adamw(module, fixed_lr=["predictor"])
    set_hyperparameters(optimizer, lr=0.1, weight_decay=0.0, fixed_lr=0.4)
    assert {g["fixed_lr"]: g["lr"] for g in optimizer.param_groups} == {False: 0.1, True: 0.4}


def test_a_fixed_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="fixed_lr must name modules that learn, got 'predict'"):
        param_groups(nn.ModuleDict({"predictor": nn.Linear(3, 3)}), fixed_lr=["predict"])
