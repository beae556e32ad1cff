"""Parameters shared by all ranks or by some: the same values, the same steps, and what is sent."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl import distributed
from fastssl.distributed import World
from fastssl.training import plan, setup
from fastssl.training.loop import Run, train
from tests.methods.checks import TINY_VIT, Case, check_processes
from tests.training.tiny import DINO, HIERA, VIT, make_images, tiny_config

TINY_MAE = {**TINY_VIT, "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
SMALL = [{"number": 2}, {"number": 1, "size": 8}]
CASES = {
    "mae": Case(
        "mae", {"mask_ratio": 0.5}, model="MaskedAutoencoderViT", model_args=TINY_MAE, batch_size=8
    ),
    "dino": Case(
        "dino",
        {"out_dim": 12, "hidden_dim": 16, "bottleneck_dim": 8},
        model="VisionTransformer",
        model_args=TINY_VIT,
        views=SMALL,
    ),
    "simclr": Case("simclr", {"hidden_dim": 12, "output_dim": 6}, model_args={"batch_norm": True}),
    "barlow_twins": Case("barlow_twins", {"hidden_dim": 12, "output_dim": 6}),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("name", CASES)
def test_ranks_with_a_copy_each_make_the_steps_of_one_process(gloo_pool, name):
    check_processes(gloo_pool, CASES[name], 2, shard_ranks=1)


@pytest.mark.slow
@pytest.mark.parametrize("shard_ranks", [0, 2])
@pytest.mark.parametrize("name", CASES)
def test_four_ranks_with_one_copy_or_two_make_the_steps_of_one_process(
    gloo_pool, name, shard_ranks
):
    check_processes(gloo_pool, CASES[name], 4, shard_ranks=shard_ranks)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def start(config):
    """Every parameter and buffer as training begins."""
    with distributed.session("cpu") as world:
        method, _ = setup.method_and_optimizer(config, world, setup.datasets(config)[0])
        named = (*method.named_parameters(), *method.named_buffers())
        return {name: whole(tensor.detach()).clone() for name, tensor in named}


def same(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def test_parameters_teacher_and_buffers_start_as_in_one_process(gloo_pool, images, tmp_path):
    config = tiny_config(images, tmp_path, model=DINO)
    expected = start(config)
    assert any(name.startswith("teacher.") for name in expected)
    assert "teacher_temp" in expected, "buffers that are not saved take part"
    for got in gloo_pool.run(start, 2, config):
        same(got, expected)


def test_released_weights_reach_all_ranks(gloo_pool, images, tmp_path):
    first = tiny_config(images, tmp_path, "train.steps=1", "name=first")
    weights = train(first) / "weights.pth"
    config = tiny_config(images, tmp_path, f"model.weights={weights}", "seed=3", "name=second")
    expected = start(config)
    loaded = torch.load(weights)["model"]["blocks.0.attn.qkv.weight"]
    assert torch.equal(expected["model.blocks.0.attn.qkv.weight"], loaded)
    for got in gloo_pool.run(start, 2, config):
        same(got, expected)


def devices_of_building():
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    seen = []

    def build():
        module = nn.Linear(2, 3)
        seen.append(module.weight.device.type)
        return module

    def build_by_values():
        return nn.Linear(2, int(torch.tensor(3).item()))

    distributed.build_once(build, world)
    module, tensors = distributed.build_once(build_by_values, world)
    distributed.shard(module, world)
    distributed.fill(module, world, tensors)
    try:
        distributed.build_once(lambda: 1 / 0, world)
    except ZeroDivisionError as error:
        seen.append(str(error))
    return seen, sorted(tensors), whole(module.weight.detach())


def test_only_the_first_rank_builds_in_memory(gloo_pool):
    first, second = gloo_pool.run(devices_of_building, 2)
    assert first[:2] == (["cpu", "division by zero"], ["bias", "weight"])
    assert second[:2] == (["meta", "division by zero"], [])
    assert torch.equal(first[2], second[2]) and first[2].any()


class Sent(TorchDispatchMode):
    """Bytes that collectives hand out, by name, as one rank sends them, and their dtypes."""

    def __init__(self):
        super().__init__()
        self.bytes, self.dtypes = {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0].strip("_")
            tensors = [
                t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)
            ]
            self.bytes[name] = self.bytes.get(name, 0) + max(t.nbytes for t in tensors)
            self.dtypes.setdefault(name, set()).add(tensors[0].dtype)
        return func(*args, **(kwargs or {}))


def step(config):
    """What forward and backward send, what the teacher's update sends, and the dtypes of shards."""
    with distributed.session("cpu") as world:
        train_set, _ = setup.datasets(config)
        method, optimizer = setup.method_and_optimizer(config, world, train_set)
        batch = next(iter(setup.loader(config, train_set, world, 0)))
        values = setup.scheduled(config, 0)
        method.before_step(values)
        with (
            Sent() as sent,
            torch.autocast("cpu", torch.bfloat16, setup.uses_bf16(config, world.device)),
        ):
            loss = method(batch)["loss"]
            loss.backward()
        shards = {(p.dtype, p.grad.dtype) for p in method.parameters() if p.grad is not None}
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.step()
        before = {name: whole(p).clone() for name, p in method.named_parameters()}
        with Sent() as of_teacher:
            if hasattr(method, "teacher"):
                method.loss.discard()  # the center of DINO is reduced; the teacher is not
                method.after_step()
        moved = [n for n, p in method.named_parameters() if not torch.equal(whole(p), before[n])]
        return loss.item(), sent, of_teacher.bytes, shards, moved


