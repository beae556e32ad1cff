"""Projection and prediction heads: layers, keys and arithmetic of the published ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastssl import nn as fnn

# L and B: linear without and with bias; N and n: normalisation with and without parameters.
LAYERS = {
    fnn.SimCLRProjectionHead: "LNrLN",
    fnn.MoCoProjectionHead: "BrB",
    fnn.MoCoPredictionHead: "LNrLn",
    fnn.BYOLProjectionHead: "BNrL",
    fnn.BYOLPredictionHead: "BNrL",
    fnn.SimSiamProjectionHead: "LNrLNrLn",
    fnn.SimSiamPredictionHead: "LNrB",
    fnn.BarlowTwinsProjectionHead: "LNrLNrL",
    fnn.VICRegProjectionHead: "BNrBNrL",
    fnn.SwAVProjectionHead: "BNrB",
    fnn.MSNProjectionHead: "BNgBNgB",
}


def letter(layer):
    if isinstance(layer, nn.Linear):
        return "L" if layer.bias is None else "B"
    if isinstance(layer, nn.BatchNorm1d):
        return "N" if layer.affine else "n"
    return {nn.ReLU: "r", nn.GELU: "g"}[type(layer)]


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_and_widths(kind):
    head = kind(6, 5, 4)
    assert "".join(letter(layer) for layer in head) == LAYERS[kind]
    assert [(m.in_features, m.out_features) for m in head if isinstance(m, nn.Linear)] == {
        2: [(6, 5), (5, 4)],
        3: [(6, 5), (5, 5), (5, 4)],
    }[sum(isinstance(m, nn.Linear) for m in head)]


def test_moco_v3():
    head = fnn.MoCoProjectionHead(6, 5, 4, num_layers=3, batch_norm=True)
    assert "".join(letter(layer) for layer in head) == "LNrLNrLn"
    assert letter(fnn.MoCoPredictionHead(6, 5, 4, last_norm=False)[-1]) == "L"


def test_swav_keys_and_arithmetic():
    head = fnn.SwAVProjectionHead(6, 5, 4).eval()
    assert list(head.state_dict())[:2] == ["0.weight", "0.bias"] and "3.bias" in head.state_dict()
    x = torch.randn(3, 6)
    hidden = F.relu(F.linear(x, head[0].weight, head[0].bias) / (1 + 1e-5) ** 0.5)
    torch.testing.assert_close(head(x), F.linear(hidden, head[3].weight, head[3].bias))


def test_swav_prototypes():
    prototypes = fnn.SwAVPrototypes(4, 7)
    prototypes.normalize_()
    torch.testing.assert_close(prototypes.weight.norm(dim=1), torch.ones(7))
    assert list(prototypes.state_dict()) == ["weight"]
    x = torch.randn(3, 4)
    result = prototypes(x, loss=lambda scores, weight: (scores - x @ weight.T).abs().max())
    assert result < 1e-6


def test_bad_widths_are_named():
    with pytest.raises(ValueError, match="hidden_dim must be at least 1, got 0"):
        fnn.BYOLProjectionHead(6, 0, 6)
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        fnn.SimCLRProjectionHead(num_layers=0)
