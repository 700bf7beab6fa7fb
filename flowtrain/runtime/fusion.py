"""Whether neighbouring layers may be computed as one.

An affine map of the channels costs less inside the weights of the layer before or after it than by itself. A layer that
starts from data needs its own input, so :meth:`flowtrain.flow.Flow.initialize` runs every layer by itself.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import nn

from flowtrain.runtime import modes


def layer_by_layer() -> AbstractContextManager[None]:
    """Within it, every layer is called by itself."""
    return modes.using(layer_by_layer=True)


def may_fuse(*modules: nn.Module) -> bool:
    """False if layers are called one by one, or if one of ``modules`` has a hook."""
    return not (modes.current().layer_by_layer or have_hooks(*modules))


def have_hooks(*modules: nn.Module) -> bool:
    """Whether one of ``modules`` has a hook, such as weight_norm's, which would not be called."""
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return True
    return False
