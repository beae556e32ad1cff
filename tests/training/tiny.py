"""A run that takes a second: tiny images, a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from fastssl.training.config import Config, load
from fastssl.training.loop import Run, train

VIT = [
    "model.name=MaskedAutoencoderViT",
    "model.args={patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2, decoder_embed_dim: 16,"
    " decoder_depth: 1, decoder_num_heads: 2, norm_pix_loss: true}",
    "views.image_size=16",
    "method={name: mae, args: {mask_ratio: 0.5}}",
]
HIERA = [
    "model.name=MaskedAutoencoderHiera",
    "model.args={embed_dim: 8, stages: [1, 1, 1], q_pool: 2, mask_unit_attn: [true, false, false],"
    " decoder_embed_dim: 16, decoder_depth: 1, decoder_num_heads: 2}",
    "views.image_size=64",
    "method={name: hiera_mae, args: {mask_ratio: 0.5}}",
]
DINO = [
    "model={name: VisionTransformer, args: {patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}}",
    "views={image_size: 16, groups: [{number: 2}, {number: 1, size: 8}]}",
    "method={name: dino, args: {out_dim: 16, hidden_dim: 16, bottleneck_dim: 8}}",
]
# The second block drops branches of a sample at the highest rate at which it computes all.
DROPPING = [*DINO, "model.args.drop_path_rate=0.1"]


def make_images(folder: Path, number: int = 4) -> Path:
    """Smooth colour pictures, each with a look of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[0:48, 0:64] / 64
    for i in range(number):
        waves = [np.sin((i + 2) * (x * (c + 1) + y * (3 - c)) + c) for c in range(3)]
        pixels = np.stack(waves, axis=-1) * 110 + 128
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def tiny_config(data: Path, out: Path, *overrides: str, model: list[str] = VIT) -> Config:
    """The configuration of a tiny run, whatever the recipe it starts from."""
    empty = out / "tiny.yaml"
    out.mkdir(parents=True, exist_ok=True)
    empty.write_text("{}\n")
    return load(
        str(empty),
        [
            f"data={data}",
            f"out={out}",
            *model,
            "train={steps: 6, global_batch_size: 8, device: cpu}",
            "schedules={lr: {base: 0.05, warmup_steps: 2}, weight_decay: {base: 0.1, final: 0.2}}",
            # With a small eps, AdamW makes a step out of the rounding noise of a zero gradient.
            "optim={eps: 1.0e-4, clip_grad: 0.1}",
            "eval={crops: 2, max_images: 4, batch_size: 8, pictures: 2, scale: [0.5, 1.0]}",
            "log={every: 1, tensorboard: false}",
            "checkpoint.every=2",
            *overrides,
        ],
    )


def saved_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, by dotted name."""
    file = checkpoint.parent / f"{checkpoint.name}.pt"
    dcp_to_torch_save(checkpoint, file)
    content = torch.load(file)
    file.unlink()
    return {f"{part}.{name}": t for part in content for name, t in content[part].items()}


def train_interrupted(config: Config, step: int) -> Path:
    """The folder of a run whose process died after `step` steps and that was then resumed."""
    real = Run.train_step

    def train_step(run: Run) -> None:
        if run.step == step:
            raise KeyError("the machine went away")
        real(run)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(Run, "train_step", train_step)
        train(config)
    return train(config, resume=True)


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """The same names and the same bits."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []
