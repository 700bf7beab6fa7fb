"""The end of a run: its best weights evaluated on all validation examples, and summary.json."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from flowtrain.commands.evaluation import evaluate_split
from flowtrain.data.spec import has_bits
from flowtrain.engine.evaluate import Evaluation
from flowtrain.engine.objectives import Score
from flowtrain.engine.trainer import Trainer
from flowtrain.errors import FlowtrainError
from flowtrain.flow import Flow
from flowtrain.runtime import checkpoint, distributed, files
from flowtrain.training.memory import memory_of_validation
from flowtrain.training.setup import SetUp

log = logging.getLogger("flowtrain")


def conclude(run: SetUp, trainer: Trainer) -> tuple[dict, Score]:
    """Evaluate the best weights on all validation examples and write summary.json, the mark of a finished run."""
    config, spec, val, run_dir = run.config, run.spec, run.val, run.run_dir
    flow, best = trainer.flow, trainer.checkpoints.best
    distributed.barrier()  # the first process has written it
    if not best.is_file():
        raise FlowtrainError(f"{best}: is missing, since no validation had a finite likelihood; a lower rate may help")
    trainer.weights.load_best(checkpoint.read(best))
    with memory_of_validation(config, run.device):
        result, score = _evaluations(run, trainer, flow)
    name = "log_likelihood" if spec.target is None else "elbo"
    bits = {"bits_per_dim": result.bits_per_dim, "bits_per_dim_stderr": result.bits_per_dim_stderr}
    bad = {part: _unreadable(split) for part, split in (("train", trainer.loader.split), ("validation", val))}
    summary = {
        **(bits if has_bits(spec, trainer.loader.split.columns) else {}),
        name: result.log_likelihood,
        f"{name}_stderr": result.log_likelihood_stderr,
        trainer.objective.key: score.figure,
        "steps": trainer.step,
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
        "seconds": round(trainer.seconds, 3),
        "batch_size": trainer.loader.batch_size,
        "threads": torch.get_num_threads(),
        "compiled": trainer.compilation is not None,
        "skipped_steps": trainer.recovery.skipped,
        "rollbacks": trainer.recovery.rollbacks,
        "cuda_graph": trainer.training_pass.is_graph,
        "unreadable": sum(bad.values()),
        "checkpoint": str(best),
        "run_dir": str(run_dir),
    }
    if distributed.is_main():
        files.write_json(Path(run_dir) / "summary.json", summary)
        log.info("finished after %d steps, %.0f s: best validation %s", trainer.step, trainer.seconds, score.text)
        for part, number in bad.items():
            if number:
                log.warning("on_bad=skip: %d unreadable images of the %s split were left out", number, part)
        if images := sorted((Path(run_dir) / "samples").glob("*.png")):
            log.info("samples: %s", images[-1])
        log.info("next: flowtrain eval ckpt='%s'", run_dir)
    return summary, score


def _evaluations(run: SetUp, trainer: Trainer, flow: Flow) -> tuple[Evaluation, Score]:
    """The likelihood on the validation split, and the score by which weights were selected there."""
    objective, config = trainer.objective, run.config
    examples = None if objective.measure is None else config.trainer.val_examples  # a solver takes long
    result = evaluate_split(flow, run.val, config, examples, config.trainer.val_draws, measure=objective.measure)
    score = objective.score(result)
    if objective.key == objective.train_key:  # a loss
        result = evaluate_split(flow, run.val, config, examples, measure=objective.log_prob)
    return result, score


def _unreadable(split) -> int:
    """The number of examples of a split that some process could not read."""
    return len({number for numbers in distributed.all_gather_object([*split.bad]) for number in numbers})
