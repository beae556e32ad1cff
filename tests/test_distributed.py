"""Several ranks do what one process does on the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastssl import distributed
from fastssl.distributed import World
from fastssl.training import setup
from fastssl.training.config import dump
from fastssl.training.loop import Run
from tests.training.tiny import (
    HIERA,
    VIT,
    assert_same_tensors,
    make_images,
    saved_tensors,
    tiny_config,
)

MODELS = {"vit": VIT, "hiera": HIERA}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def first_gradients(config):
    """Loss of the first step, this rank's indices, and every gradient, whole."""
    with distributed.session("cpu") as world:
        train_set, _ = setup.datasets(config)
        method, _ = setup.method_and_optimizer(config, world, setup.datasets(config)[0])
        batches = iter(setup.loader(config, train_set, world, 0))
        losses, indices, noises, images = [], [], [], []
        for micro_batch in range(config.train.accumulation):
            batch = next(batches)
            last = micro_batch == config.train.accumulation - 1
            distributed.sync_gradients(method, last)
            loss = method(batch)["loss"]
            (loss / config.train.accumulation).backward()
            losses.append(loss.detach())
            indices.append(batch.index)
            noises.append(method.noise(batch))
            images.append(batch.images)
        loss = distributed.mean({"loss": torch.stack(losses).mean()})["loss"]
        gradients = {
            name: whole(p.grad) for name, p in method.named_parameters() if p.requires_grad
        }
        drawn = [torch.cat(parts) for parts in (indices, noises, images)]
        return loss, drawn, gradients


def parameters_after_training(config):
    """The parameters after all steps of the loop, whole, and the metrics of each step."""
    with distributed.session("cpu") as world:
        run = Run(config, world, resume=False)
        norms = []
        while run.step < config.train.steps:
            run.train_step()
            norms.append(run.meter.flush())
        run.log.close()
        parameters = {n: whole(p.detach()) for n, p in run.method.named_parameters()}
        return parameters, norms


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


WORLDS = [2, pytest.param(4, marks=pytest.mark.slow)]


def ddp_gradients(config, rank, world_size):
    """Gradients of this rank's slice of the first global batch, under torch's own DDP if any."""
    alone = World(rank=0, size=1, device=torch.device("cpu"))
    train_set, _ = setup.datasets(config)
    method, _ = setup.method_and_optimizer(config, alone, train_set)
    batch = next(iter(setup.loader(config, train_set, alone, 0)))
    parts = [tensor.chunk(world_size)[rank] for tensor in (batch.images, batch.index)]
    batch = replace(batch, views=(parts[0],), index=parts[1])
    model = method if world_size == 1 else DistributedDataParallel(method)
    model(batch)["loss"].backward()
    return {name: p.grad for name, p in method.named_parameters() if p.requires_grad}


def gradients_of_ddp(config):
    return ddp_gradients(config, dist.get_rank(), dist.get_world_size())


