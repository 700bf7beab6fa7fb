"""Whether neighbouring layers may be computed as one.

An affine map of the channels costs less inside the weights of the layer before or after it than by itself. A layer that
starts from data needs its own input, so :meth:`flowtrain.flow.Flow.initialize` runs every layer by itself.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import nn

from flowtrain.runtime import modes

_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


def layer_by_layer() -> AbstractContextManager[None]:
    """Within it, every layer is called by itself."""
    return modes.using(layer_by_layer=True)


def may_fuse(*modules: nn.Module) -> bool:
    """False if layers are called one by one, or if one of ``modules`` has a hook, such as weight_norm's."""
    return not (modes.current().layer_by_layer or any(getattr(module, hooks) for module in modules for hooks in _HOOKS))
