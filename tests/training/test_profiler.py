"""`--profile`: a trace of steps 4 to 6 and a table of their ops, and a run that is what it was."""

import gzip
import json
import re

import pytest
import torch

from fastssl import cli
from fastssl.distributed import World
from fastssl.training.profiler import profiling
from tests.training.tiny import VIT, assert_same_tensors, saved_tensors

pytestmark = pytest.mark.usefixtures("no_report")
CPU = torch.device("cpu")
ROW = re.compile(r"\| `(.+)` \| (\d+) \| ([\d.]+) \| ([\d.]+)% \|")


def run(images, out, *more):
    arguments = ["photos", f"data={images}", f"out={out}", *VIT, "schedules.lr.warmup_steps=1"]
    arguments += ["train={steps: 8, global_batch_size: 4, device: cpu, precision: fp32}"]
    arguments += ["eval.max_images=0", "log.tensorboard=false", *more]
    assert cli.main(arguments) == 0
    return out / "photos"


def trace_of(folder):
    with gzip.open(folder / "profile" / "trace.json.gz", "rt") as file:
        return json.load(file)["traceEvents"]


def test_a_run_that_is_profiled_goes_to_its_end(images, tmp_path, capsys):
    folder = run(images, tmp_path / "profiled", "--profile")
    said = capsys.readouterr().out
    assert f"profile: {folder / 'profile' / 'ops.md'}, and " in said

    events = trace_of(folder)
    steps = {event["name"] for event in events if "ProfilerStep" in event.get("name", "")}
    # The profiler counts from 0.
    assert steps == {"ProfilerStep#3", "ProfilerStep#4", "ProfilerStep#5"}
    named = [event.get("name", "").removeprefix("fastssl::") for event in events]
    assert named.count("gelu_mlp") == 3 * 3, "two blocks and one of the decoder"

    table = (folder / "profile" / "ops.md").read_text()
    rows = [match.groups() for match in map(ROW.fullmatch, table.splitlines()) if match]
    assert "on the CPU" in table and "over 3 steps" in table and 10 < len(rows) <= 25
    times = [float(time) for _, _, time, _ in rows]
    assert times == sorted(times, reverse=True)
    assert 30 < sum(float(share) for *_, share in rows) <= 100.5
    calls = {name.removeprefix("fastssl::"): int(number) for name, number, *_ in rows}
    assert calls["gelu_mlp"] == 3

    plain = run(images, tmp_path / "plain")
    assert not (plain / "profile").exists()
    last = "checkpoints/step_00000008"
    assert_same_tensors(saved_tensors(folder / last), saved_tensors(plain / last))


def steps_profiled(tmp_path, number, rank=0, enabled=True):
    said = []
    with profiling(enabled, tmp_path, World(rank, 2, CPU), said.append) as step_is_made:
        for _ in range(number):
            torch.ones(8, 8) @ torch.ones(8, 8)
            step_is_made()
    return said


def test_short_runs(tmp_path):
    assert steps_profiled(tmp_path, 2) == [
        "no profile: it begins with step 4 of those made in one go"
    ]
    assert list(tmp_path.iterdir()) == []
    (said,) = steps_profiled(tmp_path, 5)
    assert "ops.md" in said and "aten::mm" in (tmp_path / "profile" / "ops.md").read_text()


def test_rank_0_alone_profiles_and_only_where_wanted(tmp_path):
    assert steps_profiled(tmp_path, 8, rank=1) == steps_profiled(tmp_path, 8, enabled=False) == []
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_end_the_run(tmp_path):
    (tmp_path / "profile").write_text("in the way")
    (said,) = steps_profiled(tmp_path, 8)
    assert said.startswith("warning: the profile could not be written: ")
