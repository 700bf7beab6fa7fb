"""The first lines of a run."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from flowtrain.bijections.autoregressive import sequential_layers
from flowtrain.config.build import model_name
from flowtrain.config.compose import conf_dir
from flowtrain.engine.trainer import Trainer
from flowtrain.runtime import distributed
from flowtrain.runtime.environment import device_name
from flowtrain.training.cuda_graph import obstacle
from flowtrain.training.optimizer import warmup_steps
from flowtrain.training.setup import SetUp

log = logging.getLogger("flowtrain")


def log_introduction(run: SetUp, trainer: Trainer) -> None:
    """Log the first lines of a run."""
    log.info("run: %s", run.run_dir)
    log_description(run, trainer)
    if trainer.step:
        log.info("resumed at step %d", trainer.step)
    if run.config.logger.get("tensorboard"):
        log.info("watch: tensorboard --logdir '%s'", Path(run.run_dir).parent)


def log_description(run: SetUp, trainer: Trainer) -> None:
    """Log where a run computes, what its data and its flow are, and for how long it trains."""
    config, spec, val, world = run.config, run.spec, run.val, distributed.world()
    flow, train = trainer.flow, trainer.loader.split
    count = sum(parameter.numel() for parameter in flow.parameters())
    parts = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in [*flow.bijection.named_children(), ("base", flow.base), ("embedding", flow.embedding)]
        if part is not None
    }
    spread = ", ".join(f"{name} {n:,}" for name, n in parts.items() if n)
    log.info("device: %s × %d, precision %s", device_name(run.device), world, config.precision)
    log.info("data: %s; %d train, %d validation examples", train.description, len(train), len(val))
    for line in train.columns.describe() if spec.columns else ():
        log.info("columns, %s", line)
    levels = spec.grey_levels
    shape = "×".join(map(str, flow.shape))
    if levels:
        log.info(
            "shape %s, D = %d, %d grey levels: a uniform code has %.4f bits/dim",
            shape,
            flow.dimensions,
            levels,
            math.log2(levels),
        )
    else:
        bound = ", lower bounds of those of the values that are not missing" if spec.has_gaps else ""
        log.info("shape %s, D = %d, real numbers: likelihoods in nats%s", shape, flow.dimensions, bound)
    if spec.context:
        log.info(
            "context: %s, shape %s",
            config.dataset.get("context", "a simulation"),
            "×".join(map(str, spec.context_shape)),
        )
    log.info("model: %s parameters (%s)", f"{count:,}", spread)
    if spec.columns and all(column.kind == "angle" for column in spec.columns):
        log.info("every column is an angle: circular splines are the whole flow, and model= has no part in it")
    preset = f"{model_name(config)}_{spec.name}"
    if config.published is None and (conf_dir() / "experiment" / f"{preset}.yaml").exists():
        log.info("paper size: experiment=%s", preset)
    if layers := sequential_layers(flow.bijection):
        log.info(
            "likelihood: %d sequential steps in each of %d layer(s); sampling takes one pass; model=maf: the reverse",
            max(layer.shape[0] for layer in layers),
            len(layers),
        )
    tries_graph = run.device.type == "cuda" and config.trainer.cuda_graph == "auto"
    if tries_graph and (why := obstacle(config, flow, run.device)):
        log.info("cuda_graph=auto: kernels are launched one by one, since %s", why)
    if config.memory != "none" and not flow.backpropagation.chains(flow.bijection):
        log.warning("memory=%s: no two networks of this flow follow each other, so that all is kept", config.memory)
    share = f", {config.batch_size // world} a device" if world > 1 else ""
    parts = f", in {config.trainer.accumulate} parts" if config.trainer.accumulate > 1 else ""
    rate = trainer.weights.highest_rates[0]
    log.info("batch: %d%s%s; learning rate %g; until %s", config.batch_size, share, parts, rate, trainer.budget)
    if epochs := config.trainer.warmup_epochs:
        log.info("trainer.warmup_epochs=%g is %d steps", epochs, warmup_steps(config, trainer.loader.steps_per_epoch))
