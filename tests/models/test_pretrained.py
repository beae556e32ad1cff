"""load_pretrained on synthetic files in the layouts that the official repositories release."""

import argparse
import io
import logging
import os
import pathlib
import pickle
import random

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastssl.models import (
    Hiera,
    MaskedAutoencoderHiera,
    MaskedAutoencoderViT,
    VisionTransformer,
    hiera_base_16x224,
    load_pretrained,
)
from fastssl.nn import interpolate_pos_embed
from tests.models.vit_keys import randomise

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
ARGS = argparse.Namespace(arch="vit_small", lr=1e-3, data_path="/data")


def vit(**kwargs) -> VisionTransformer:
    model = VisionTransformer(**SMALL | kwargs)
    randomise(model)
    return model


def mae(**kwargs) -> MaskedAutoencoderViT:
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}
    model = MaskedAutoencoderViT(**SMALL | decoder | kwargs)
    randomise(model)
    return model


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


def in_chunks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """dinov2's keys with two blocks a chunk: blocks.<chunk>.<block of all>."""
    out = {}
    for key, tensor in state.items():
        _, *rest = key.split(".")
        if key.startswith("blocks."):
            key = f"blocks.{int(rest[0]) // 2}." + ".".join(rest)
        out[key] = tensor
    return out


def dino_full(state: dict[str, Tensor]) -> dict:
    other = {key: tensor + 1 for key, tensor in state.items()}
    head = {"mlp.0.weight": torch.zeros(3, 24), "last_layer.weight_g": torch.ones(5, 1)}
    student = prefixed("backbone.", other) | prefixed("head.", head)
    return {
        "student": prefixed("module.", student),
        "teacher": prefixed("backbone.", state) | prefixed("head.", head),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 100,
        "args": ARGS,
        "dino_loss": {"center": torch.zeros(1, 5)},
    }


def dinov2_teacher(state: dict[str, Tensor]) -> dict:
    heads = {"dino_head.mlp.0.weight": torch.zeros(3, 24), "ibot_head.mlp.0.weight": torch.zeros(3)}
    return {"teacher": prefixed("backbone.", in_chunks(state)) | heads}


LAYOUTS = {
    "plain": (lambda state: state, []),
    "mae": (lambda state: {"model": state}, []),
    "mae_resume": (lambda state: {"model": state, "epoch": 7, "scaler": {}, "args": ARGS}, []),
    "hiera": (lambda state: {"model_state": state}, []),
    "dino_full": (dino_full, ["head.mlp.0.weight", "head.last_layer.weight_g"]),
    "dinov2": (in_chunks, []),
    "dinov2_teacher": (dinov2_teacher, ["dino_head.mlp.0.weight", "ibot_head.mlp.0.weight"]),
    "ddp_compiled": (lambda state: {"state_dict": prefixed("module._orig_mod.", state)}, []),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_official_layouts(layout, tmp_path):
    wrap, unexpected = LAYOUTS[layout]
    source, model = vit(init_values=0.5), vit(init_values=0.5)
    torch.save(wrap(source.state_dict()), tmp_path / "weights.pth")
    report = load_pretrained(model, tmp_path / "weights.pth")
    assert report.missing == report.mismatched == report.resampled == []
    assert sorted(report.unexpected) == sorted(unexpected)
    assert sorted(report.loaded) == sorted(model.state_dict())
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_checkpoint_key_chooses_the_student(tmp_path):
    source, model = vit(), vit()
    torch.save(dino_full(source.state_dict()), tmp_path / "dino.pth")
    load_pretrained(model, str(tmp_path / "dino.pth"), checkpoint_key="student")
    assert torch.equal(model.norm.weight, source.norm.weight + 1)
    with pytest.raises(ValueError, match=r"which has student, teacher, .*; got 'ema'"):
        load_pretrained(model, tmp_path / "dino.pth", checkpoint_key="ema")


def test_safetensors(tmp_path):
    source, model = vit(), vit()
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    assert load_pretrained(model, tmp_path / "model.safetensors", strict=True).complete
    assert torch.equal(model.pos_embed, source.pos_embed)
    (tmp_path / "broken.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_pretrained(model, tmp_path / "broken.safetensors")


def test_encoder_file_into_a_whole_autoencoder_reports_the_decoder(tmp_path, caplog):
    source, model = mae(), mae()
    encoder = {k: v for k, v in source.state_dict().items() if "decoder" not in k}
    del encoder["mask_token"]
    torch.save({"model": encoder}, tmp_path / "mae.pth")
    before = model.decoder_pred.weight.clone()
    with caplog.at_level(logging.INFO, logger="fastssl"):
        report = load_pretrained(model, tmp_path / "mae.pth")
    decoder = [k for k in model.state_dict() if "decoder" in k or k == "mask_token"]
    assert sorted(report.missing) == sorted(decoder) and report.unexpected == []
    assert torch.equal(model.decoder_pred.weight, before)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message == (
        f"loaded {len(encoder)} tensors from {tmp_path / 'mae.pth'}; not in the file, as "
        "initialised: mask_token, decoder_pos_embed, decoder_embed (2), decoder_blocks (24), "
        "decoder_norm (2), decoder_pred (2)"
    )


def test_autoencoder_file_into_an_encoder_gives_its_features(tmp_path):
    source, model = mae(norm_layer=lambda dim: nn.LayerNorm(dim, eps=1e-6)), vit()
    torch.save({"model": source.state_dict()}, tmp_path / "mae.pth")
    report = load_pretrained(model, tmp_path / "mae.pth")
    assert report.missing == [] and "decoder_pred.weight" in report.unexpected
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.features(images), source.features(images))


def test_strict_refuses_and_leaves_the_model_alone(tmp_path):
    state = vit().state_dict()
    del state["norm.bias"]
    torch.save(state | {"extra": torch.zeros(1)}, tmp_path / "w.pth")
    model = vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"initialised: norm\.bias; in the file, not used: extra"):
        load_pretrained(model, tmp_path / "w.pth", strict=True)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("old_grid, new_size", [(None, (48, 24)), ((2, 8), (32, 32))])
