"""Loggers: where the records of a run go. YAML names them: see conf/logger/."""

from flowtrain.engine.loggers.csv_table import CsvTable
from flowtrain.engine.loggers.json_lines import JsonLines
from flowtrain.engine.loggers.logger import Logger, NullLogger, RunRecord
from flowtrain.engine.loggers.loggers import Loggers
from flowtrain.engine.loggers.mlflow_run import Mlflow
from flowtrain.engine.loggers.png_files import ImageFiles
from flowtrain.engine.loggers.tensorboard import TensorBoard
from flowtrain.engine.loggers.terminal import ProgressBar, ProgressLines, progress
from flowtrain.engine.loggers.wandb_run import Wandb

__all__ = [
    "CsvTable",
    "ImageFiles",
    "JsonLines",
    "Logger",
    "Loggers",
    "Mlflow",
    "NullLogger",
    "ProgressBar",
    "ProgressLines",
    "RunRecord",
    "TensorBoard",
    "Wandb",
    "progress",
]
