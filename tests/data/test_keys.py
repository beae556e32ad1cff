"""The keys of a configuration that name data, as far as the loader."""

import json

import pytest
import torch

from fastssl.training import setup
from fastssl.training.config import load
from fastssl.training.loop import train
from tests.data.shards import png, write_shards
from tests.training.tiny import tiny_config, train_interrupted


def pictures():
    broken = 5
    return [png(i)[: 60 if i == broken else None] for i in range(16)]


def test_a_run_on_shards_is_a_run_on_their_files(tmp_path):
    """With what was broken counted as the run goes, and listed in the end."""
    (tmp_path / "files").mkdir()
    for i, content in enumerate(pictures()):
        (tmp_path / "files" / f"{i:05d}.png").write_bytes(content)
    shards = f"{write_shards(tmp_path / 'shards', pictures(), 6)}/{{000..002}}.tar"
    weights = []
    for data in (tmp_path / "files", shards):
        config = tiny_config(data, tmp_path / "out", "overwrite=true", "eval.max_images=0")
        folder = train(config)
        weights.append(torch.load(folder / "weights.pth"))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        counts = [line["skipped_samples"] for line in lines if "skipped_samples" in line]
        assert counts and set(counts) == {1}
        (skipped,) = json.loads((folder / "skipped.json").read_text())
        assert skipped.endswith("00005.png")
    files, tars = (dict(w.get("model", w)) for w in weights)
    assert files.keys() == tars.keys()
    assert all(torch.equal(files[name], tars[name]) for name in files)


def test_an_interrupted_run_with_windows_and_repeats_ends_the_same(tmp_path):
    data = f"{write_shards(tmp_path / 'shards', pictures(), 4)}/{{000..003}}.tar"
    keys = ["loader={shard_window: 2, num_workers: 1, prefetch: 1}", "views.repeats=2"]
    ends = []
    for out in ("whole", "interrupted"):
        config = tiny_config(data, tmp_path / out, "eval.max_images=0", *keys)
        folder = train(config) if out == "whole" else train_interrupted(config, 3)
        ends.append(torch.load(folder / "weights.pth"))
    a, b = (dict(w.get("model", w)) for w in ends)
    assert all(torch.equal(a[name], b[name]) for name in a)
    for change in ("views.repeats=1", "views.repeats=4", "loader.shard_window=3"):
        changed = tiny_config(
            data, tmp_path / "whole", "eval.max_images=0", *keys, "train.steps=7", change
        )
        with pytest.raises(ValueError, match=r"must be .* to resume"):
            train(changed, resume=True)


def test_keys_reach_dataset_and_loader(tmp_path):
    data = f"{write_shards(tmp_path / 'shards', pictures(), 6)}/{{000..002}}.tar"
    config = tiny_config(data, tmp_path / "out", "views.repeats=4", "loader.shard_window=2")
    dataset, _ = setup.datasets(config)
    assert len(dataset) == 64 and dataset.repeats == 4
    assert dataset.files.window.num_open == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("views.repeats=0", "views.repeats must be at least 1, got 0"),
        ("views.repeats=3", "train.global_batch_size must be a multiple of views.repeats = 3"),
        ("loader.prefetch=0", "loader.prefetch must be at least 1, got 0"),
        ("loader.shard_window=-1", "loader.shard_window must not be negative, got -1"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        load("photos", [override, "train.global_batch_size=256"])


@pytest.mark.parametrize(
    "data",
    [
        "/data/shard-{000000..000099}.tar",
        "https://host/{0..9}.tar",
        "pipe:aws s3 cp s3://bucket/{0..9}.tar -",
        "hf:owner/name/validation",
    ],
)
def test_data_is_taken_as_it_is_written(data):
    assert load("photos", [f"data={data}"]).data == data
