"""Suite ``decode``: decoding a TarFlow block, against the same weights in a loop whose cache grows by concatenation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from flowtrain import flows
from flowtrain.benchmarks import ours
from flowtrain.benchmarks.sampling import without_gradients
from flowtrain.benchmarks.session import Load, Row, Session, row
from flowtrain.bijections import Autoregressive
from flowtrain.bijections.decoding import jacobi

CACHE, JACOBI, GROWING = "cache in place", "Jacobi iteration", "cache that grows"
TARGET = 1 / 10
TOLERANCE, RESIDUAL = 1e-5, 1e-4


def rows(session: Session) -> Iterator[Row]:
    """The whole loop over the patches of an image of 64×64 pixels, for a batch and for one image."""
    side, hidden, batches = (8, 8, (2, 1)) if session.smoke else (64, 128, (16, 1))
    x = torch.randn(max(batches), 3, side, side).to(session.device)
    make = partial(flows.tarflow, (3, side, side), patch=2, depths=(1,), hidden=hidden)
    layer = ours.build_perturbed(make, x, session.seed).bijection.block0.eval()
    for batch in batches:
        yield from _of_batch(session, layer, batch)


def _of_batch(session: Session, layer: Autoregressive, batch: int) -> Iterator[Row]:
    z = torch.randn(batch, *layer.shape).to(session.device)
    what = f"TarFlow decoding, {batch} of {layer.shape[0]:,} patches"
    session.count(what, {CACHE: layer})

    def at_once() -> Tensor:
        with jacobi(RESIDUAL):
            return layer.inverse(z)[0]

    with torch.no_grad(), jacobi(RESIDUAL) as inverses:
        reference = grow(layer, z)
        residual = (layer(layer.inverse(z)[0])[0] - z).abs().max().item()
    with torch.no_grad():
        apart = (layer.inverse(z)[0] - reference).abs().max().item()
    session.check(f"{what}: {CACHE} and {GROWING}", apart, TOLERANCE)
    session.check(f"{what}: residual of {JACOBI}", residual, RESIDUAL)
    session.say(f"{what}: {JACOBI}, {inverses}")
    times = session.times(
        {
            CACHE: without_gradients(layer, lambda: layer.inverse(z)),
            JACOBI: without_gradients(layer, at_once),
            GROWING: without_gradients(layer, lambda: grow(layer, z)),
        }
    )
    load = Load(batch, "images")
    yield row("decode", what, times, CACHE, GROWING, TARGET if batch > 1 else None, load)
    yield row("decode", what, times, JACOBI, GROWING, None if batch > 1 else TARGET, load)


def grow(layer: Autoregressive, z: Tensor) -> Tensor:
    """The inverse of a layer as public decoders have it: at each token and layer of attention, keys and values are
    concatenated to those before."""
    net, z = layer.net, layer._sort(z)
    keys: list = [None] * len(net.blocks)
    values: list = [None] * len(net.blocks)
    x = z[:, :0]
    for i in range(z.shape[1]):
        newest = x[:, -1:] if i else torch.zeros_like(z[:, :1])
        h = net.embed(newest) + net.position[i : i + 1]
        for number, block in enumerate(net.blocks):
            three = block.query_key_value(block.norm_attention(h))
            query, key, value = three.unflatten(2, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
            keys[number] = key if i == 0 else torch.cat((keys[number], key), 2)
            values[number] = value if i == 0 else torch.cat((values[number], value), 2)
            attention = F.scaled_dot_product_attention(query, keys[number], values[number])
            h = h + block.attention_out(attention.transpose(1, 2).flatten(2))
            h = h + block.feed_out(F.gelu(block.feed(block.norm_feed(h))))
        theta = (net.last(net.norm(h)) + net.bias[i : i + 1]).unflatten(2, net.row)
        x = torch.cat((x, layer.univariate.inverse(z[:, i : i + 1], theta)[0]), 1)
    return layer._unsort(x)
