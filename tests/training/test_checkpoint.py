"""Checkpoints: whole or not there, and everything in them comes back."""

import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from fastssl.optim import build_adamw, set_hyperparameters
from fastssl.training import checkpoint, checkpoint_files
from fastssl.training.rng import preserved_rng_state
from tests.training.tiny import assert_same_tensors, saved_tensors

POSITION = {"seed": 0, "train.global_batch_size": 8}


def make(seed=0):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return module, build_adamw(module)


def step(module, optimizer):
    set_hyperparameters(optimizer, lr=0.1, weight_decay=0.1)
    module(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(folder, number, module, optimizer, keep=2):
    checkpoints = checkpoint.Checkpoints(folder, keep=keep)
    checkpoints.save(number, module, optimizer, position=POSITION)
    outcome = checkpoints.outcome()
    assert outcome.error is None and outcome.step == number
    return outcome.path


def state(module, optimizer):
    parts = checkpoint._tensors(module, optimizer)
    return {f"{p}.{n}": t.detach().clone() for p in parts for n, t in parts[p].items()}


def test_everything_comes_back(tmp_path):
    module, optimizer = make()
    for _ in range(3):
        step(module, optimizer)
    random.random(), np.random.rand(), torch.rand(1)
    saved = state(module, optimizer)
    path = save(tmp_path, 3, module, optimizer)
    drawn = random.random(), np.random.rand(), torch.rand(1).item(), torch.randn(3).tolist()
    assert_same_tensors(saved_tensors(path), saved)

    other, other_optimizer = make(seed=1)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert checkpoint.restore(path, other, other_optimizer, position=POSITION) == 3
    assert_same_tensors(state(other, other_optimizer), saved)
    assert any("exp_avg_sq" in name for name in saved) and any("running_var" in n for n in saved)
    again = random.random(), np.random.rand(), torch.rand(1).item(), torch.randn(3).tolist()
    assert again == drawn

    for parts in ((module, optimizer), (other, other_optimizer)):
        torch.manual_seed(9)
        step(*parts)
    assert_same_tensors(state(other, other_optimizer), state(module, optimizer))


def test_a_checkpoint_before_the_first_step_can_be_loaded(tmp_path):
    module, optimizer = make()
    path = save(tmp_path, 0, module, optimizer)
    other, other_optimizer = make(seed=1)
    step(other, other_optimizer)
    assert checkpoint.restore(path, other, other_optimizer, position=POSITION) == 0
    assert_same_tensors(state(other, other_optimizer), state(module, optimizer))


def test_the_newest_are_kept_and_latest_points_to_the_last(tmp_path):
    module, optimizer = make()
    for number in (2, 4, 10, 12):
        save(tmp_path, number, module, optimizer, keep=2)
    names = ["step_00000010", "step_00000012"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", *names]
    assert [path.name for path in checkpoint.complete(tmp_path)] == names
    assert (tmp_path / "latest").resolve() == tmp_path / "step_00000012"


def test_saving_a_step_again_replaces_it(tmp_path):
    module, optimizer = make()
    save(tmp_path, 2, module, optimizer)
    step(module, optimizer)
    path = save(tmp_path, 2, module, optimizer)
    assert_same_tensors(saved_tensors(path), state(module, optimizer))


def test_a_half_written_checkpoint_is_ignored_and_removed(tmp_path, monkeypatch):
    module, optimizer = make()
    good = save(tmp_path, 2, module, optimizer)
    # The power goes after the tensors are written, before the folder gets its name.
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "publish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(tmp_path, 4, module, optimizer)
    assert [path.name for path in tmp_path.glob("step_00000004*")] == ["step_00000004.writing"]
    assert checkpoint.complete(tmp_path) == [good]
    assert (tmp_path / "latest").resolve() == good
    save(tmp_path, 6, module, optimizer)
    assert not list(tmp_path.glob("*.writing"))


def test_a_link_left_behind_is_no_obstacle(tmp_path):
    module, optimizer = make()
    save(tmp_path, 2, module, optimizer)
    (tmp_path / "latest.writing").symlink_to("step_00000002")
    path = save(tmp_path, 4, module, optimizer)
    assert (tmp_path / "latest").resolve() == path


def test_a_folder_without_its_last_file_is_ignored(tmp_path):
    module, optimizer = make()
    good = save(tmp_path, 2, module, optimizer)
    shutil.copytree(good, tmp_path / "step_00000004")
    (tmp_path / "step_00000004" / "state.json").unlink()
    (tmp_path / "step_notanumber").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert checkpoint.complete(tmp_path) == [good]
    assert checkpoint.complete(tmp_path / "nowhere") == []


def test_the_tensors_are_on_disk_before_the_name(tmp_path, monkeypatch):
    order = []
    real_rename, real_sync = os.rename, os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), real_sync(fd)))
    monkeypatch.setattr(
        os, "rename", lambda a, b: (order.append(f"rename {b.name}"), real_rename(a, b))
    )
    module, optimizer = make()
    save(tmp_path, 2, module, optimizer)
    renamed = order.index("rename step_00000002")
    assert order[:renamed].count("fsync") >= 4, "tensors, metadata, generators, state and folder"
    assert "fsync" in order[renamed:], "and the folder that holds the name"


def test_nothing_but_torchs_metadata_is_pickled(tmp_path):
    module, optimizer = make()
    path = save(tmp_path, 2, module, optimizer)
    assert {p.suffix or p.name for p in path.iterdir()} == {".distcp", ".metadata", ".json"}
    assert_same_tensors(saved_tensors(path), state(module, optimizer))
    for file in path.glob("*.json"):
        json.loads(file.read_text())
    metadata = torch.distributed.checkpoint.FileSystemReader(path).read_metadata()
    kinds = {type(item).__name__ for item in metadata.state_dict_metadata.values()}
    assert kinds == {"TensorStorageMetadata"}


def test_another_position_in_the_data_is_refused(tmp_path):
    module, optimizer = make()
    path = save(tmp_path, 2, module, optimizer)
    with pytest.raises(ValueError, match=r"train.global_batch_size must be 8 to resume .* got 16"):
        checkpoint.restore(
            path, module, optimizer, position=POSITION | {"train.global_batch_size": 16}
        )


def test_another_model_is_refused(tmp_path):
    module, optimizer = make()
    path = save(tmp_path, 2, module, optimizer)
    wider = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    deeper = nn.Sequential(*make()[0], nn.Linear(2, 2))
    for other in (wider, deeper):
        with pytest.raises(ValueError, match="the model does not fit the checkpoint"):
            checkpoint.restore(path, other, build_adamw(other), position=POSITION)


def test_preserved_rng_state():
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(2), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    with preserved_rng_state():
        torch.rand(7), random.gauss(0, 1), np.random.randn()
    assert torch.equal(torch.rand(2), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]