def test_gradients_under_ddp_are_those_of_one_process(gloo_pool, images, tmp_path):
    config = tiny_config(images, tmp_path)
    expected = ddp_gradients(config, 0, 1)
    for gradients in gloo_pool.run(gradients_of_ddp, 2, config):
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_loss_and_gradients_are_those_of_one_process(
    gloo_pool, images, tmp_path, world_size, model, accumulation
):
    config = tiny_config(images, tmp_path, model=MODELS[model])
    loss, _, gradients = first_gradients(config)
    config.train.accumulation = accumulation
    for of_rank, _, sharded in gloo_pool.run(first_gradients, world_size, config):
        assert of_rank == pytest.approx(loss, rel=1e-6)
        assert sharded.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(sharded[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("world_size", WORLDS)
def test_crops_and_masks_do_not_depend_on_the_number_of_ranks(
    gloo_pool, images, tmp_path, world_size
):
    config = tiny_config(images, tmp_path)
    _, alone, _ = first_gradients(config)
    by_rank = [drawn for _, drawn, _ in gloo_pool.run(first_gradients, world_size, config)]
    for one, parts in zip(alone, zip(*by_rank, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), one)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_parameters_after_training_are_those_of_one_process(
    gloo_pool, images, tmp_path, world_size, model
):
    one = tiny_config(images, tmp_path, "name=one", model=MODELS[model])
    expected, expected_metrics = parameters_after_training(one)
    many = tiny_config(images, tmp_path, "name=many", "train.accumulation=2", model=MODELS[model])
    assert max(metrics["grad_norm"] for metrics in expected_metrics) > one.optim.clip_grad, (
        "clipping takes part"
    )
    for parameters, metrics in gloo_pool.run(parameters_after_training, world_size, many):
        for ours, theirs in zip(metrics, expected_metrics, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        for name, parameter in expected.items():
            torch.testing.assert_close(parameters[name], parameter, rtol=1e-4, atol=1e-5, msg=name)


def sharded_after_features(config):
    with distributed.session("cpu") as world:
        method, _ = setup.method_and_optimizer(config, world, setup.datasets(config)[0])
        with torch.no_grad():
            features = method.features(torch.ones(2, 3, 16, 16))
        distributed.reshard(method)
        held = sum(p.to_local().numel() for p in method.parameters())
        return features, held, sum(p.numel() for p in method.parameters())


def test_each_rank_holds_its_share_also_after_a_forward_without_backward(
    gloo_pool, images, tmp_path
):
    config = tiny_config(images, tmp_path)
    (first, first_held, total), (second, second_held, _) = gloo_pool.run(
        sharded_after_features, 2, config
    )
    assert torch.equal(first, second)
    assert first_held + second_held == total


def drawn_after_setup(config):
    with distributed.session("cpu") as world:
        method, _ = setup.method_and_optimizer(config, world, setup.datasets(config)[0])
        return whole(method.model.cls_token.detach()), torch.rand(4)


def test_ranks_start_with_the_same_weights_and_draw_numbers_of_their_own(
    gloo_pool, images, tmp_path
):
    config = tiny_config(images, tmp_path)
    (token, drawn), (_, other) = gloo_pool.run(drawn_after_setup, 2, config)
    alone, drawn_alone = drawn_after_setup(config)
    assert torch.equal(token, alone)
    assert torch.equal(drawn, drawn_alone)
    assert not torch.equal(drawn, other)


def compiled_losses(config):
    _, metrics = parameters_after_training(config)
    return [m["loss"] for m in metrics]


@pytest.mark.slow
def test_compiled_blocks_under_two_ranks(gloo_pool, images, tmp_path):
    _, expected = parameters_after_training(tiny_config(images, tmp_path, "name=one"))
    many = tiny_config(images, tmp_path, "name=many", "train.compile=true")
    for losses in gloo_pool.run(compiled_losses, 2, many, timeout=600):
        assert losses == pytest.approx([m["loss"] for m in expected], rel=1e-4)


def collectives():
    rank = dist.get_rank()
    distributed.barrier()
    values = distributed.mean({"a": torch.tensor(float(rank)), "b": torch.tensor(2.0)})
    flags = [distributed.any_rank(rank == 1), distributed.any_rank(False)]
    called = []

    def on_rank_0():
        called.append(rank)
        return "made by 0"

    made = distributed.on_main(on_rank_0)
    try:
        distributed.on_main(lambda: 1 / 0)
        raised = None
    except ZeroDivisionError as error:
        raised = str(error)
    return values, flags, distributed.gather(rank * 10), made, called, raised


def test_collectives(gloo_pool):
    for rank, (values, flags, gathered, made, called, raised) in enumerate(
        gloo_pool.run(collectives, 2)
    ):
        assert values == {"a": 0.5, "b": 2.0}
        assert flags == [True, False]
        assert gathered == [0, 10]
        assert made == "made by 0"
        assert called == ([0] if rank == 0 else [])
        assert raised == "division by zero"


def test_a_process_alone_needs_no_group():
    with distributed.session("cpu") as world:
        assert world == World(0, 1, torch.device("cpu"))
        assert not dist.is_initialized()
        distributed.barrier()
        assert distributed.mean({"a": torch.tensor(3.0)}) == {"a": 3.0}
        assert distributed.mean({}) == {}
        assert distributed.any_rank(True) and not distributed.any_rank(False)
        assert distributed.gather("x") == ["x"]
        with pytest.raises(KeyError, match="no"):
            distributed.on_main(lambda: {}["no"])


def group_of_the_session():
    """Joins by torchrun's variables, where no group exists yet, and leaves it again."""
    import socket

    dist.destroy_process_group()
    if os.environ["RANK"] == "0":
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(s.getsockname()[1])
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    with distributed.session("cpu") as world:
        during = (world.rank, world.size, dist.get_backend(), distributed.any_rank(True))
    after = dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return during, after


def test_session_joins_and_leaves_the_group_of_torchrun(gloo_pool):
    [(during, after)] = gloo_pool.run(group_of_the_session, 1)
    assert during == (0, 1, "gloo", True)
    assert not after


def test_devices_are_named():
    with pytest.raises(ValueError, match="device must be one of auto, cpu, cuda, got 'gpu'"):
        distributed.choose_device("gpu")
    assert distributed.choose_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert distributed.choose_device("auto") == torch.device("cpu")
        with pytest.raises(ValueError, match="sees no GPU, got 'cuda'"):
            distributed.choose_device("cuda")


def test_blocks_are_the_members_of_block_lists():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
            self.decoder_blocks = nn.ModuleList([nn.Linear(1, 1)])
            self.heads = nn.ModuleList([nn.Linear(1, 1)])

    model = Model()
    inside = nn.ModuleDict({"model": model})
    assert distributed.blocks(inside) == [*model.blocks, *model.decoder_blocks]
    # As timm's ViT keeps them.
    inside.blocks = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    assert distributed.blocks(inside)[-2:] == [*inside.blocks]


DIES_ONCE = """
import os
from pathlib import Path

from fastssl.methods.mae import MAE


class DiesOnce(MAE):
    steps = 0

    def before_step(self, values):
        mark = Path(os.environ["MARK"])
        self.steps += 1
        if self.steps == 4 and os.environ["RANK"] == "1" and not mark.exists():
            mark.touch()
            os._exit(1)
        super().before_step(values)
"""


def under_torchrun(config, mark):
    """The run's folder and what torchrun said; a rank dies in the fourth step unless there is a
    `mark` that it has."""
    file = mark.parent / f"{config.name}.yaml"
    file.write_text(dump(config))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node=2", "--max-restarts=1", "-m", "fastssl.cli", str(file), "--resume"),
        ],
        cwd=Path(__file__).parents[1],
        env={
            **os.environ,
            "MARK": str(mark),
            "OMP_NUM_THREADS": "1",
            # Otherwise the ranks find the addresses of those that died (torch 2.13, gloo).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return Path(config.out) / config.name, done.stdout + done.stderr


@pytest.mark.slow
def test_a_rank_that_dies_is_restarted_and_the_run_ends_as_one_undisturbed(images, tmp_path):
    (tmp_path / "dies.py").write_text(DIES_ONCE)
    method = f"method={{name: '{tmp_path}/dies.py:DiesOnce', args: {{mask_ratio: 0.5}}}}"
    (tmp_path / "mark").touch()
    whole_run, _ = under_torchrun(
        tiny_config(images, tmp_path, method, "name=whole"), tmp_path / "mark"
    )
    restarted, said = under_torchrun(
        tiny_config(images, tmp_path, method, "name=restarted"), tmp_path / "other_mark"
    )
    assert (tmp_path / "other_mark").exists() and "going on after step 2" in said
    last = Path("checkpoints") / "step_00000006"
    assert_same_tensors(saved_tensors(restarted / last), saved_tensors(whole_run / last))


def fail_in_rank_1():
    if dist.get_rank() == 1:
        raise ValueError("rank 1 has had enough")
    dist.barrier()


def test_the_pool_raises_what_a_rank_raised_and_goes_on(gloo_pool):
    with pytest.raises(RuntimeError, match=r"rank 1 failed(.|\n)*has had enough"):
        gloo_pool.run(fail_in_rank_1, 2)
    assert gloo_pool.run(dist.get_rank, 2) == [0, 1]