def test_position_embeddings_are_resampled(old_grid, new_size, tmp_path):
    rows, columns = old_grid or (4, 4)
    source, model = mae(img_size=(8 * rows, 8 * columns)), mae(img_size=new_size)
    torch.save({"model": source.state_dict()}, tmp_path / "mae.pth")
    report = load_pretrained(model, tmp_path / "mae.pth", old_grid=old_grid)
    assert report.resampled == ["pos_embed", "decoder_pos_embed"] and report.complete
    for name in report.resampled:
        old = getattr(source, name)
        grid = old[:, 1:].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(grid, size=model.grid_size, mode="bicubic")
        expected = torch.cat([old[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
        assert torch.equal(getattr(model, name), expected)


def test_register_models_are_resampled_with_antialiasing(tmp_path):
    config = {"num_register_tokens": 2, "interpolate_antialias": True}
    source, model = vit(img_size=64, **config), vit(**config)
    torch.save(source.state_dict(), tmp_path / "reg.pth")
    report = load_pretrained(model, tmp_path / "reg.pth", strict=True)
    assert report.resampled == ["pos_embed"]
    grid = source.pos_embed[:, 1:].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(4, 4), mode="bicubic", antialias=True)
    assert torch.equal(model.pos_embed[:, 1:], grid.flatten(2).transpose(1, 2))


def clip_hiera(input_size: tuple[int, int, int], sep_pos_embed: bool):
    """A small Hiera for clips: 2 frames and 4 x 4 pixels a token, mask units of 8 x 8 tokens."""
    config = {"embed_dim": 8, "stages": (1, 1, 1, 1), "num_classes": 0}
    return hiera_base_16x224(**config, input_size=input_size, sep_pos_embed=sep_pos_embed)


def test_position_embeddings_of_space_and_of_time_are_resampled(tmp_path):
    source, model = clip_hiera((8, 32, 32), True), clip_hiera((14, 64, 32), True)
    torch.save({"model_state": source.state_dict()}, tmp_path / "hiera.pth")
    for old_grid in (None, (8, 8)):
        report = load_pretrained(model, tmp_path / "hiera.pth", strict=True, old_grid=old_grid)
        assert report.resampled == ["pos_embed_spatial", "pos_embed_temporal"]
        space = interpolate_pos_embed(source.pos_embed_spatial, (8, 8), (16, 8))
        time = interpolate_pos_embed(source.pos_embed_temporal, (4,), (7,))
        assert torch.equal(model.pos_embed_spatial, space)
        assert torch.equal(model.pos_embed_temporal, time)


@pytest.mark.parametrize(
    "frames, old_grid", [(4, None), (7, (4, 8, 8)), (7, {"pos_embed": (4, 8, 8)})]
)
def test_position_embeddings_of_clips_are_resampled(frames, old_grid, tmp_path):
    source, model = clip_hiera((8, 32, 32), False), clip_hiera((2 * frames, 64, 32), False)
    torch.save({"model_state": source.state_dict()}, tmp_path / "hiera.pth")
    report = load_pretrained(model, tmp_path / "hiera.pth", strict=True, old_grid=old_grid)
    assert report.resampled == ["pos_embed"]
    expected = interpolate_pos_embed(source.pos_embed, (4, 8, 8), (frames, 16, 8))
    assert torch.equal(model.pos_embed, expected)


def test_position_embedding_of_an_unknown_oblong_grid(tmp_path):
    torch.save(vit(img_size=(16, 24)).state_dict(), tmp_path / "w.pth")
    for old_grid in (None, (2, 4), (6,), (1, 2, 3)):
        with pytest.raises(ValueError, match="must be 2 sides of the 6 tokens in pos_embed"):
            load_pretrained(vit(), tmp_path / "w.pth", old_grid=old_grid)


def test_other_shapes_are_an_error_or_reported(tmp_path):
    source, model = vit(num_classes=10), vit(num_classes=5)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"2 tensors .*: head.weight \[10, 24\] for \[5, 24\], "):
        load_pretrained(model, tmp_path / "w.pth")
    head = model.head.weight.clone()
    report = load_pretrained(model, tmp_path / "w.pth", ignore_mismatched_sizes=True)
    assert report.mismatched == ["head.weight", "head.bias"] and report.missing == []
    assert not report.complete
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.norm.weight, source.norm.weight)


