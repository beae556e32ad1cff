"""scripts/slurm.sh, with stand-ins for SLURM's own commands on one machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastssl.training import checkpoint
from fastssl.training.config import dump
from tests.faults.runs import last_step
from tests.faults.test_ranks import free_port, wait_for_step
from tests.training.tiny import tiny_config

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm.sh"
# What comes after the options runs here, once, as on a single node.
SRUN = '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = '#!/bin/bash\n[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> "$ASKED"\n'


@pytest.fixture
def batch(images, tmp_path):
    """Starts the script as SLURM does, for the n-th time."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    more = ["train.steps=200", "checkpoint.every=0", "eval.max_images=0"]
    (tmp_path / "run.yaml").write_text(dump(tiny_config(images, tmp_path, *more)))
    job = f"test{os.getpid()}"

    def start(restarts: int) -> subprocess.Popen:
        path = [str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]
        variables = {
            "PATH": os.pathsep.join(path),
            "PYTHONPATH": str(SCRIPT.parents[1]),
            "ASKED": str(tmp_path / "asked"),
            "OMP_NUM_THREADS": "1",
            "GPUS_PER_NODE": "2",
            "MASTER_PORT": str(free_port()),
            "SLURM_JOB_ID": job,
            "SLURM_JOB_NODELIST": "here",
            "SLURM_NNODES": "1",
            "SLURM_RESTART_COUNT": str(restarts),
        }
        return subprocess.Popen(
            ["bash", str(SCRIPT), str(tmp_path / "run.yaml")],
            env={**os.environ, **variables},
            stdout=open(tmp_path / f"output_{restarts}", "w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    yield start
    Path(f"/tmp/fastssl-{job}.pid").unlink(missing_ok=True)


@pytest.mark.slow
def test_a_job_whose_time_is_up_saves_is_queued_again_and_goes_on(batch, tmp_path):
    folder, asked = tmp_path / "tiny", tmp_path / "asked"
    process = batch(0)
    wait_for_step(folder, 10, process)
    # To the batch shell alone, as --signal=B:TERM.
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0, (tmp_path / "output_0").read_text()
    assert asked.read_text().split()[0] == "requeue"
    (saved,) = checkpoint.complete(folder / "checkpoints")
    step = json.loads((saved / "state.json").read_text())["step"]
    assert 10 <= step < 200 and step == last_step(folder)

    asked.unlink()
    assert batch(1).wait(200) == 0, (tmp_path / "output_1").read_text()
    assert f"going on after step {step}" in (tmp_path / "output_1").read_text()
    assert last_step(folder) == 200 and not asked.exists(), "what has ended is not queued again"
