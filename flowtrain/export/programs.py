"""What is exported of a flow: functions of tensors alone, as modules, without checks and reads of values."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowtrain.bijections.ode import exact_trace, needs_exact_trace, states_only
from flowtrain.errors import UsageError
from flowtrain.flow import Flow
from flowtrain.runtime import global_batch, modes
from flowtrain.runtime.noise import GivenNoise

WHAT = ("log_prob", "sample", "encode", "score")


@dataclass(frozen=True)
class Tensors:
    """An input or output of a program.

    Attributes:
        shape: of one example; the first axis of the tensor counts examples.
        meaning: a line.
        noise: of an input of noise: normal, uniform or logistic; else None.
    """

    shape: tuple[int, ...]
    meaning: str
    noise: str | None = None


class Program(nn.Module):
    """One of :data:`WHAT` of a flow. Call it with a tensor (B, …) for each of ``inputs``, in their order.

    - ``log_prob``: nats (B,), of data x as the flow takes them, before dequantization, whose noise is an input.
    - ``score``: its gradient in x, (B, *shape).
    - ``encode``: latents (B, D); integers are taken at the centres of their bins, as in :meth:`Flow.encode`.
    - ``sample``: data (B, *shape) from the base distribution's noise; noise times T has temperature T.

    Attributes:
        inputs: by their names; the flow's context, if it has one, is the last.
        output: what comes out.

    Raises:
        UsageError: the flow's base distribution does not say its noise.
    """

    def __init__(self, flow: Flow, what: str):
        super().__init__()
        self.flow, self.what = flow, what
        self.inputs, self.output = getattr(self, f"_describe_{what}")()
        if flow.context_shape is not None:
            self.inputs["context"] = Tensors(flow.context_shape, "what each example is conditional on")
        self.has_context = "context" in self.inputs

    def forward(self, *tensors: Tensor) -> Tensor:
        *given, context = tensors if self.has_context else (*tensors, None)
        with modes.using(tracing=True):
            return getattr(self, f"_{self.what}")(given, context)

    # ---- density ----------------------------------------------------------------------------------------------------

    def _describe_log_prob(self):
        inputs = {"x": self._data(), **self._noise_of_density()}
        return inputs, Tensors((), "log-likelihood of each example, in nats")

    def _log_prob(self, given, context):
        x, *noise = given
        with torch.no_grad(), modes.using(noise=GivenNoise(noise)), self._trace():
            return self.flow(x, context)

    def _describe_score(self):
        inputs, _ = self._describe_log_prob()
        return inputs, Tensors(self.flow.shape, "gradient of the log-likelihood in x")

    def _score(self, given, context):
        x, *noise = given
        with torch.enable_grad(), modes.using(noise=GivenNoise(noise)), self._trace():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.flow(x, context).sum(), x)[0]

    def _data(self) -> Tensors:
        return Tensors(self.flow.shape, "data, as float32")

    def _trace(self) -> AbstractContextManager:
        """As ``flowtrain eval`` integrates it."""
        return exact_trace() if needs_exact_trace(self.flow) else nullcontext()

    def _noise_of_density(self) -> dict[str, Tensors]:
        """The uniform numbers that the flow draws in ``forward``: of dequantization, missing values or a trace."""
        shapes = []

        class Recorder:
            def uniform(self, shape, device=None, dtype=torch.float32):
                shapes.append(tuple(shape[1:]))
                return torch.full(shape, 0.5, dtype=dtype)

        kind, context_shape = next(self.flow.parameters()).dtype, self.flow.context_shape
        context = None if context_shape is None else torch.zeros(1, *context_shape, dtype=kind)
        with torch.no_grad(), modes.using(noise=Recorder()), self._trace():
            self.flow(torch.zeros(1, *self.flow.shape, dtype=kind), context)
        meaning = "noise that the density is taken at: independent, uniform in [0, 1)"
        names = ["noise"] if len(shapes) == 1 else [f"noise{i}" for i in range(1, len(shapes) + 1)]
        return {name: Tensors(shape, meaning, "uniform") for name, shape in zip(names, shapes)}

    # ---- both directions --------------------------------------------------------------------------------------------

    def _describe_encode(self):
        return {"x": self._data()}, Tensors(self.flow.bijection.out_shape, "latent of each example")

    def _encode(self, given, context):
        with torch.no_grad(), global_batch.bin_centres(), states_only():
            return self.flow.bijection(*given, self.flow.embed(context))[0]

    def _describe_sample(self):
        try:
            noise = self.flow.base.noise
        except NotImplementedError as error:
            raise UsageError(
                f"what=sample: {type(self.flow.base).__name__} does not say of what noise its samples are made"
            ) from error
        names = ["noise"] if len(noise) == 1 else [f"noise{i}" for i in range(1, len(noise) + 1)]
        meaning = "noise that becomes samples: independent, {}; times T for temperature T"
        uniform = "independent, uniform in [0, 1)"
        meanings = [uniform if one.kind == "uniform" else meaning.format(f"standard {one.kind}") for one in noise]
        inputs = {name: Tensors(one.shape, text, one.kind) for name, one, text in zip(names, noise, meanings)}
        return inputs, Tensors(self.flow.shape, "samples, as the data are")

    def _sample(self, given, context):
        with torch.no_grad(), states_only():
            context = self.flow.embed(context)
            z = self.flow.base.from_noise(given, 1.0, context)
            return self.flow.bijection.inverse(z, context)[0]
