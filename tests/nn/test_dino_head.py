"""DINOHead: its formula, and checkpoints in every style."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastssl.functional as ops
from fastssl import DINOHead
from fastssl.nn.dino_head import WeightNormLinear


def parametrized(style, in_features, out_features):
    linear = nn.Linear(in_features, out_features, bias=False)
    if style == "hook":
        return nn.utils.weight_norm(linear)
    return nn.utils.parametrizations.weight_norm(linear)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("style", ["hook", "parametrization"])
def test_reads_both_styles_of_weight_norm_and_saves_the_official_keys(style):
    theirs = parametrized(style, 5, 7).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours = WeightNormLinear(5, 7).double()
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == ["weight_g", "weight_v"]
    results = []
    x = torch.randn(4, 5, dtype=torch.float64)
    for layer in (theirs, ours):
        y = layer(x)
        y.square().sum().backward()
        results.append((y.detach(), [p.grad for p in layer.parameters()]))
    torch.testing.assert_close(results[1], results[0])
    copy.deepcopy(ours)


def test_formula_in_float64():
    head = DINOHead(4, 6, nlayers=3, hidden_dim=5, bottleneck_dim=3).double()
    x = torch.randn(2, 8, 4, dtype=torch.float64)
    state = head.state_dict()
    y = x
    for i in (0, 2, 4):
        y = F.linear(y, state[f"mlp.{i}.weight"], state[f"mlp.{i}.bias"])
        y = F.gelu(y) if i < 4 else y
    y = y / y.norm(dim=-1, keepdim=True)
    v = state["last_layer.weight_v"]
    torch.testing.assert_close(head(x), y @ (v / v.norm(dim=1, keepdim=True)).T)


def test_keys_are_the_official_ones():
    mlp = [f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    last = ["last_layer.weight_g", "last_layer.weight_v"]
    assert sorted(DINOHead(4, 6).state_dict()) == sorted(mlp + last)
    assert sorted(DINOHead(4, 6, nlayers=1).state_dict()) == sorted(
        ["mlp.weight", "mlp.bias", *last]
    )
    with_bn = DINOHead(4, 6, use_bn=True).state_dict()
    assert with_bn["mlp.1.running_mean"].shape == (2048,) and "mlp.6.weight" in with_bn
    assert "mlp.0.bias" not in DINOHead(4, 6, mlp_bias=False).state_dict()


def test_norm_last_layer_keeps_the_scale_at_one():
    frozen, free = DINOHead(4, 6), DINOHead(4, 6, norm_last_layer=False)
    assert not frozen.last_layer.weight_g.requires_grad and free.last_layer.weight_g.requires_grad
    frozen.load_state_dict(free.state_dict())
    with torch.no_grad():
        free.last_layer.weight_g.fill_(2)
    with pytest.raises(ValueError, match=r"last_layer.weight_g must be 1 .* got values up to 2;"):
        frozen.load_state_dict(free.state_dict())


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_features_and_prototypes_make_the_logits_and_their_gradients(norm_last_layer):
    head = DINOHead(4, 9, norm_last_layer=norm_last_layer, hidden_dim=5, bottleneck_dim=3)
    x = torch.randn(3, 2, 4)
    kept = head(x[:2], return_prototypes=True)
    with torch.no_grad():
        torch.testing.assert_close(kept.logits(), head(x[:2]))
    assert not kept.prototypes.requires_grad
    kept = kept._replace(features=kept.features.detach())
    temps = {"student_temp": 0.1, "teacher_temp": 0.04}

    def fused(output):
        return ops.linear_dino_cross_entropy(
            output.features,
            output.prototypes,
            *kept[:2],
            normalize_prototypes=output.normalize_prototypes,
            student_lengths=output.lengths,
            teacher_lengths=kept.lengths,
            **temps,
        )

    loss = head(x, loss=fused)
    expected = ops.dino_cross_entropy(head(x), kept.logits(), **temps)
    torch.testing.assert_close(loss, expected)
    wanted = [p for p in head.parameters() if p.requires_grad]
    torch.testing.assert_close(
        torch.autograd.grad(loss, wanted),
        torch.autograd.grad(expected, wanted),
        rtol=1e-4,
        atol=1e-6,
    )


def test_finite_for_zeros_and_zero_prototypes():
    head = DINOHead(4, 6, nlayers=1, bottleneck_dim=3)
    with torch.no_grad():
        head.last_layer.weight_v[0] = 0
        head.mlp.bias.zero_()
    loss = head(torch.zeros(2, 4)).sum() + head(torch.randn(2, 4)).sum()
    loss.backward()
    assert loss.isfinite() and all(
        p.grad.isfinite().all() for p in head.parameters() if p.requires_grad
    )


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="nlayers must be at least 1, got 0"):
        DINOHead(4, 6, nlayers=0)
    with pytest.raises(ValueError, match="return_prototypes must be False"):
        DINOHead(4, 6)(torch.zeros(1, 4), loss=len, return_prototypes=True)
