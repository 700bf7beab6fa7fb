"""Configurations that earlier versions of flowtrain stored, as this version reads them."""

from __future__ import annotations

ADDED = {"dry_run": False, "report": True, "embedding": {}, "target": None}  # keys that they lack
ADDED_TO_TRAINER = {"layer_statistics": False, "cuda_graph": False, "strategy": "ddp"}
OF_EVERY_RUN = ("JsonLines", "ImageFiles", "progress")  # once loggers to choose, now part of every run


def update(config):
    """``config``, plain values of a checkpoint that may be anything, with the keys of this version."""
    if not isinstance(config, dict) or not all(isinstance(config.get(key), dict) for key in ("trainer", "logger")):
        return config
    trainer = ADDED_TO_TRAINER | config["trainer"]
    wants_tensorboard = trainer.pop("tensorboard", True) is not False
    loggers = {
        name: node
        for name, node in config["logger"].items()
        if not _is_of_every_run(node) and (name != "tensorboard" or wants_tensorboard)
    }
    return ADDED | config | {"trainer": trainer, "logger": loggers}


def _is_of_every_run(node) -> bool:
    target = node.get("_target_") if isinstance(node, dict) else None
    return target in [f"flowtrain.engine.loggers.{name}" for name in OF_EVERY_RUN]