def run_step(config):
    loss, sent, of_teacher, shards, moved = step(config)
    return loss, sent.bytes, sent.dtypes, of_teacher, shards, moved


def test_nothing_is_sent_where_the_teacher_follows(gloo_pool, images, tmp_path):
    config = tiny_config(images, tmp_path, model=DINO)
    for _, _, _, of_teacher, _, moved in gloo_pool.run(run_step, 2, config):
        assert of_teacher == {}
        assert moved and all(name.startswith("teacher.") for name in moved)


def test_bf16_is_gathered_and_fp32_is_kept_and_reduced(gloo_pool, images, tmp_path):
    many = tiny_config(images, tmp_path, "train={precision: bf16, param_dtype: bf16}")
    expected = run_step(tiny_config(images, tmp_path))[0]
    results = gloo_pool.run(run_step, 2, many)
    assert sum(r[0] for r in results) / 2 == pytest.approx(expected, rel=2e-2)
    for _, _, dtypes, _, shards, _ in results:
        assert shards == {(torch.float32, torch.float32)}
        assert dtypes["allgather_base"] == {torch.bfloat16}
        assert dtypes["reduce_scatter_base"] == {torch.float32}


@pytest.mark.parametrize("model", ["mae", "dino"])
@pytest.mark.parametrize("shard_ranks", [0, 1])
def test_the_plan_says_what_is_sent(gloo_pool, images, tmp_path, model, shard_ranks):
    more = {"model": DINO} if model == "dino" else {}
    config = tiny_config(images, tmp_path, f"train.shard_ranks={shard_ranks}", **more)
    expected = plan.row(config, plan.inspect(config), 2)
    _, sent, *_ = gloo_pool.run(run_step, 2, config)[0]
    if shard_ranks == 0:
        # A rank sends its half of what comes together.
        # A block that runs on crops of two sizes may be fetched ahead once in vain.
        tolerance = 0.1 if model == "dino" else 0.01
        assert sent["allgather_base"] / 2 == pytest.approx(expected.all_gather, rel=tolerance)
        assert sent["reduce_scatter_base"] / 2 == pytest.approx(expected.reduce_scatter, rel=0.01)
        assert expected.all_reduce == 0
    else:
        assert expected.all_gather == expected.reduce_scatter == 0
        assert sent["allreduce"] == pytest.approx(expected.all_reduce, rel=0.02)


RESNET = [
    "model={name: ResNet, args: {depths: [1, 1, 1, 1], bottleneck: false, width: 8, "
    "small_images: true, zero_init_residual: false}}",
    "views.image_size=16",
    "method={name: simclr, args: {hidden_dim: 12, output_dim: 6}}",
]


def some_steps(config):
    """The losses of all steps; then buffers and parameters, whole."""
    with distributed.session("cpu") as world:
        run = Run(config, world, resume=False)
        losses = []
        while run.step < config.train.steps:
            run.train_step()
            losses.append(run.meter.flush()["loss"])
        run.evaluate()
        run.log.close()
        named = (*run.method.named_buffers(), *run.method.named_parameters())
        return losses, {name: whole(tensor.detach()).clone() for name, tensor in named}


