"""Loggers: where the records of a run go. YAML names them: see conf/logger/."""

from flowtrain.engine.loggers.json_lines import JsonLines
from flowtrain.engine.loggers.logger import Logger, NullLogger, RunRecord
from flowtrain.engine.loggers.loggers import Loggers
from flowtrain.engine.loggers.png_files import ImageFiles
from flowtrain.engine.loggers.tensorboard import TensorBoard
from flowtrain.engine.loggers.terminal import ProgressBar, ProgressLines, progress

__all__ = [
    "ImageFiles",
    "JsonLines",
    "Logger",
    "Loggers",
    "NullLogger",
    "ProgressBar",
    "ProgressLines",
    "RunRecord",
    "TensorBoard",
    "progress",
]