def test_weights_are_cast_to_the_models_dtype(tmp_path):
    source, model = vit(), vit()
    torch.save({k: v.half() for k, v in source.state_dict().items()}, tmp_path / "half.pth")
    load_pretrained(model, tmp_path / "half.pth")
    assert model.norm.weight.dtype == torch.float32
    assert torch.equal(model.norm.weight, source.norm.weight.half().float())


def test_blocks_within_blocks_keep_their_names(tmp_path):
    """As EfficientNets of timm have them; dinov2's chunks are another thing."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            layers = [nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)]
            self.blocks = nn.Sequential(*layers)

    source, model = Net(), Net()
    torch.save(source.state_dict(), tmp_path / "net.pth")
    assert load_pretrained(model, tmp_path / "net.pth", strict=True).complete
    for key, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor)


def test_damaged_files_are_refused_in_words(tmp_path):
    model, draw = nn.Linear(3, 4), random.Random(0)
    contents = []
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        stream = io.BytesIO()
        torch.save({"model": model.state_dict()}, stream, **options)
        contents.append(stream.getvalue())
    read = 0
    for trial in range(300):
        content = bytearray(draw.choice(contents))
        for _ in range(draw.randint(1, 8)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path = tmp_path / "damaged.pth"
        path.write_bytes(content[: draw.choice([len(content), draw.randrange(len(content))])])
        try:
            load_pretrained(nn.Linear(3, 4), path)
            read += 1
        except (ValueError, OSError) as error:
            assert len(str(error).split()) > 3, trial
    assert read < 250


def test_file_of_which_nothing_fits(tmp_path):
    torch.save({"model": {"layer1.0.conv1.weight": torch.zeros(3)}}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"nothing in .* fits VisionTransformer: .*layer1.0.conv1"):
        load_pretrained(vit(), tmp_path / "resnet.pth")
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="must hold a dict of tensors, got list"):
        load_pretrained(vit(), tmp_path / "list.pth")


def test_path_that_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist"):
        load_pretrained(vit(), tmp_path / "nowhere.pth")
    with pytest.raises(IsADirectoryError, match="path must be a checkpoint file, or a folder with"):
        load_pretrained(vit(), tmp_path)
    whole = tmp_path / "whole.pth"
    torch.save(vit().state_dict(), whole)
    not_torch = "it is damaged, or torch has not written it"
    contents = {
        "empty": (b"", not_torch),
        "text": (b"<html>", not_torch),
        "cut": (whole.read_bytes()[:-900], "corrupted"),
    }
    for name, (content, reason) in contents.items():
        (tmp_path / name).write_bytes(content)
        said = rf"{name} is not a checkpoint that torch.load.*{reason}"
        with pytest.raises(ValueError, match=said):
            load_pretrained(vit(), tmp_path / name)


class _Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_file_does_not_run(tmp_path):
    trace = tmp_path / "ran"
    torch.save(vit().state_dict() | {"x": _Payload(str(trace))}, tmp_path / "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"x": _Payload(str(trace))}, protocol=2))
    for name in ("evil.pth", "evil.pkl"):
        with pytest.raises(ValueError, match=r"is not a checkpoint that torch\.load"):
            load_pretrained(vit(), tmp_path / name)
    with pytest.raises(ValueError, match=r"it holds posix\.mkdir, whose loading may run code"):
        load_pretrained(vit(), tmp_path / "evil.pth")
    assert not trace.exists()


def test_released_hiera_into_an_encoder(tmp_path):
    """mae_hiera_*.pth into a Hiera that pools once more; what only the autoencoder has is left."""
    sizes = {"input_size": (64, 64), "embed_dim": 8, "stages": (1, 1, 1, 1)}
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    source = MaskedAutoencoderHiera(**sizes, q_pool=2, **decoder)
    torch.save({"model_state": source.state_dict()}, tmp_path / "mae_hiera_tiny_224.pth")
    model = Hiera(**sizes, q_pool=3, num_classes=0)
    report = load_pretrained(model, tmp_path / "mae_hiera_tiny_224.pth")
    assert report.missing == ["norm.weight", "norm.bias"]
    assert "in the file, not used: mask_token, decoder_pos_embed, encoder_norm (2)," in str(report)
    assert torch.equal(model.blocks[3].mlp.fc1.weight, source.blocks[3].mlp.fc1.weight)


def test_what_training_scripts_save_beside_the_weights(tmp_path):
    import numpy as np

    source, model = vit(), vit()
    content = {"model": source.state_dict(), "args": ARGS, "optimizer": {"state": {0: {}}}}
    content |= {"best": np.float64(0.5), "epoch": np.int64(3), "flag": np.bool_(True)}
    torch.save(content, tmp_path / "checkpoint.pth")
    assert load_pretrained(model, tmp_path / "checkpoint.pth").complete
    content["config"] = pathlib.PurePosixPath("/data")
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"it holds pathlib\.PurePosixPath, whose loading may run"):
        load_pretrained(model, tmp_path / "checkpoint.pth")


def test_whole_method_of_a_run(tmp_path):
    source, other, model = vit(), vit(), vit()
    networks = prefixed("student.backbone.", other.state_dict())
    networks |= prefixed("teacher.backbone.", source.state_dict())
    networks |= {"teacher.head.mlp.weight": torch.ones(3), "loss.center": torch.zeros(1, 5)}
    torch.save({"model": networks, "step": 3}, tmp_path / "checkpoint.pth")
    report = load_pretrained(model, tmp_path / "checkpoint.pth")
    assert report.missing == [] and torch.equal(model.pos_embed, source.pos_embed)
    assert torch.equal(report.unused["head.mlp.weight"], torch.ones(3))
    assert sorted(report.unused) == sorted(report.unexpected)


@pytest.mark.parametrize(
    "name", ["weights.pth", "model.safetensors", "checkpoint.pth", "pytorch_model.bin"]
)
def test_folder_of_a_model(name, tmp_path):
    source, model = vit(), vit()
    if name.endswith("safetensors"):
        save_file(source.state_dict(), tmp_path / name)
    else:
        torch.save({"model": source.state_dict()}, tmp_path / name)
    report = load_pretrained(model, tmp_path, strict=True)
    assert report.path == tmp_path / name
    assert torch.equal(model.pos_embed, source.pos_embed)
