"""save_pretrained, from_pretrained and push_to_hub, beside huggingface_hub's own mixin."""

from __future__ import annotations

import copy
import json
import sys
from functools import partial

import huggingface_hub
import pytest
import torch
from torch import nn

from fastssl import models
from fastssl.models import VisionTransformer, hub
from tests.models.vit_keys import randomise

VIT = {"img_size": (16, 32), "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
HIERA = {"input_size": (32, 64), "embed_dim": 8, "stages": (1, 1, 1), "q_pool": 2}
MODELS = {
    "vit_small": VIT | {"init_values": 0.1, "num_register_tokens": 2, "ffn_layer": "swiglu"},
    "VisionTransformer": VIT | {"norm_layer": partial(nn.LayerNorm, eps=1e-3)},
    "MaskedAutoencoderViT": VIT | DECODER,
    "mae_vit_base_patch16": VIT | DECODER | {"norm_pix_loss": True},
    "hiera_tiny_224": HIERA | {"num_classes": 5},
    "mae_hiera_tiny_224": HIERA | DECODER,
    "resnet18": {"depths": (1, 1, 1, 1), "width": 8},
    "xcit_nano_12": {"embed_dim": 16, "depth": 1, "num_heads": 2},
}


def small(name: str) -> nn.Module:
    model = getattr(models, name)(**MODELS[name])
    randomise(model)
    return model.eval()


def same_tensors(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def run(model: nn.Module) -> torch.Tensor:
    images = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return getattr(model, "features", model)(images)


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, tmp_path):
    model = small(name)
    model.save_pretrained(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    back = type(model).from_pretrained(tmp_path / "model")
    assert same_tensors(model, back) and not back.training
    assert torch.equal(run(back), run(model))
    again = tmp_path / "again"
    back.save_pretrained(again)
    for file in again.iterdir():
        assert file.read_bytes() == (tmp_path / "model" / file.name).read_bytes()


@pytest.mark.parametrize(
    "name", ["VisionTransformer", "MaskedAutoencoderViT", "mae_hiera_tiny_224"]
)
def test_files_are_those_of_the_mixin(name, tmp_path):
    model = small(name)

    class Theirs(huggingface_hub.PyTorchModelHubMixin, type(model)):
        pass

    model.save_pretrained(tmp_path / "ours")
    theirs = Theirs.from_pretrained(tmp_path / "ours")
    assert same_tensors(model, theirs)
    assert torch.equal(run(theirs), run(model))
    theirs.save_pretrained(tmp_path / "theirs")
    back = type(model).from_pretrained(tmp_path / "theirs")
    assert same_tensors(model, back)
    assert torch.equal(run(back), run(model))


def test_a_copy_remembers_its_arguments():
    model = small("mae_hiera_tiny_224")
    assert copy.deepcopy(model).arguments.keys() == model.arguments.keys()
    assert model.arguments["q_pool"] == 2 and model.arguments["decoder_depth"] == 1
    assert model.arguments["mlp_ratio"] == 4.0, "a default"


def test_arguments_before_those_of_the_file(tmp_path):
    model = small("vit_small")
    model.save_pretrained(tmp_path)
    other = VisionTransformer.from_pretrained(tmp_path, global_pool="avg")
    assert other.global_pool == "avg" and other.arguments["num_register_tokens"] == 2
    assert same_tensors(other, model)
    small_square = models.vit_small(**MODELS["vit_small"] | {"img_size": 16})
    small_square.save_pretrained(tmp_path)
    other = VisionTransformer.from_pretrained(tmp_path, img_size=64)
    assert other.grid_size == (8, 8)
    assert torch.equal(other.register_tokens, small_square.register_tokens)


def test_what_does_not_fit_is_said(tmp_path):
    small("VisionTransformer").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config.json must be of a ResNet, which has no .*depth"):
        models.ResNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="'bert', not known here, got VisionTransformer"):
        VisionTransformer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold keywords, got list"):
        VisionTransformer.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        VisionTransformer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="must be a folder, or user/model"):
        VisionTransformer.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"norm_layer must be a name in torch\.nn"):
        VisionTransformer(**VIT, norm_layer="LayerNorms")
    model = VisionTransformer(**VIT, norm_layer=lambda dim: nn.LayerNorm(dim))
    with pytest.raises(ValueError, match=r"cannot write the argument norm_layer = <function"):
        model.save_pretrained(tmp_path)


def test_repositories_are_downloaded(tmp_path, monkeypatch):
    model = small("VisionTransformer")
    model.save_pretrained(tmp_path)
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    back = VisionTransformer.from_pretrained("someone/vit", revision="v1", token="secret")
    assert same_tensors(model, back)
    assert asked["name"] == "someone/vit" and asked["revision"] == "v1"
    assert asked["token"] == "secret" and "*.safetensors" in asked["allow_patterns"]
    # A repository from before safetensors.
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert same_tensors(VisionTransformer.from_pretrained("someone/vit"), model)
    assert asked["allow_patterns"] == ["pytorch_model.bin"]


def test_pushing(tmp_path, monkeypatch):
    uploaded = {}

    class Api:
        def __init__(self, token):
            assert token == "secret"

        def create_repo(self, repo_id, private, exist_ok):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/someone/{repo_id}")

        def upload_folder(self, repo_id, folder_path, commit_message, revision):
            back = VisionTransformer.from_pretrained(folder_path)
            uploaded.update(repo_id=repo_id, model=back, revision=revision)
            return "https://huggingface.co/someone/vit/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = small("VisionTransformer")
    url = model.push_to_hub("vit", token="secret", branch="new")
    assert url.endswith("commit/1")
    assert uploaded["repo_id"] == "someone/vit" and uploaded["revision"] == "new"
    assert same_tensors(uploaded["model"], model)


def test_without_huggingface_hub_folders_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model = small("VisionTransformer")
    model.save_pretrained(tmp_path)
    assert same_tensors(VisionTransformer.from_pretrained(tmp_path), model)
    with pytest.raises(ImportError, match=r"pip install 'fastssl\[hub\]'"):
        VisionTransformer.from_pretrained("someone/vit")
    with pytest.raises(ImportError, match=r"pip install 'fastssl\[hub\]'"):
        model.push_to_hub("someone/vit")


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="needs safetensors: pip install safetensors"):
        hub.save_tensors(tmp_path / "x.safetensors", {})
