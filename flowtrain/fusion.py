"""Whether neighbouring layers may be computed as one.

An affine map of the channels costs less inside the weights of the layer before or after it than by itself. What starts
from data has to see its own input, so :meth:`flowtrain.flow.Flow.initialize` runs every layer by itself.
"""

from __future__ import annotations

from contextlib import contextmanager

_separate = False


@contextmanager
def layer_by_layer():
    """Within it, every layer is called by itself, as its hooks may want too."""
    global _separate
    previous, _separate = _separate, True
    try:
        yield
    finally:
        _separate = previous


def separate() -> bool:
    return _separate