@pytest.mark.parametrize("param_dtype", ["fp32", "bf16"])
def test_batch_statistics_stay_fp32_where_parameters_are_gathered_in_bf16(
    gloo_pool, images, tmp_path, param_dtype
):
    more = ["train.steps=2", "train.precision=bf16", "schedules.lr.base=0.001"]
    config = tiny_config(images, tmp_path, *more, "name=one", model=RESNET)
    ((expected_losses, expected),) = gloo_pool.run(some_steps, 1, config)
    more += [f"train.param_dtype={param_dtype}", "name=two"]
    config = tiny_config(images, tmp_path, *more, model=RESNET)
    for losses, tensors in gloo_pool.run(some_steps, 2, config):
        assert losses == pytest.approx(expected_losses, rel=2e-2)
        statistics = [name for name in tensors if ".running_" in name]
        assert len(statistics) >= 20 and {tensors[n].dtype for n in statistics} == {torch.float32}
        for name in statistics:
            torch.testing.assert_close(tensors[name], expected[name], rtol=0, atol=1e-3, msg=name)
        # What comes before any other layer's rounding is the same to the last bits of float32.
        first = "model.bn1.running_var"
        torch.testing.assert_close(tensors[first], expected[first], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "model", [VIT, HIERA, DINO, RESNET], ids=["vit", "hiera", "dino", "resnet"]
)
def test_checkpointed_blocks_of_two_ranks_make_the_same_steps(gloo_pool, images, tmp_path, model):
    config = tiny_config(images, tmp_path, "train.steps=2", "name=whole", model=model)
    expected = gloo_pool.run(some_steps, 2, config)
    more = ["train.steps=2", "train.grad_checkpointing=true", "name=checkpointed"]
    got = gloo_pool.run(some_steps, 2, tiny_config(images, tmp_path, *more, model=model))
    for (losses, tensors), (their_losses, theirs) in zip(got, expected, strict=True):
        assert losses == their_losses
        same(tensors, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("ranks, shard_ranks", [(2, 0), (2, 1), (4, 2)])
@pytest.mark.parametrize("model", ["mae", "dino"])
def test_compiled_blocks_make_the_same_steps(
    gloo_pool, images, tmp_path, model, ranks, shard_ranks
):
    """Shared by all, by none, and by two copies of two."""
    more = {"model": DINO} if model == "dino" else {}
    config = tiny_config(images, tmp_path, "train.steps=3", "name=one", **more)
    ((expected, theirs),) = gloo_pool.run(some_steps, 1, config)
    words = ["train.steps=3", "train.compile=true", f"train.shard_ranks={shard_ranks}", "name=many"]
    config = tiny_config(images, tmp_path, *words, **more)
    for losses, tensors in gloo_pool.run(some_steps, ranks, config, timeout=600):
        assert losses == pytest.approx(expected, rel=1e-4)
        for name, tensor in theirs.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def refused(shard_ranks):
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    with pytest.raises(ValueError) as error:
        distributed.shard(nn.Linear(2, 2), world, shard_ranks=shard_ranks)
    return str(error.value)


def test_a_copy_is_shared_by_a_part_of_the_ranks(gloo_pool, images, tmp_path):
    assert gloo_pool.run(refused, 2, 3)[0] == ("train.shard_ranks must divide the 2 ranks, got 3")
    with pytest.raises(ValueError, match=r"train\.shard_ranks must not be negative, got -1"):
        tiny_config(images, tmp_path, "train.shard_ranks=-1")
    with pytest.raises(ValueError, match=r"train\.param_dtype must be one of auto, fp32, bf16"):
        tiny_config(images, tmp_path, "train.param_dtype=fp16")


def test_bf16_parameters_without_autocast_are_refused(images, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"param_dtype=bf16 needs train\.precision=bf16 or auto"):
        tiny_config(images, tmp_path, "train={precision: fp32, param_dtype: bf16}")
    monkeypatch.setattr(setup, "uses_bf16", lambda *_: False)
    config = tiny_config(images, tmp_path, "train={precision: auto, param_dtype: bf16}")
    with pytest.raises(ValueError, match=r"needs train\.precision=bf16: auto is fp32 on this cpu"):
        setup.gathers_bf16(config, torch.device("cpu"))


def test_short_first_dimensions_are_not_padded_where_another_can_be_cut():
    assert distributed.shard_dim((1, 197, 1024), 8) == 2
    assert distributed.shard_dim((1, 197, 12), 8) == 0
    assert distributed.shard_dim((100, 8), 8) == 0
    assert distributed.shard_dim((), 8) == 0


def different_data():
    class Found(list):
        held_out = frozenset(range(2 + dist.get_rank()))

    with pytest.raises(ValueError) as error:
        setup.check_alike(Found(range(8)), None)
    return str(error.value)


def test_ranks_that_found_different_data_all_say_so(gloo_pool):
    expected = (
        "data must be the same on all ranks; 8 samples and 3 pictures to judge by on rank 1, 8 and "
        "2 on rank 0"
    )
    assert gloo_pool.run(different_data, 2) == [expected, expected]
