"""A checkpoint that is not whole is not gone on from, and the reason is said."""

import hashlib
import json
import os
import re

import pytest
import torch

from fastssl.training import checkpoint, checkpoint_files
from tests.training.test_checkpoint import make, save, step


@pytest.fixture
def saved(tmp_path):
    """Two checkpoints."""
    module, optimizer = make()
    for number in (2, 4):
        step(module, optimizer)
        save(tmp_path, number, module, optimizer)
    return [tmp_path / "step_00000002", tmp_path / "step_00000004"]


def damage(path, how):
    (tensors,) = path.glob("*.distcp")
    content = tensors.read_bytes()
    if how == "truncated tensors":
        tensors.write_bytes(content[:-100])
    elif how == "no tensors":
        tensors.unlink()
    elif how == "a changed bit":
        middle = len(content) // 2
        tensors.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how.startswith("no "):
        (path / how.removeprefix("no ")).unlink()
    elif how == "truncated state.json":
        (path / "state.json").write_text((path / "state.json").read_text()[:-10])
    elif how == "another step in state.json":
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps({**state, "step": 5}))
    elif how == "a list in state.json":
        (path / "state.json").write_text("[1]")
    elif how == "a folder in place of a file":
        tensors.unlink()
        tensors.mkdir()


REASONS = {
    "truncated tensors": r"__0_0.distcp has \d+ of \d+ bytes",
    "no tensors": "__0_0.distcp is missing",
    "a changed bit": "__0_0.distcp does not have the checksum",
    "no .metadata": ".metadata is missing",
    "no rank_0.json": "rank_0.json is missing",
    "no state.json": "state.json is missing",
    "truncated state.json": "state.json is no JSON",
    "another step in state.json": "state.json does not have the checksum",
    "a list in state.json": "state.json must hold an object, got list",
    "a folder in place of a file": "__0_0.distcp has",
}


@pytest.mark.parametrize("how", REASONS)
def test_the_newest_whole_one_is_taken_and_what_is_skipped_is_said(saved, how):
    older, newer = saved
    assert checkpoint.newest(newer.parent) == (newer, [])
    damage(newer, how)
    path, (sentence,) = checkpoint.newest(newer.parent)
    assert path == older
    assert sentence.startswith(f"skipping checkpoint {newer}: ")
    assert re.search(REASONS[how], sentence), sentence
    with pytest.raises(ValueError, match=f"--resume must name a whole checkpoint; of {newer} "):
        checkpoint.choose(newer.parent, newer)


def test_an_unreadable_file_is_a_reason_too(saved, monkeypatch):
    def unreadable(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint_files, "_sha256", unreadable)
    assert checkpoint.why_not_whole(saved[1]) == ".metadata cannot be read: Input/output error"


def test_without_a_whole_one_nothing_starts_from_the_beginning(saved):
    damage(saved[0], "no tensors")
    damage(saved[1], "truncated tensors")
    with pytest.raises(ValueError, match="no whole checkpoint to go on from") as error:
        checkpoint.newest(saved[0].parent)
    for part in ("step_00000004: __0_0.distcp has", "step_00000002: __0_0.distcp is missing"):
        assert part in str(error.value)
    assert "overwrite=true without --resume starts anew" in str(error.value)


def test_where_links_cannot_be_made_checkpoints_are_saved_and_let_go(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refused)
    for number in (2, 4, 6):
        save(tmp_path, number, *make())
    names = [path.name for path in checkpoint.complete(tmp_path)]
    assert names == ["step_00000004", "step_00000006"]


def test_no_checkpoints_are_no_error(tmp_path):
    (tmp_path / "step_00000002.writing").mkdir()
    assert checkpoint.newest(tmp_path) == (None, [])
    assert checkpoint.newest(tmp_path / "nowhere") == (None, [])


@pytest.mark.parametrize("written, by", [(99, "7.0"), (None, "of an earlier time")])
def test_another_format_is_an_error_and_not_skipped(saved, written, by):
    state = json.loads((saved[1] / "state.json").read_text())
    state.pop("format")
    state.pop("fastssl")
    if written is not None:
        state |= {"format": written, "fastssl": by}
    (saved[1] / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=rf"format {written or 0}, written by fastssl {by}; .*"):
        checkpoint.newest(saved[1].parent)


def test_the_one_asked_for_is_taken(saved):
    assert checkpoint.choose(saved[0].parent, saved[0]) == (saved[0], [])
    link = saved[0].parent / "latest"
    assert checkpoint.choose(saved[0].parent, link) == (saved[1], [])
    with pytest.raises(ValueError, match=r"nowhere state\.json is missing"):
        checkpoint.choose(saved[0].parent, saved[0].parent / "nowhere")


def test_newer_ones_are_set_aside_and_replaced(saved):
    folder = saved[0].parent
    (sentence,) = checkpoint.set_aside(folder, 2)
    aside = folder / "step_00000004.aside"
    assert str(aside) in sentence and aside.is_dir()
    assert checkpoint.complete(folder) == [saved[0]]
    assert (folder / "latest").resolve() == saved[0]
    assert checkpoint.set_aside(folder, 2) == []
    module, optimizer = make()
    save(folder, 3, module, optimizer)
    assert aside.is_dir()
    save(folder, 4, module, optimizer)
    assert not aside.exists()


def test_a_step_beyond_eight_digits_is_the_newest(saved):
    module, optimizer = make()
    save(saved[0].parent, 100_000_000, module, optimizer, keep=3)
    assert checkpoint.newest(saved[0].parent)[0].name == "step_100000000"


def rank_reasons(path):
    return checkpoint.why_not_whole(path), checkpoint.newest(path.parent)


def test_ranks_share_the_reading_and_agree(gloo_pool, saved):
    older, newer = saved
    assert gloo_pool.run(rank_reasons, 2, newer) == [(None, (newer, []))] * 2
    # Of three files, by name, rank 0 reads the first and the third, rank 1 the second.
    damage(newer, "truncated tensors")
    reason = checkpoint.why_not_whole(newer)
    assert "__0_0.distcp" in reason
    expected = (reason, (older, [f"skipping checkpoint {newer}: {reason}"]))
    assert gloo_pool.run(rank_reasons, 2, newer) == [expected] * 2


def test_checksums_are_those_of_the_files(saved):
    state = json.loads((saved[1] / "state.json").read_text())
    names = {path.name for path in saved[1].iterdir()} - {"state.json"}
    assert state["files"].keys() == names
    for name, (size, checksum) in state["files"].items():
        content = (saved[1] / name).read_bytes()
        assert (size, checksum) == (len(content), hashlib.sha256(content).hexdigest())


def test_another_optimizer_is_refused(saved):
    module, _ = make()
    with pytest.raises(ValueError, match="the optimizer does not fit the checkpoint"):
        checkpoint.restore(
            saved[1], module, torch.optim.SGD(module.parameters()), position={"seed": 0}
        )
