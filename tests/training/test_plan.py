"""What a plan says is what tensors take."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fastssl import cli
from fastssl.data import Batch
from fastssl.training import plan, setup
from fastssl.training.config import dump
from tests.training.tiny import HIERA, VIT, tiny_config

DOCS = Path(__file__).parents[2] / "docs" / "scaling.md"
# Wider than the tests of runs have it: what lies outside of the blocks is not most of it then.
WIDE = {
    "vit": [
        VIT[0],
        "model.args={patch_size: 4, embed_dim: 64, depth: 4, num_heads: 4, decoder_embed_dim: 32,"
        " decoder_depth: 2, decoder_num_heads: 2}",
        "views.image_size=32",
        VIT[3],
    ],
    "hiera": [
        HIERA[0],
        "model.args={embed_dim: 32, stages: [1, 2, 2], q_pool: 2, decoder_embed_dim: 32,"
        " mask_unit_attn: [true, true, false], decoder_depth: 2, decoder_num_heads: 2}",
        "views.image_size=128",
        HIERA[3],
    ],
    "dino": [
        "model={name: VisionTransformer, args: {patch_size: 4, embed_dim: 64, depth: 4,"
        " num_heads: 4}}",
        "views={image_size: 32, groups: [{number: 2}, {number: 2, size: 16}]}",
        "method={name: dino, args: {out_dim: 32, hidden_dim: 32, bottleneck_dim: 16}}",
    ],
}


def config_of(model, tmp_path, *more):
    return tiny_config(tmp_path, tmp_path, *more, model=WIDE[model])


def built(config):
    options = {"num_samples": 100, "steps_per_epoch": 2}
    if config.train.grad_checkpointing:
        options["prepare"] = lambda encoder: encoder.set_grad_checkpointing()
    method = setup.method_of(config, **options)
    method.before_step({n: s(0, 6) for n, s in method.schedules.items()})
    return method


def forward(config, method, dtype=torch.float32, images=8):
    """The loss, and bytes of the storages that wait for backward, parameters' left out."""
    views = [
        torch.randn(images, 3, *view.size)
        for view in setup.kinds_of_views(config)
        for _ in range(view.number)
    ]
    own = {p.untyped_storage().data_ptr() for p in method.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    bf16 = torch.autocast("cpu", torch.bfloat16, dtype == torch.bfloat16)
    with hooks, bf16:
        loss = method(Batch(tuple(views), torch.arange(images)))["loss"]
    return loss, sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)


@pytest.mark.parametrize("model", WIDE)
def test_bytes_of_parameters_gradients_and_optimizer_are_exact(tmp_path, model):
    config = config_of(model, tmp_path)
    row = plan.row(config, plan.inspect(config), 1)
    method = built(config)
    optimizer = setup.optimizer_of(config, method)
    forward(config, method)[0].backward()
    state = [t for tensors in optimizer.state.values() for t in tensors.values()]
    assert row.parameters == sum(p.nbytes for p in method.parameters())
    assert row.gradients == sum(p.grad.nbytes for p in method.parameters() if p.requires_grad)
    assert row.optimizer == sum(t.nbytes for t in state)


@pytest.mark.parametrize("model", WIDE)
def test_activations_are_within_15_percent(tmp_path, model):
    config = config_of(model, tmp_path)
    row = plan.row(config, plan.inspect(config), 1)
    _, measured = forward(config, built(config))
    assert row.activations == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("model", ["vit", "hiera"])
def test_checkpointed_blocks_keep_their_input(tmp_path, model):
    config = config_of(model, tmp_path, "train.grad_checkpointing=true")
    measured_model = plan.inspect(config)
    _, measured = forward(config, built(config))
    again = max(run.saved_bytes(4, 4) - run.input_bytes(4) for run in measured_model.runs)
    planned = plan.row(config, measured_model, 1).checkpointed
    assert planned - 8 * again == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("model", ["vit", "hiera"])
def test_activations_in_bf16_are_within_15_percent(tmp_path, monkeypatch, model):
    # The scores that a CPU writes out in bf16 are not written out on a GPU.
    monkeypatch.setenv("FASTSSL_ATTENTION", "torch")
    config = config_of(model, tmp_path, "train={precision: bf16, global_batch_size: 16}")
    row = plan.row(config, plan.inspect(config), 2)
    method = built(config)
    for parameter in method.parameters():
        parameter.data = parameter.data.bfloat16()
    _, measured = forward(config, method, torch.bfloat16)
    assert row.images == 8
    assert row.activations == pytest.approx(measured, rel=0.15)


def test_shares_of_the_ranks(tmp_path):
    model = plan.inspect(config_of("vit", tmp_path))
    row = plan.row(config_of("vit", tmp_path, "train.shard_ranks=2"), model, 4)
    alone = plan.row(config_of("vit", tmp_path), model, 1)
    assert row.shard_ranks == 2
    assert row.parameters == alone.parameters / 2
    assert row.optimizer == alone.optimizer / 2
    # Half of the gradients' sums of two copies cross the ring twice, one half at a time.
    assert row.all_reduce == alone.gradients / 2
    assert row.reduce_scatter == alone.gradients / 2
    # Where steps are accumulated, gradients are whole until the last micro-batch.
    several = config_of("vit", tmp_path, "train.accumulation=2")
    assert plan.row(several, model, 4).gradients == alone.gradients
    with pytest.raises(ValueError, match="must be a multiple of 3 ranks, got 8"):
        plan.row(several, model, 3)


def test_command(capsys, tmp_path):
    config = config_of("vit", tmp_path)
    path = tmp_path / "wide.yaml"
    path.write_text(dump(config))
    assert cli.main(["--plan", str(path), "--gpus=1,8,3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mae with MaskedAutoencoderViT: 0.2 M parameters trained")
    assert [line.split("|")[1].strip() for line in lines[-3:]] == ["1", "8", "3"]
    assert "must be a multiple of 3 ranks" in lines[-1]
    assert cli.main(["--plan", str(path), "--gpus=many"]) == 1
    assert "--gpus must be positive numbers as 8,64, got 'many'" in capsys.readouterr().err


@pytest.mark.slow
def test_tables_of_the_document_are_what_the_command_prints(capsys):
    examples = re.findall(
        r"```\n\$ fastssl-train (--plan .+)\n((?:.+\n|\n)+?)```", DOCS.read_text()
    )
    assert len(examples) == 4
    for command, expected in examples:
        assert cli.main(command.split()) == 0
        assert capsys.readouterr().out == expected, command
