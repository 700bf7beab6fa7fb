"""From a configuration to the parts of a run, shared by the commands."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from flowtrain import distributed
from flowtrain.bijections.ode import exact_trace
from flowtrain.config import build
from flowtrain.data import Columns, ordered
from flowtrain.data.split import Split
from flowtrain.engine.evaluate import Evaluation, evaluate, exact_arithmetic
from flowtrain.errors import FlowtrainError, Refused
from flowtrain.flow import Flow

EVALUATION_BATCH = 256  # fixed: dequantization noise in evaluation is a function of it


def build_flow(cfg, device: torch.device | str) -> Flow:
    """The flow of ``cfg``, its random start a function of ``cfg.seed`` alone.

    Raises:
        Refused: a constructor rejects one of its arguments.
    """
    if torch.device(device).type == "meta":
        with torch.device("meta"):
            return build(cfg.model.flow, allow=cfg.allow)
    torch.manual_seed(cfg.seed)
    return build(cfg.model.flow, allow=cfg.allow).to(device)


def autocast_of(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of networks under ``precision``; only where the hardware has it, for elsewhere it costs time."""
    if precision == "float32":
        return None
    has = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    if not has:
        raise Refused(f"precision={precision}: this {device.type} has no bfloat16 arithmetic; use precision=float32")
    return torch.bfloat16


def load_weights(flow: Flow, state: dict, weights: str = "auto") -> str:
    """Load a checkpoint's averaged (``ema``) or ``raw`` weights, ``auto`` the averaged where there are; says which."""
    if weights == "auto":
        weights = "ema" if state["ema"] else "raw"
    if weights == "ema" and not state["ema"]:
        raise Refused("weights=ema: this checkpoint has none; weights=raw")
    try:
        flow.load_state_dict(state["ema" if weights == "ema" else "model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise FlowtrainError(f"the checkpoint's weights do not fit its model: {reason} …") from None
    return weights


def judge(
    flow: Flow, split: Split, cfg, examples: int | None = None, draws: int = 1, exact: bool = False
) -> Evaluation:
    """Evaluate ``flow`` on a split with every process taking its share; ``exact``: with the exact trace of its ODEs.

    Raises:
        FlowtrainError: a likelihood is not finite.
    """
    batches = shares(split, cfg, next(flow.parameters()).device, examples)
    try:
        with exact_trace() if exact else nullcontext():
            return evaluate(flow, batches, len(split), draws, cfg.seed)
    except FloatingPointError as error:
        raise FlowtrainError(str(error)) from error


def shares(split: Split, cfg, device, examples: int | None = None):
    """This process's batches of a split for evaluation: (indices, examples, context)."""
    rank, world = distributed.rank(), distributed.world()
    return ordered(split, EVALUATION_BATCH, device, rank, world, examples, cfg.trainer.workers)


def columns_of(state: dict) -> Columns | None:
    """What a checkpoint knows of a table's columns; None of other data, and in checkpoints older than tables."""
    record = state.get("columns")
    return Columns.from_record(record) if record else None


def open_as(columns: Columns | None, cfg):
    """The data set of ``cfg``, a table's columns read as a checkpoint knows them: in its categories and units."""
    data = build(cfg.dataset, allow=cfg.allow, on_bad=cfg.on_bad)
    if columns:
        data.use(columns)
    return data


def has_bits(cfg, columns: Columns | None) -> bool:
    """Whether the data are integers, of which bits per dimension mean something."""
    return cfg.dataset.levels is not None or columns is not None and columns.all_integer


def is_picture(cfg) -> bool:
    return len(cfg.dataset.shape) == 3


def drawn(
    flow: Flow, n: int, seed: int, context: torch.Tensor | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """n examples, on the CPU; a seed's noise is the same at every temperature and on every device."""
    generator = torch.Generator().manual_seed(seed)
    return decode(flow, flow.latents(n, temperature, generator, context), context)


def decode(flow: Flow, latents: torch.Tensor, context: torch.Tensor | None = None, batch: int = 64) -> torch.Tensor:
    """The data of latents, on the CPU, a batch at a time. FlowtrainError where some are not finite."""
    contexts = [None] * len(latents) if context is None else context.split(batch)
    was_training = flow.training
    flow.eval()
    try:
        with exact_arithmetic():
            parts = [flow.decode(*pair).cpu() for pair in zip(latents.split(batch), contexts)]
    except ValueError as error:
        raise FlowtrainError(f"some samples are not finite; a lower temperature may help: {error}") from error
    finally:
        flow.train(was_training)
    return torch.cat(parts)
