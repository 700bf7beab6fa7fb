"""``trainer.profile=true``: where training steps spend their time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

log = logging.getLogger("flowtrain")

WARM_UP, STEPS = 5, 5  # steps before the profile, and in it
MOST_EXPENSIVE = 10


@contextmanager
def profile_steps(run_dir: Path) -> Iterator[Callable[[], None]]:
    """Profile a few steps after a few others.

    Yields a function to call after each step. Writes ``trace.json.gz`` into ``run_dir`` (for Perfetto or
    chrome://tracing) and logs the most expensive operations.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    path = Path(run_dir) / "trace.json.gz"
    count = 0

    def report(profiler: profile) -> None:
        profiler.export_chrome_trace(str(path))
        log.info("profile of %d steps: %s; the most expensive operations, per step:", count, path)
        for line in _most_expensive(profiler, count):
            log.info("  %s", line)

    plan = schedule(wait=0, warmup=WARM_UP, active=STEPS, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=report) as profiler:

        def after_step() -> None:
            nonlocal count
            count = min(STEPS, max(0, profiler.step_num + 1 - WARM_UP))
            profiler.step()

        yield after_step
    if not count:
        log.warning("trainer.profile=true: the run ended before step %d, so that nothing was recorded", WARM_UP + 1)


def _most_expensive(profiler: profile, steps: int) -> Iterator[str]:
    """The operations with the most time of their own, on the GPU where there is one: time, share and calls per step.

    On a GPU a profile holds an operation twice: as the CPU's call, with the time of its kernels, and as the kernels.
    """
    events = profiler.key_averages()
    calls = [one for one in events if one.device_type == DeviceType.CPU and not one.key.startswith("ProfilerStep")]
    if ProfilerActivity.CUDA in profiler.activities:
        rows = [(one.self_device_time_total, one.count, one.key) for one in calls]
        kernels = [one for one in events if one.device_type != DeviceType.CPU and not one.is_user_annotation]
        total = sum(one.self_device_time_total for one in kernels)
        if (others := total - sum(own for own, *_ in rows)) > 0:
            rows.append((others, steps, "kernels of no operation, such as those of a CUDA graph"))
    else:
        rows = [(one.self_cpu_time_total, one.count, one.key) for one in calls]
        total = sum(own for own, *_ in rows)
    for own, count, name in sorted(rows, reverse=True)[:MOST_EXPENSIVE]:
        yield f"{own / 1e3 / steps:8.2f} ms  {own / (total or 1):4.0%}  {count / steps:6.0f} ×  {name}"
