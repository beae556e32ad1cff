"""`fastssl-train --profile`: a trace of a few steps, and a table of the ops that cost most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from fastssl.distributed import World

# Of the steps that this process makes, 4 to 6: before, the profiler and the caches warm up.
_WAIT, _WARMUP, _STEPS = 1, 2, 3
_ROWS = 25
# What torch's profiler calls the time of a step.
_STEP = "ProfilerStep"


@contextmanager
def profiling(
    enabled: bool, folder: Path, world: World, say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Within, the function that comes is to be called after every step.

    Rank 0 writes folder/profile/trace.json.gz and ops.md, and says so; on other ranks, and unless
    `enabled`, nothing is done.
    """
    if not enabled or not world.is_main:
        yield lambda: None
        return
    on_gpu = world.device.type == "cuda"
    target = folder / "profile"
    told = []

    def write(profiled: profile) -> None:
        trace, table = target / "trace.json.gz", target / "ops.md"
        told.append(f"profile: {table}, and {trace} for https://ui.perfetto.dev")
        try:
            target.mkdir(exist_ok=True)
            profiled.export_chrome_trace(str(trace))
            table.write_text(ops_table(profiled, on_gpu=on_gpu), encoding="utf-8")
        except OSError as error:
            told[0] = f"warning: the profile could not be written: {error}"
        say(told[0])

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    plan = schedule(wait=_WAIT, warmup=_WARMUP, active=_STEPS, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiled:
        yield profiled.step
    if not told:
        say(f"no profile: it begins with step {_WAIT + _WARMUP + 1} of those made in one go")


def ops_table(profiled: profile, *, on_gpu: bool, rows: int = _ROWS) -> str:
    """Markdown: the ops that cost most by their own time, on the GPU if there is one."""
    times, steps = {}, 0
    for event in profiled.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel, whose time is that of the op that launched it
        if event.key.startswith(_STEP):
            steps += event.count
        else:
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            times[event.key] = (own, event.count)
    total = sum(own for own, _ in times.values())
    ordered = sorted(times.items(), key=lambda item: -item[1][0])[:rows]
    where = "GPU" if on_gpu else "CPU"
    lines = [
        f"The operators' own time on the {where}: {total / 1e3 / steps:.1f} ms a step, over "
        f"{steps} steps.",
        "",
        "| op | calls a step | ms a step | share |",
        "|---|--:|--:|--:|",
    ]
    for name, (own, count) in ordered:
        if own > 0:
            lines.append(
                f"| `{name.replace('|', ' ')}` | {count / steps:.0f} | {own / 1e3 / steps:.2f} "
                f"| {own / total:.1%} |"
            )
    return "\n".join(lines) + "\n"
