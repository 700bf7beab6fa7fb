"""What a run tells: a progress bar or plain lines, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import logging
import sys
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

from torch import Tensor

from flowtrain.plots.grid import save_png
from flowtrain.runtime import files

log = logging.getLogger("flowtrain")


class Reporter:
    """The records of one run under ``run_dir``, of which what lies beyond ``step`` and the first ``lines`` is cut.

    Attributes:
        lines: how many metrics.jsonl has.

    Its methods raise WriteError where the disk does not take what they write.
    """

    def __init__(self, run_dir: Path, step: int, max_steps: int | None, tensorboard: bool, lines: int | None = None):
        self.run_dir = Path(run_dir)
        path = self.run_dir / "metrics.jsonl"
        self.lines = _cut(path, step, lines)
        with files.convert_errors(path):
            self.file = path.open("ab", buffering=0)
        self.board = None
        if tensorboard:
            with self.to_board():
                self.board = _board(self.run_dir / "tb", step)
        self.bar, self.open = None, ExitStack()
        if sys.stderr.isatty():
            from tqdm import tqdm
            from tqdm.contrib.logging import logging_redirect_tqdm

            self.bar = tqdm(total=max_steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.05)
            self.open.enter_context(logging_redirect_tqdm())  # lines above the bar

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """A line of metrics.jsonl and the same in TensorBoard. Clocks and rates are named ``time/…``."""
        files.append(self.file, (json.dumps({"step": step, **values}) + "\n").encode())
        self.lines += 1
        if self.board:
            with self.to_board():
                for name, value in values.items():
                    self.board.add_scalar(name, value, step)

    def progress(self, step: int, figure: str, rate: float, left: float | None) -> None:
        """Show where training stands: ``figure`` with its unit, ``rate`` in examples a second, ``left`` in seconds."""
        left = "" if left is None else f", {_clock(left)} left"
        if self.bar is None:
            log.info("step %d: %s, %.0f examples/s%s", step, figure, rate, left)
        else:
            self.bar.set_postfix_str(f"{figure}, {rate:.0f} examples/s{left}", refresh=False)
            self.bar.update(step - self.bar.n)

    def image(self, step: int, name: str, image: Tensor) -> Path:
        """A (3, H, W) uint8 image as samples/<name>_<step>.png and in TensorBoard."""
        path = self.run_dir / "samples" / f"{name}_{step:08d}.png"
        save_png(image, path)
        if self.board:
            with self.to_board():
                self.board.add_image(name, image, step)
        return path

    def hyperparameters(self, values: dict, metrics: dict[str, float]) -> None:
        """What TensorBoard's HParams page compares runs by."""
        if self.board:
            with self.to_board():
                self.board.add_hparams(values, metrics, run_name=".")

    def to_board(self):
        return files.convert_errors(self.run_dir / "tb")

    def close(self) -> None:
        self.file.close()
        if self.bar is not None:
            self.bar.close()
        self.open.close()
        if self.board:
            told = sys.exc_info()[0] is not None  # of several errors that a full disk makes, the first
            with suppress(OSError) if told else self.to_board():
                self.board.close()


class Silence:
    """A reporter for every process but the first."""

    lines = 0

    def __getattr__(self, _name):
        return lambda *args, **kwargs: None


def _cut(path: Path, step: int, lines: int | None) -> int:
    """Drop the lines after the first ``lines`` or beyond ``step``, and one that a kill left half-written; how many are
    left."""
    if not path.exists():
        return 0
    kept = []
    for line in path.read_text(errors="replace").splitlines()[:lines]:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    files.write(path, "".join(kept).encode())
    return len(kept)


def _board(directory: Path, step: int):
    from torch.utils.tensorboard import SummaryWriter

    threading.excepthook = _unless_told
    return SummaryWriter(str(directory), purge_step=step + 1 if step else None)


def _unless_told(thread, otherwise=threading.excepthook) -> None:
    """TensorBoard's own thread gives what stops it to the next call as well: no traceback is needed."""
    if not (isinstance(thread.exc_value, OSError) and type(thread.thread).__module__.startswith("tensorboard.")):
        otherwise(thread)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
