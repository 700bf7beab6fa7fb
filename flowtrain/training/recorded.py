"""What a run has chosen by measuring times, as its checkpoint says."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flowtrain.engine.compile_gain import Gain


@dataclass(frozen=True)
class Recorded:
    """Choices of a run, for one that resumes or repeats it.

    Attributes:
        turns: numbers of threads in the order in which steps had them; () where that is not known.
        compiled: whether it was compiled in the end; None where the checkpoint does not say.
        since: the number of steps before it was compiled.
        gain: the figures by which that was chosen, or None.
        open: it was not compiled because the choice had not been made yet.
    """

    turns: tuple[int, ...] = ()
    compiled: bool | None = None
    since: int = 0
    gain: Gain | None = None
    open: bool = False

    @classmethod
    def of(cls, state: dict) -> Recorded:
        """What the ``state`` of a checkpoint, which may be of an older version, says."""
        threads, choice = (_dict(state.get(name)) for name in ("threads", "compilation"))
        turns, compiled, since = threads.get("turns") or (), choice.get("compiled"), choice.get("since", 0)
        try:
            gain = Gain(**choice["gain"])
        except (KeyError, TypeError):
            gain = None
        return cls(
            tuple(turns) if all(type(one) is int and one > 0 for one in turns) else (),
            compiled if isinstance(compiled, bool) else None,
            since if type(since) is int else 0,
            gain,
            choice.get("open") is True,
        )

    def resumed(self) -> Recorded:
        """For the same run as it goes on: what was open is still to be chosen, and its turns are in its own state."""
        return replace(self, turns=(), compiled=None if self.open else self.compiled)


def _dict(value: object) -> dict:
    return value if isinstance(value, dict) else {}
