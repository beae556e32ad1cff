"""The recipes of published runs say what was published, and can be built."""

import functools

import pytest
import torch

from fastssl.methods import Method
from fastssl.training.config import Config, load
from fastssl.training.setup import kinds_of_views, method_of, scheduled

NUM_IMAGES = 1281167  # of ImageNet-1k
NUM_SAMPLES = 2**14  # of what is built here, since banks have their memory

# Recipe: epochs, global batch, learning rate after the warm-up, epochs of warm-up.
RUNS = {
    "simclr_resnet50": (1000, 4096, 4.8, 10),
    "moco_v1_resnet50": (200, 256, 0.03, 0),
    "moco_v2_resnet50": (800, 256, 0.03, 0),
    "moco_v3_vit_small": (300, 4096, 2.4e-3, 40),
    "moco_v3_vit_base": (300, 4096, 2.4e-3, 40),
    "moco_v3_resnet50": (300, 4096, 4.8, 10),
    "npid_resnet50": (200, 256, 0.03, 0),
    "pirl_resnet50": (800, 1024, 0.12, 0),
    "cpc_resnet50": (200, 512, 2e-4, 5),
    "swav_resnet50": (800, 4096, 4.8, 10),
    "deepcluster_v2_resnet50": (800, 4096, 4.8, 10),
    "sela_resnet50": (400, 4096, 4.8, 10),
    "byol_resnet50": (1000, 4096, 3.2, 10),
    "simsiam_resnet50": (100, 512, 0.1, 0),
    "dino_vit_small": (300, 1024, 2e-3, 10),
    "dino_vit_base": (400, 1024, 3e-3, 10),
    "dino_resnet50": (800, 4096, 4.8, 10),
    "dino_xcit_small": (300, 1024, 1e-3, 10),
    "ibot_vit_small": (800, 1024, 2e-3, 10),
    "ibot_vit_base": (400, 1024, 3e-3, 10),
    "dinov2_vit_large": (200, 2048, 4e-3 * 2**0.5, 20),
    "msn_vit_small": (800, 1024, 1e-3, 15),
    "ijepa_vit_huge": (300, 2048, 1e-3, 15),
    "data2vec_vit_base": (800, 2048, 2e-3, 40),
    "barlow_twins_resnet50": (1000, 2048, 1.6, 10),
    "vicreg_resnet50": (1000, 2048, 1.6, 10),
    "rotation_resnet50": (105, 256, 0.1, 0),
    "context_prediction_resnet50": (105, 256, 0.1, 5),
    "exemplar_resnet50": (105, 256, 0.1, 5),
}
# Views of an image that are not two of 224 pixels: the side of each.
VIEWS = {
    "npid_resnet50": [224],
    "pirl_resnet50": [224, 255],
    "cpc_resnet50": [256],
    "swav_resnet50": [224] * 2 + [96] * 6,
    "deepcluster_v2_resnet50": [224] * 2 + [96] * 6,
    "sela_resnet50": [224] * 2 + [96] * 6,
    "dino_vit_small": [224] * 2 + [96] * 8,
    "dino_vit_base": [224] * 2 + [96] * 10,
    "dino_resnet50": [224] * 2 + [96] * 6,
    "dino_xcit_small": [224] * 2 + [96] * 8,
    "ibot_vit_small": [224] * 2 + [96] * 10,
    "ibot_vit_base": [224] * 2 + [96] * 10,
    "dinov2_vit_large": [224] * 2 + [96] * 8,
    "msn_vit_small": [224] * 2 + [96] * 10,
    "ijepa_vit_huge": [224],
    "data2vec_vit_base": [224],
    "rotation_resnet50": [224],
    "context_prediction_resnet50": [400],
    "exemplar_resnet50": [224],
}


@functools.cache
def built(name: str) -> tuple[Config, Method]:
    """The recipe and its method, without memory for the parameters."""
    config = load(name)
    with torch.device("meta"):
        return config, method_of(
            config,
            num_samples=NUM_SAMPLES,
            steps_per_epoch=NUM_IMAGES // config.train.global_batch_size,
        )


@pytest.mark.parametrize("name", RUNS)
def test_steps_and_learning_rate_are_those_of_the_run(name):
    epochs, batch, peak, warmup = RUNS[name]
    config = load(name)
    per_epoch = NUM_IMAGES // batch
    assert config.train.global_batch_size == batch
    assert config.train.steps == epochs * per_epoch
    assert config.schedules.lr.warmup_steps == warmup * per_epoch
    at_peak = scheduled(config, warmup * per_epoch)["lr"]
    assert at_peak == pytest.approx(peak, rel=1e-6)
    first, last = (scheduled(config, step)["lr"] for step in (0, config.train.steps - 1))
    limit = 0.01 * peak * (1 + 1e-6)
    assert last < limit or name == "dino_xcit_small", "the cosine has ended, or the last step"
    assert first < peak or not warmup


@pytest.mark.parametrize("name", RUNS)
def test_method_and_views_can_be_built(name):
    config, method = built(name)
    assert sum(p.numel() for p in method.parameters()) > 2e7
    sides = [view.size[0] for view in kinds_of_views(config) for _ in range(view.number)]
    assert sides == VIEWS.get(name, [224, 224])


@pytest.mark.parametrize("name", RUNS)
def test_every_schedule_of_a_recipe_is_used(name):
    config, method = built(name)
    schedules = config.schedules
    for of_the_method in ("teacher_momentum", "teacher_temp"):
        assert getattr(schedules, of_the_method) is None or of_the_method in method.schedules
    layers = {part for n, _ in method.named_parameters() for part in n.split(".")}
    assert schedules.last_layer_lr is None or "last_layer" in layers
    for step in (0, config.train.steps // 2, config.train.steps - 1):
        values = scheduled(config, step)
        assert values["weight_decay"] > 0
        assert 0.9 < values.get("teacher_momentum", 0.99) <= 1
        assert 0.03 < values.get("teacher_temp", 0.04) <= 0.0701


def test_self_distillation_warms_up_as_published():
    """The last layer waits for an epoch, the teacher's temperature rises for 30."""
    config, per_epoch = load("dino_vit_small"), 1251
    waiting = scheduled(config, per_epoch - 1)
    assert (waiting["last_layer_lr"], waiting["teacher_momentum"]) == (0.0, pytest.approx(0.996))
    assert scheduled(config, per_epoch)["last_layer_lr"] == 1.0
    temps = [scheduled(config, e * per_epoch)["teacher_temp"] for e in (0, 15, 30, 200)]
    assert temps == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert scheduled(config, config.train.steps - 1)["weight_decay"] == pytest.approx(0.4)


def test_swav_takes_up_the_rate_where_it_starts():
    config = load("swav_resnet50")
    rates = [scheduled(config, step)["lr"] for step in (0, 1560, 3120, config.train.steps - 1)]
    assert rates == pytest.approx([0.3, 2.55, 4.8, 0.0048], rel=1e-4)
