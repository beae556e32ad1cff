"""torch.hub.load on this checkout."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from fastssl import models

REPOSITORY = str(Path(__file__).parents[2])
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}


def load(name: str, **kwargs) -> torch.nn.Module:
    return torch.hub.load(REPOSITORY, name, source="local", **kwargs)


def test_entry_points_are_the_factories():
    names = runpy.run_path(f"{REPOSITORY}/hubconf.py")
    assert names["dependencies"] == ["torch", "numpy"]
    # As torch.hub.list tells them from others.
    entries = {n for n, value in names.items() if callable(value) and not n.startswith("_")}
    assert entries == {name for name in models.FACTORIES if name.islower()}
    assert {"vit_small", "hiera_base_224", "mae_vit_base_patch16", "resnet50"} <= entries
    assert names["vit_small"].__doc__.startswith("ViT-S")


def test_pretrained_is_a_file_or_a_folder(tmp_path):
    source = models.vit_small(**VIT)
    torch.save({"teacher": source.state_dict()}, tmp_path / "vit.pth")
    source.save_pretrained(tmp_path / "vit")
    for place in (tmp_path / "vit.pth", str(tmp_path / "vit")):
        model = load("vit_small", pretrained=place, **VIT)
        assert torch.equal(model.pos_embed, source.pos_embed)
    assert not torch.equal(load("vit_small", **VIT).pos_embed, source.pos_embed)
    with pytest.raises(ValueError, match="fastssl releases no weights of its own"):
        load("vit_small", pretrained=True, **VIT)
    with pytest.raises(FileNotFoundError, match="must be a folder, or user/model"):
        load("vit_small", pretrained=tmp_path / "nowhere.pth", **VIT)
