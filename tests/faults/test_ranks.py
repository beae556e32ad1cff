"""Ranks that are asked to stop, that die, that raise: under torchrun, as in life."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastssl import distributed
from fastssl.training import checkpoint, loop
from fastssl.training.config import dump
from fastssl.training.loop import Run, train
from fastssl.training.report import read_metrics
from tests.faults.runs import last_step, run, start
from tests.training.tiny import assert_same_tensors, saved_tensors, tiny_config

REPOSITORY = Path(__file__).parents[2]

# A worker that does something in one step on one rank, and writes down how it ended.
WORKER = """
import os, sys
from pathlib import Path
from fastssl import cli
from fastssl.training import loop

rank, folder = os.environ["RANK"], Path(sys.argv[1])
loop.write_report = lambda folder: None
real = loop.Run.train_step

def train_step(run):
    real(run)
    if run.step == 5 and rank == "1":
        {what}

loop.Run.train_step = train_step
status = cli.main(sys.argv[2:])
(folder / f"status_{{rank}}").write_text(str(status))
sys.exit(status)
"""


def torchrun(config, tmp_path, what="pass", *words):
    """torchrun with two workers, started; its output goes to a file."""
    (tmp_path / "worker.py").write_text(WORKER.format(what=what))
    (tmp_path / "run.yaml").write_text(dump(config))
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(tmp_path / "worker.py"), str(tmp_path), str(tmp_path / "run.yaml"), *words),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stdout=open(tmp_path / "output", "w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def alive(session):
    """The processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_for_step(folder, step, process):
    deadline = time.monotonic() + 200
    while last_step(folder) < step:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_sigterm_saves_within_a_step_and_a_run_goes_on_bit_by_bit(images, tmp_path):
    """torchrun itself exits with 1 after a SIGTERM, whatever its workers did."""
    more = ["train.steps=300", "checkpoint.every=0", "eval.max_images=0"]
    whole = tiny_config(images, tmp_path, *more, "name=whole")
    assert torchrun(whole, tmp_path).wait(200) == 0
    parts = tiny_config(images, tmp_path, *more, "name=parts")
    process = torchrun(parts, tmp_path)
    wait_for_step(tmp_path / "parts", 20, process)
    before = last_step(tmp_path / "parts")
    process.send_signal(signal.SIGTERM)
    output = tmp_path / "output"
    assert process.wait(60) == 1, output.read_text()
    assert [(tmp_path / f"status_{rank}").read_text() for rank in (0, 1)] == ["0", "0"]
    for words, number in (
        ("SignalException", 1),
        ("go on with: fastssl-train", 1),
        ("finishing this step, then saving", 2),
    ):
        assert output.read_text().count(words) >= number
    step = assert_saved_together(tmp_path / "parts")
    assert before <= step < 300

    assert torchrun(parts, tmp_path, "pass", "--resume").wait(200) == 0
    last = Path("checkpoints") / "step_00000300"
    assert_same_tensors(
        saved_tensors(tmp_path / "parts" / last), saved_tensors(tmp_path / "whole" / last)
    )
    lines = [read_metrics(tmp_path / n / "metrics.jsonl")[0] for n in ("parts", "whole")]
    assert [(x["step"], x["loss"]) for x in lines[0]] == [(x["step"], x["loss"]) for x in lines[1]]


def assert_saved_together(folder):
    """Both ranks, in the last step that was made, which is returned."""
    (path,) = checkpoint.complete(folder / "checkpoints")
    assert {p.name for p in path.glob("rank_*")} == {"rank_0.json", "rank_1.json"}
    step = json.loads((path / "state.json").read_text())["step"]
    assert step == last_step(folder)
    return step


@pytest.mark.slow
@pytest.mark.parametrize(
    "what, said",
    [
        ("raise RuntimeError('rank 1 has had enough')", "RuntimeError: rank 1 has had enough"),
        ("raise OSError('no such disk')", "fastssl-train: error: no such disk"),
        ("os._exit(3)", "exitcode  : 3"),
        ("os.kill(os.getpid(), 9)", "Signal 9 (SIGKILL) received by PID"),
    ],
)
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_rank_that_dies_ends_all_with_its_error(images, tmp_path, what, said, asynchronous):
    more = ["train.steps=100000", "checkpoint.every=2", "eval.max_images=0"]
    more += [f"checkpoint.asynchronous={asynchronous}"]
    process = torchrun(tiny_config(images, tmp_path, *more), tmp_path, what)
    wait_for_step(tmp_path / "tiny", 4, process)
    began = time.monotonic()
    assert process.wait(60) == 1
    deadline = began + 60
    while alive(process.pid):
        assert time.monotonic() < deadline, "a rank outlived torchrun"
        time.sleep(0.05)
    output = (tmp_path / "output").read_text()
    assert said in output
    # Which one was the first is in torchrun's summary.
    assert "Root Cause" in output and "rank      : 1 (local_rank: 1)" in output
    newest, skipped = checkpoint.newest(tmp_path / "tiny" / "checkpoints")
    assert newest.name in ("step_00000002", "step_00000004") and skipped == []


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


