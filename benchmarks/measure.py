"""Clocks, memory, the machine's limits and its name."""

import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[1]
# Larger than any cache between the processor and its memory (H200: 50 MB of L2).
FLUSH_BYTES = 256 << 20


class Clock:
    """Milliseconds of one call; on a GPU by events, with a cold L2 and a filled queue."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = None
        if device.type == "cuda":
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, function: Callable, inputs: Sequence) -> float:
        if self.flush is None:
            begin = time.perf_counter()
            function(*inputs)
            return (time.perf_counter() - begin) * 1e3
        # While the GPU overwrites its cache the CPU runs ahead, so launches are not what is timed.
        self.flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function(*inputs)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def quantiles(values: Sequence[float]) -> list[float]:
    """p20, p50 and p80."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return [tenths[1], tenths[4], tenths[7]]


def peak_extra_bytes(function: Callable, inputs: Sequence, device: torch.device) -> int:
    """Peak of the allocator during a call, less what is still allocated at its end.

    What remains are outputs and gradients; inputs existed before.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        kept = function(*inputs)
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        remaining = torch.cuda.memory_allocated(device)
        del kept
        return peak - remaining
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = function(*inputs)
    del kept
    return _peak_extra_of(_allocations(profile))


def _allocations(profile: torch.profiler.profile) -> list[int]:
    """Bytes of every allocation (freed: negative) in order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    memory.sort(key=lambda event: event["ts"])
    return [event["args"]["Bytes"] for event in memory]


def _peak_extra_of(allocations: Sequence[int]) -> int:
    held = peak = 0
    for size in allocations:
        held += size
        peak = max(peak, held)
    return peak - held


def copy_bandwidth(device: torch.device, quick: bool) -> float:
    """Bytes per second, read and written, of copying between buffers that no cache holds."""
    count = (4 << 20) if quick else (32 << 20)
    buffers = [torch.ones(count, device=device) for _ in range(4)]
    clock = Clock(device)
    times = [clock(buffers[i % 2].copy_, [buffers[2 + i % 2]]) for i in range(4 if quick else 10)]
    return 2 * buffers[0].nbytes / (statistics.median(times[1:]) * 1e-3)


def gemm_rate(device: torch.device, dtype: torch.dtype, quick: bool) -> float:
    """FLOP per second of a square matrix product."""
    n = 512 if quick else 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    clock = Clock(device)
    times = [clock(torch.mm, [a, b]) for _ in range(4 if quick else 10)]
    return 2 * n**3 / (statistics.median(times[1:]) * 1e-3)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    name = facts.get("model name", platform.processor())
    for feature in ("amx_tile", "avx512f", "avx2"):
        if feature in facts.get("flags", "").split():
            return f"{name} ({feature.split('_')[0]})"
    return name


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def conditions(device: torch.device) -> dict[str, object]:
    """Where and with what a number was measured."""
    # Results that are being written are no change of what is measured.
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"
    )
    commit = _git("rev-parse", "--short=12", "HEAD") or "unknown"
    return {
        "device": device.type,
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "transformers": _version("transformers"),
        },
        "commit": commit + ("+changes" if changed else ""),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
