"""What a step frees stays with the process."""

import os
import platform
import subprocess
import sys

import pytest

# Pages that two rounds of 64 MB each fault in, after two that find their place. Each asks for a
# page less than the one before: glibc before 2.38 cannot always put an aligned block where its like
# was.
PROGRAM = """
import resource, sys, torch
from fastssl.training.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for i in range(4):
    if i == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = torch.empty((16 << 20) - 1024 * i).fill_(1)
    del x
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 2 * (64 << 20) // 4096


def faults(word: str) -> int:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", PROGRAM, word]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is advised")
def test_freed_memory_is_used_again():
    assert faults("keep") < PAGES / 100
    assert faults("do not") > PAGES / 100


def test_what_the_user_says_of_malloc_is_left_alone(monkeypatch):
    from fastssl.training.memory import keep_freed_memory

    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory()