DIES_ONCE = '(folder / "died").exists() or ((folder / "died").touch(), os._exit(1))'


@pytest.mark.slow
def test_two_nodes_meet_and_outlive_a_rank(images, tmp_path):
    """Two torchruns on one machine: what `docs/scaling.md` says to start on each node."""
    more = ["train.steps=12", "eval.max_images=0"]
    whole = tiny_config(images, tmp_path, *more, "name=whole")
    assert torchrun(whole, tmp_path).wait(200) == 0
    nodes = tiny_config(images, tmp_path, *more, "name=nodes")
    (tmp_path / "worker.py").write_text(WORKER.format(what=DIES_ONCE))
    (tmp_path / "nodes.yaml").write_text(dump(nodes))
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=1"]
    command += ["--local-addr=127.0.0.1", "--max-restarts=3", str(tmp_path / "worker.py")]
    alike = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    agents = [
        subprocess.Popen(
            [*command, str(tmp_path), str(tmp_path / "nodes.yaml"), "--resume"],
            cwd=REPOSITORY,
            env={**os.environ, **alike, "PYTHONPATH": str(REPOSITORY)},
            stdout=open(tmp_path / f"node_{node}", "w"),
            stderr=subprocess.STDOUT,
        )
        for node in (0, 1)
    ]
    for node, agent in enumerate(agents):
        assert agent.wait(200) == 0, (tmp_path / f"node_{node}").read_text()
    said = (tmp_path / "node_0").read_text() + (tmp_path / "node_1").read_text()
    assert (tmp_path / "died").exists() and "going on after step 4" in said
    last = Path("checkpoints") / "step_00000012"
    assert_same_tensors(
        saved_tensors(tmp_path / "nodes" / last), saved_tensors(tmp_path / "whole" / last)
    )


def in_step_6(what, *args):
    """Go on with a run, in the sixth step of which something happens."""
    real = Run.train_step

    def train_step(run):
        if run.step == 5:
            what()
        real(run)

    Run.train_step = train_step
    run(*args)


def die():
    os._exit(3)


def be_asked_to_stop():
    os.kill(os.getpid(), signal.SIGTERM)


def start_ranks(config, tmp_path, *what):
    """One process for each of the functions, in a group of their own."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    return [
        start(function, config, tmp_path / f"log_{rank}", {**group, "RANK": str(rank)})
        for rank, function in enumerate(what)
    ]


def test_without_torchrun_too_the_others_end(images, tmp_path):
    """The system closes a dead rank's connections, which the others see at once."""
    more = ["train.steps=100000", "checkpoint.every=2", "eval.max_images=0"]
    config = tiny_config(images, tmp_path, *more)
    ranks = start_ranks(config, tmp_path, run, partial(in_step_6, die))
    ranks[1].join(100)
    assert ranks[1].exitcode == 3, (tmp_path / "log_1").read_text()
    ranks[0].join(60)
    assert ranks[0].exitcode == 1
    assert "Connection" in (tmp_path / "log_0").read_text()
    assert checkpoint.newest(tmp_path / "tiny" / "checkpoints")[0].name == "step_00000004"


def test_a_signal_to_one_rank_is_a_signal_to_all(images, tmp_path):
    more = ["train.steps=100000", "checkpoint.every=0", "eval.max_images=0"]
    config = tiny_config(images, tmp_path, *more)
    ranks = start_ranks(config, tmp_path, run, partial(in_step_6, be_asked_to_stop))
    for rank in ranks:
        rank.join(100)
        assert rank.exitcode == 0, (tmp_path / "log_1").read_text()
    assert assert_saved_together(tmp_path / "tiny") == 6, "within a step"


def the_timeout():
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with distributed.session("cpu"):
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))
        timeout = backend.options._timeout
    # The pool takes down a group after each call.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return timeout


def test_a_rank_that_hangs_is_not_waited_for_for_ever(gloo_pool):
    (timeout,) = gloo_pool.run(the_timeout, 1)
    assert timeout == distributed.TIMEOUT and 60 <= timeout.total_seconds() <= 1800


def train_with_nan_on_rank_1(config):
    """In step 3 the gradient of rank 1 alone is not finite."""
    real = Run.train_step

    def train_step(run):
        handle = None
        if run.step == 2 and run.world.rank == 1:
            handle = run.method.model.decoder_pred.register_forward_hook(
                lambda module, args, output: output * float("nan")
            )
        real(run)
        if handle is not None:
            handle.remove()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "train_step", train_step)
        patch.setattr(loop, "write_report", lambda folder: None)
        train(config)


def test_what_is_not_finite_on_one_rank_is_skipped_on_all(gloo_pool, images, tmp_path):
    config = tiny_config(images, tmp_path, "train.steps=4", "checkpoint.every=0")
    gloo_pool.run(train_with_nan_on_rank_1, 2, config)
    lines, _ = read_metrics(tmp_path / "tiny" / "metrics.jsonl")
    assert [line.get("skipped_steps", 0) for line in lines] == [0, 0, 1, 1]
    for tensor in saved_tensors(tmp_path / "tiny/checkpoints/step_00000004").values():
        assert tensor.isfinite().all()
