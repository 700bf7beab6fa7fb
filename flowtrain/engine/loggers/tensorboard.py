"""TensorBoard's event files."""

from __future__ import annotations

import sys
import threading
from contextlib import suppress

from flowtrain.engine.loggers.logger import NullLogger
from flowtrain.runtime import files


class TensorBoard(NullLogger):
    """Writes scalars, images and hyperparameters to tb/."""

    def open(self, run):
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _ignore_write_errors
        self.directory = run.directory / "tb"
        with self._writing():
            self.writer = SummaryWriter(str(self.directory), purge_step=run.step + 1 if run.step else None)

    def scalars(self, step, values):
        with self._writing():
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def image(self, step, name, image):
        with self._writing():
            self.writer.add_image(name, image, step)

    def hyperparameters(self, values, metrics):
        with self._writing():
            self.writer.add_hparams(values, metrics, run_name=".")

    def close(self):
        failing = sys.exc_info()[0] is not None  # of several errors that a full disk causes, report the first
        with suppress(OSError) if failing else self._writing():
            self.writer.close()

    def _writing(self):
        return files.convert_errors(self.directory)


def _ignore_write_errors(thread, otherwise=threading.excepthook) -> None:
    """TensorBoard's own thread passes its error on to the next call: no traceback is needed."""
    if not (isinstance(thread.exc_value, OSError) and type(thread.thread).__module__.startswith("tensorboard.")):
        otherwise(thread)
