"""Methods of several views in the trainer: resumed, and the same on several ranks."""

from __future__ import annotations

import pytest
import torch

from fastssl import distributed
from fastssl.training import checkpoint
from fastssl.training.loop import Run, train
from tests.training.tiny import (
    assert_same_tensors,
    saved_tensors,
    tiny_config,
    train_interrupted,
)

pytestmark = pytest.mark.usefixtures("no_report")

RESNET = ["model.name=resnet18", "model.args={width: 8}", "views.image_size=32"]
VIT = [
    "model.name=VisionTransformer",
    "model.args={patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}",
    "views.image_size=16",
]
MULTI_CROP = "views.groups=[{number: 2, jitter: 0.8}, {number: 2, size: 8, scale: [0.1, 0.3]}]"
HEAD = "out_dim: 12, hidden_dim: 16, bottleneck_dim: 8"
METHODS = {
    # Batch normalisation in encoder and head, of all ranks together.
    "simclr": [*RESNET, "method={name: simclr, args: {hidden_dim: 16, output_dim: 8}}"],
    # A teacher, a queue.
    "moco_v2": [
        *VIT,
        "method={name: moco_v2, args: {hidden_dim: 16, output_dim: 8, queue_size: 24}}",
    ],
    # A memory bank of every sample.
    "npid": [*VIT, "method={name: npid, args: {output_dim: 8, num_negatives: 5}}"],
    # A teacher, a center, views of two sizes, stochastic depth.
    "dino": [
        *VIT,
        MULTI_CROP,
        "model.args.drop_path_rate=0.1",
        f"method={{name: dino, args: {{{HEAD}}}}}",
    ],
    # Masks, Sinkhorn-Knopp, two heads.
    "dinov2": [
        *VIT,
        MULTI_CROP,
        f"method={{name: dinov2, args: {{{HEAD}, patch_out_dim: 12}}}}",
    ],
    # Assignments between epochs.
    "sela": [
        *VIT,
        MULTI_CROP,
        "views.crops_per_image=4",
        "method={name: sela, args: {hidden_dim: 16, output_dim: 8, n_prototypes: 6, num_heads: 1}}",
    ],
    "vicreg": [*RESNET, "method={name: vicreg, args: {hidden_dim: 16, output_dim: 8}}"],
}
# In the sum over a batch of normalised features float32 differs more than elsewhere.
STEPS = ["train.steps=4", "views.crops_per_image=4", "eval.max_images=0"]


def config_of(name, images, out, *overrides):
    return tiny_config(images, out, *STEPS, *overrides, model=METHODS[name])


@pytest.mark.parametrize("name", METHODS)
def test_resumed_is_bit_identical(images, tmp_path, name):
    straight = train(config_of(name, images, tmp_path, "name=straight"))
    config = config_of(name, images, tmp_path, "name=stopped")
    resumed = train_interrupted(config, 3)
    ends = [checkpoint.complete(folder / "checkpoints")[-1] for folder in (straight, resumed)]
    assert_same_tensors(*(saved_tensors(end) for end in ends))


def state_after(config):
    """Everything that a checkpoint of the method would hold, whole, after all steps."""
    with distributed.session("cpu") as world:
        run = Run(config, world, resume=False)
        while run.step < config.train.steps:
            run.train_step()
        run.log.close()
        return {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in run.method.state_dict().items()
        }


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_end_with_the_state_of_one(gloo_pool, images, tmp_path, name):
    expected = state_after(config_of(name, images, tmp_path, "name=one"))
    for state in gloo_pool.run(state_after, 2, config_of(name, images, tmp_path, "name=two")):
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-4, msg=key)
