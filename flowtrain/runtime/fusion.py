"""Whether neighbouring layers may be computed as one.

An affine map of the channels costs less inside the weights of the layer before or after it than by itself. What starts
from data has to see its own input, so :meth:`flowtrain.flow.Flow.initialize` runs every layer by itself.
"""

from __future__ import annotations

from contextlib import contextmanager

from torch import nn

_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
_separate = False


@contextmanager
def layer_by_layer():
    """Within it, every layer is called by itself."""
    global _separate
    previous, _separate = _separate, True
    try:
        yield
    finally:
        _separate = previous


def separate(*modules: nn.Module) -> bool:
    """Whether ``modules`` are called by themselves: everything is, or one of them has a hook, such as weight_norm's."""
    return _separate or any(getattr(module, hooks) for module in modules for hooks in _HOOKS)
