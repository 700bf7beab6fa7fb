"""``trainer.profile=true``: where training steps spend their time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

log = logging.getLogger("flowtrain")

WARM_UP, STEPS = 5, 5  # steps before, and of, what is recorded
DEAREST = 10


@contextmanager
def profiled(run_dir: Path) -> Iterator[Callable[[], None]]:
    """Within it, a few steps are recorded after a few others: ``trace.json.gz`` in ``run_dir`` (for Perfetto or
    chrome://tracing), and the dearest operations in the log. Yields what is to be called after each step."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    path = Path(run_dir) / "trace.json.gz"
    recorded = 0

    def tell(watched: profile) -> None:
        watched.export_chrome_trace(str(path))
        log.info("profile of %d steps: %s; the dearest operations, a step:", recorded, path)
        for line in _dearest(watched, recorded):
            log.info("  %s", line)

    plan = schedule(wait=0, warmup=WARM_UP, active=STEPS, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=tell) as watched:

        def stepped() -> None:
            nonlocal recorded
            recorded = min(STEPS, max(0, watched.step_num + 1 - WARM_UP))
            watched.step()

        yield stepped
    if not recorded:
        log.warning("trainer.profile=true: the run ended before step %d, so that nothing was recorded", WARM_UP + 1)


def _dearest(watched: profile, steps: int) -> Iterator[str]:
    """The operations that take most time themselves, on the GPU where there is one: time, share and calls a step."""
    time = "self_device_time_total" if ProfilerActivity.CUDA in watched.activities else "self_cpu_time_total"
    events = [event for event in watched.key_averages() if not event.key.startswith("ProfilerStep")]
    total = sum(getattr(event, time) for event in events) or 1
    for event in sorted(events, key=lambda event: -getattr(event, time))[:DEAREST]:
        own = getattr(event, time)
        yield f"{own / 1e3 / steps:8.2f} ms  {own / total:4.0%}  {event.count / steps:6.0f} ×  {event.key}"
