"""SGD, LARS and LAMB in the trainer: chosen by name, resumed, and the same on several ranks."""

from __future__ import annotations

import pytest
import torch

from fastssl import distributed
from fastssl.optim import LAMB, LARS
from fastssl.training import checkpoint, setup
from fastssl.training.config import describe
from fastssl.training.loop import Run, train
from tests.training.tiny import (
    assert_same_tensors,
    saved_tensors,
    tiny_config,
    train_interrupted,
)

pytestmark = pytest.mark.usefixtures("no_report")

NAMES = {
    "sgd": ["optim.name=sgd", "optim.momentum=0.8"],
    "lars": ["optim.name=lars", "optim.trust_coefficient=0.1", "optim.momentum=0.8"],
    "lamb": ["optim.name=lamb"],
}


def parameters_after(config):
    """Every parameter, whole, after all steps of the loop."""
    with distributed.session("cpu") as world:
        run = Run(config, world, resume=False)
        while run.step < config.train.steps:
            run.train_step()
        run.log.close()
        return {
            n: p.detach().full_tensor() if world.size > 1 else p.detach()
            for n, p in run.method.named_parameters()
        }


def test_the_configuration_reaches_the_optimizer(images, tmp_path):
    with distributed.session("cpu") as world:
        config = tiny_config(images, tmp_path, *NAMES["lars"])
        train_set, _ = setup.datasets(config)
        _, lars = setup.method_and_optimizer(config, world, train_set)
        _, sgd = setup.method_and_optimizer(
            tiny_config(images, tmp_path, *NAMES["sgd"]), world, train_set
        )
        config = tiny_config(images, tmp_path, *NAMES["lamb"], "optim.betas=[0.8, 0.99]")
        _, lamb = setup.method_and_optimizer(config, world, train_set)
    assert isinstance(lars, LARS) and isinstance(lamb, LAMB)
    assert {(g["momentum"], g["trust_coefficient"]) for g in lars.param_groups} == {(0.8, 0.1)}
    assert {(g["betas"], g["eps"]) for g in lamb.param_groups} == {((0.8, 0.99), 1e-4)}
    assert {g["momentum"] for g in sgd.param_groups} == {0.8}
    assert {g["decay"] for g in lars.param_groups} == {True, False}


def test_mistakes_and_help(images, tmp_path):
    with pytest.raises(ValueError, match="must be one of adamw, sgd, lars, lamb, got 'lar'"):
        tiny_config(images, tmp_path, "optim.name=lar")
    config = tiny_config(images, tmp_path, "optim.name=lars", "optim.momentum=1.5")
    train_set, _ = setup.datasets(config)
    with distributed.session("cpu") as world, pytest.raises(ValueError, match="momentum must be"):
        setup.method_and_optimizer(config, world, train_set)
    assert "  optim.name=adamw  [str] adamw; sgd with momentum; lars" in describe()


@pytest.mark.parametrize("name", NAMES)
def test_resumed_is_bit_identical(images, tmp_path, name):
    straight = train(tiny_config(images, tmp_path, "name=straight", *NAMES[name]))
    config = tiny_config(images, tmp_path, "name=stopped", *NAMES[name])
    resumed = train_interrupted(config, 3)
    ends = [checkpoint.complete(folder / "checkpoints")[-1] for folder in (straight, resumed)]
    first, second = (saved_tensors(end) for end in ends)
    assert any(".momentum_buffer" in key or ".exp_avg_sq" in key for key in first)
    assert_same_tensors(first, second)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_end_with_the_parameters_of_one(gloo_pool, images, tmp_path, name):
    expected = parameters_after(tiny_config(images, tmp_path, "name=one", *NAMES[name]))
    many = tiny_config(images, tmp_path, "name=many", "train.accumulation=2", *NAMES[name])
    for parameters in gloo_pool.run(parameters_after, 2, many):
        for key, value in expected.items():
            torch.testing.assert_close(parameters[key], value, rtol=1e-4, atol=1e-5, msg=key)
