"""Weights & Biases."""

from __future__ import annotations

import json
import logging
import netrc
import os
import re
import secrets
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlparse

from flowtrain.engine.loggers.logger import NullLogger
from flowtrain.errors import UsageError
from flowtrain.runtime import files

log = logging.getLogger("flowtrain")

PLACE = Path("outputs")  # in the working directory; wandb makes its folder in it
START, FINISH = 30, 30  # seconds that a server has to answer, and to take what is left at the end


class Wandb(NullLogger):
    """Records a run in Weights & Biases: scalars, images, the configuration, and the final figure in its summary.

    Its own files lie in outputs/wandb: it makes links, of which a run directory holds none. The run's id is kept in
    wandb.json of the run directory, so that a resumed run continues it. What was recorded of steps beyond the one that
    it resumes at stays, and is not recorded again.

    Args:
        project: that the run belongs to.
        mode: online, offline (files, which ``wandb sync`` uploads), or null: as WANDB_MODE says,
            else online with an account on this machine and offline without one. It never asks for a login.

    Raises:
        UsageError: the package wandb is not installed, or an unknown mode.
    """

    writes_elsewhere = True

    def __init__(self, project: str = "flowtrain", mode: str | None = None):
        if mode not in (None, "online", "offline"):
            raise UsageError(f"logger.wandb.mode={mode}: must be online, offline or null")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            from wandb import init
        except ImportError as error:
            raise UsageError("logger=wandb: needs pip install 'flowtrain[wandb]'") from error
        self.init, self.project, self.mode = init, project, mode

    def open(self, run):
        import wandb

        mode = self.mode
        if mode is None and "WANDB_MODE" not in os.environ and not _has_account():
            mode = "offline"
            log.info("wandb: there is no account on this machine (wandb login), so the run is recorded offline")
        with _writing():
            name = _identity(run.directory / "wandb.json")
            PLACE.mkdir(exist_ok=True)
            self.run = self.init(
                project=self.project,
                id=name,
                resume="allow",
                name=run.directory.name,
                group=run.directory.parent.name,
                config=run.settings,
                dir=str(PLACE.absolute()),  # its process keeps the directory that it was started in
                mode=mode,
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    disable_git=True,
                    save_code=False,
                    init_timeout=START,
                    finish_timeout=FINISH,
                ),
            )
        folder = os.path.relpath(Path(self.run.dir).parent)
        where = f"wandb sync '{folder}' uploads it" if self.run.offline else self.run.url
        log.info("wandb: run %s; %s", name, where)

    def scalars(self, step, values):
        with _writing():
            self.run.log(values, step=step)

    def image(self, step, name, image):
        from wandb import Image

        with _writing():
            self.run.log({name: Image(image.permute(1, 2, 0).numpy())}, step=step)

    def hyperparameters(self, values, metrics):
        with _writing():
            self.run.summary.update(metrics)

    def close(self):
        failing = sys.exc_info()[0] is not None
        with suppress(Exception) if failing else _writing():
            self.run.finish(exit_code=int(failing))


@contextmanager
def _writing():
    """Raise WriteError where the disk or the server does not take what is written inside."""
    from wandb import Error

    try:
        yield
    except files.WriteError:
        raise
    except (OSError, Error) as error:
        raise files.WriteError(f"logger=wandb: {' '.join(str(error).split())}") from error


def _identity(record: Path) -> str:
    """The id of the run that ``record`` names, or a new one, which is then recorded."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        if re.fullmatch(r"\w+", name := json.loads(record.read_text())["id"]):
            return name
    name = secrets.token_hex(4)
    files.write_json(record, {"id": name})
    return name


def _has_account() -> bool:
    """Whether this machine has a key for the server."""
    if {"WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"} & os.environ.keys():
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        with suppress(OSError, netrc.NetrcParseError, TypeError):
            if netrc.netrc(os.path.expanduser(path)).authenticators(host or ""):
                return True
    return False
