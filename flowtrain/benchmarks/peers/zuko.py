"""zuko (Rozet et al.). It transforms the networks' outputs to scales and splines differently, so densities differ."""

from __future__ import annotations

import zuko
from zuko.transforms import MonotonicRQSTransform

from flowtrain.benchmarks.ours import BINS
from flowtrain.benchmarks.peers.common import Peer

BOUND = 3.0


class _Zuko(Peer):
    def __init__(self, flow):
        super().__init__()
        self.transform = flow.transform

    def encode(self, x):
        return self.transform().call_and_ladj(x)

    def decode(self, z):
        return self.transform().inv(z)


def maf(ours, dimensions: int, hidden: int, steps: int) -> Peer:
    return _Zuko(zuko.flows.MAF(dimensions, transforms=steps, hidden_features=(hidden, hidden)))


def nsf_autoregressive(ours, dimensions: int, hidden: int, steps: int, **kwargs) -> Peer:
    return _Zuko(
        zuko.flows.NSF(
            dimensions, bins=BINS, transforms=steps, hidden_features=(hidden, hidden), residual=True, **kwargs
        )
    )


def nsf_coupling(ours, dimensions: int, hidden: int, steps: int) -> Peer:
    """Build couplings with splines on all elements; the splines of the conditioning half are unconditional."""
    return nsf_autoregressive(ours, dimensions, hidden, steps, passes=2)


def spline(x, widths, heights, slopes):
    return MonotonicRQSTransform(widths, heights, slopes, bound=BOUND).call_and_ladj(x)
