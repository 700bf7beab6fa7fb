"""MLflow."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from flowtrain.engine.loggers.logger import NullLogger
from flowtrain.errors import Interrupted, UsageError
from flowtrain.runtime import files

log = logging.getLogger("flowtrain")

STORE = "outputs/mlruns"
LENGTH, BATCH = 500, 100  # most letters of a parameter's value that every store takes, and parameters in one call
# Before mlflow is imported, and only where the user has not said otherwise: its file store, which newer versions
# refuse without this; no reports about its use; a server that is gone is an error within seconds.
SETTINGS = {
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "GIT_PYTHON_REFRESH": "quiet",
}


class Mlflow(NullLogger):
    """Records a run in MLflow: scalars and the final figure as metrics, the configuration as parameters, images as
    artifacts.

    The run's id is kept in mlflow.json of the run directory, so that a resumed run continues it. What was recorded of
    steps beyond the one that it resumes at stays, and is not recorded again.

    Args:
        experiment: that the run belongs to.
        tracking_uri: where the store is: a folder, a database (``sqlite:///FILE``) or a server (``http://…``). null: as
            MLFLOW_TRACKING_URI says, else the folder outputs/mlruns.

    Raises:
        UsageError: the package mlflow is not installed.
    """

    writes_elsewhere = True

    def __init__(self, experiment: str = "flowtrain", tracking_uri: str | None = None):
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise UsageError("logger=mlflow: needs pip install 'flowtrain[mlflow]'") from error
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        self.make, self.experiment, self.uri = MlflowClient, experiment, tracking_uri

    def open(self, run):
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI") or STORE
        uri = uri if re.match(r"\w[\w+.-]*:", uri) else Path(uri).absolute().as_uri()
        with _writing():
            self.client = self.make(tracking_uri=uri)
            found = self._find(run.directory / "mlflow.json", uri)
            self.recorded = self.step = -1  # the last step that the store has; the last that this logger has seen
            if found:
                self.id = found.info.run_id
                self.client.update_run(self.id, status="RUNNING")
                for key in found.data.metrics:
                    if "/" in key:
                        history = self.client.get_metric_history(self.id, key)
                        self.recorded = max(self.recorded, *(metric.step for metric in history))
            else:
                self.id = self._create(run)
                files.write_json(run.directory / "mlflow.json", {"tracking_uri": uri, "run_id": self.id})
        log.info("mlflow: run %s in %s", self.id, uri)

    def _find(self, record: Path, uri: str):
        """The run that ``record`` names, if it is in the store at ``uri`` and not deleted."""
        from mlflow.exceptions import MlflowException

        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(record.read_text())
            if kept["tracking_uri"] == uri:
                with suppress(MlflowException):
                    found = self.client.get_run(kept["run_id"])
                    return found if found.info.lifecycle_stage == "active" else None
        return None

    def _create(self, run) -> str:
        from mlflow.entities import Param

        experiment = self.client.get_experiment_by_name(self.experiment)
        number = experiment.experiment_id if experiment else self.client.create_experiment(self.experiment)
        made = self.client.create_run(number, run_name=run.directory.name).info.run_id
        params = [Param(_name(key), str(value)[:LENGTH]) for key, value in run.settings.items()]
        for start in range(0, len(params), BATCH):
            self.client.log_batch(made, params=params[start : start + BATCH])
        return made

    def scalars(self, step, values):
        self.step = step
        if step > self.recorded:
            self._metrics(step, values)

    def image(self, step, name, image):
        with _writing():
            self.client.log_image(self.id, image.permute(1, 2, 0).numpy(), f"{name}/{name}_{step:08d}.png")

    def hyperparameters(self, values, metrics):
        self._metrics(max(self.step, 0), metrics)

    def _metrics(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        with _writing():
            metrics = [Metric(_name(key), float(value), now, step) for key, value in values.items()]
            for start in range(0, len(metrics), BATCH):
                self.client.log_batch(self.id, metrics=metrics[start : start + BATCH])

    def close(self):
        error = sys.exc_info()[1]
        status = "KILLED" if isinstance(error, Interrupted) else "FAILED" if error else "FINISHED"
        with suppress(Exception) if error else _writing():
            self.client.set_terminated(self.id, status)


def _name(key: str) -> str:
    """A key with only the letters that MLflow takes."""
    return re.sub(r"[^\w./ -]", "_", key)


@contextmanager
def _writing():
    """Raise WriteError where the store does not take what is written inside."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except files.WriteError:
        raise
    except (OSError, MlflowException) as error:
        raise files.WriteError(f"logger=mlflow: {' '.join(str(error).split())[:300]}") from error
