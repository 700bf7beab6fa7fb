"""Whether the flow of a run is compiled, and since when."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from flowtrain.engine.compile_gain import Gain
from flowtrain.engine.compiling import Compilation


@dataclass
class CompileChoice:
    """A choice that was made before the first step. It is a context around all steps.

    Attributes:
        compilation: of the flow, where it runs compiled.
        gain: the figures by which that was chosen, or None.
        since: the number of steps that the run had taken before.
    """

    compilation: Compilation | None = None
    gain: Gain | None = None
    since: int = 0

    def __enter__(self) -> CompileChoice:
        return self

    def __exit__(self, *_) -> None:
        pass

    def after_step(self, step: int, seconds: float, took: float) -> None:
        """To be called after each step with a settled number of threads: with the run's steps and seconds up to now,
        and the duration of the step. Here a later choice compiles the flow."""

    def state_dict(self) -> dict:
        """For a checkpoint: a run that is resumed or repeated makes the same choice. One that is still open has "open",
        and a resumed run makes it."""
        gain = self.gain and asdict(self.gain)
        return {"compiled": self.compilation is not None, "since": self.since, "gain": gain}
