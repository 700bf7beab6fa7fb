"""The classifiers of many two-sample tests at once: their folds and pairs of samples are one batch of networks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

FOLDS, BATCH, RATE, TOLERANCE, PATIENCE, DECAY = 5, 200, 1e-3, 1e-4, 10, 1e-4  # those of scikit-learn's MLPClassifier
BETAS, EPSILON = (0.9, 0.999), 1e-8


def c2sts(references: np.ndarray, samples: np.ndarray, seed: int = 1) -> list[float]:
    """C2ST of pairs (P, n, D) and (P, n, D), as :func:`flowtrain.engine.calibration.c2st` has it of one: the same
    networks, folds, optimizer and rule to stop, with other random numbers, which depend on the pairs of a call.

    Raises:
        ValueError: numbers that are not finite, after standardizing too; or n is no multiple of five.
    """
    mean, std = references.mean(1, keepdims=True), references.std(1, ddof=1, keepdims=True)
    with np.errstate(all="ignore"):
        rows = torch.from_numpy((np.concatenate([references, samples], 1) - mean) / std).float()
    pairs, n, dims = rows.shape
    if not rows.isfinite().all():
        raise ValueError("some of the samples are not finite, or a column of a reference is constant")
    if n % (2 * FOLDS):
        raise ValueError(f"{n // 2} samples of each kind: must be a multiple of {FOLDS}")
    labels = torch.arange(n) >= n // 2
    generator = torch.Generator().manual_seed(seed)
    folds = torch.randperm(n, generator=generator).chunk(FOLDS)
    training = torch.stack([torch.cat([*folds[:i], *folds[i + 1 :]]) for i in range(FOLDS)])  # (folds, 4/5 n)
    testing = torch.stack(folds)
    pair, fold = torch.arange(pairs).repeat_interleave(FOLDS), torch.arange(FOLDS).repeat(pairs)  # of each network
    state = _weights(pairs * FOLDS, dims, generator)
    moments = [torch.zeros_like(one) for one in state], [torch.zeros_like(one) for one in state]
    best, waited = torch.full((len(pair),), torch.inf), torch.zeros(len(pair))
    scores, step = torch.zeros(pairs, FOLDS), 0
    while len(pair):
        order = training[:, torch.randperm(training.shape[1], generator=generator)]
        losses = torch.zeros(len(pair))
        for batch in order.split(BATCH, 1):
            step += 1
            chosen = batch[fold]
            losses += batch.shape[1] * _step(state, moments, step, rows[pair[:, None], chosen], labels[chosen].float())
        losses /= order.shape[1]
        waited = torch.where(losses > best - TOLERANCE, waited + 1, 0)
        best = torch.minimum(best, losses)
        ended = waited > PATIENCE
        if ended.any():
            chosen = testing[fold[ended]]
            logits = _activations([one[ended] for one in state], rows[pair[ended][:, None], chosen])[-1]
            scores[pair[ended], fold[ended]] = ((logits[..., 0] > 0) == labels[chosen]).float().mean(1)
            going = ~ended
            pair, fold, best, waited = pair[going], fold[going], best[going], waited[going]
            state = [one[going] for one in state]
            moments = tuple([one[going] for one in each] for each in moments)
    return scores.mean(1).tolist()


def _weights(nets: int, dims: int, generator: torch.Generator) -> list[Tensor]:
    """Weights and biases of layers D, 10·D, 10·D, 1 of ``nets`` networks, uniform as in Glorot and Bengio (2010)."""
    sizes, found = (dims, 10 * dims, 10 * dims, 1), []
    for inputs, outputs in zip(sizes, sizes[1:]):
        bound = (6 / (inputs + outputs)) ** 0.5
        for shape in ((nets, inputs, outputs), (nets, 1, outputs)):
            found.append((2 * torch.rand(shape, generator=generator) - 1) * bound)
    return found


def _activations(state: list[Tensor], rows: Tensor) -> list[Tensor]:
    """The inputs of the three layers, (nets, B, inputs), and the logits, (nets, B, 1)."""
    found = [rows]
    for weight, bias in zip(state[:4:2], state[1:4:2]):
        found.append(torch.baddbmm(bias, found[-1], weight).relu_())
    return [*found, torch.baddbmm(state[5], found[-1], state[4])]


def _step(state, moments, step: int, rows: Tensor, labels: Tensor) -> Tensor:
    """A step of Adam for each network; their losses, (nets,)."""
    *inputs, logits = _activations(state, rows)
    count = rows.shape[1]
    losses = F.binary_cross_entropy_with_logits(logits[..., 0], labels, reduction="none").mean(1)
    losses += sum(one.square().sum((1, 2)) for one in state[::2]) * (DECAY / 2 / count)
    gradient, gradients = (logits.sigmoid_() - labels[..., None]).div_(count), []
    for i in (2, 1, 0):
        weight, h = state[2 * i], inputs[i]
        gradients += [gradient.sum(1, keepdim=True), torch.baddbmm(weight, h.mT, gradient, beta=DECAY / count)]
        if i:
            gradient = torch.bmm(gradient, weight.mT)
            torch.ops.aten.threshold_backward(gradient, h, 0, grad_input=gradient)
    gradients.reverse()
    first, second = moments
    torch._foreach_lerp_(first, gradients, 1 - BETAS[0])
    torch._foreach_mul_(second, BETAS[1])
    torch._foreach_addcmul_(second, gradients, gradients, 1 - BETAS[1])
    rate = RATE * (1 - BETAS[1] ** step) ** 0.5 / (1 - BETAS[0] ** step)
    roots = torch._foreach_sqrt(second)
    torch._foreach_add_(roots, EPSILON)
    torch._foreach_addcdiv_(state, first, roots, -rate)
    return losses
