"""Lazy Attention in plain JAX: a backend of `attention.py`, and the kernels' readable twin.

Memory is linear in length. Heads are walked one by one because each goes only as far as its
own span. Where keys are more than queries, the queries stand at the last ones.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import bias as bias_lib
from pallas_kernels import placement
from pallas_kernels.chunked.backward import HeadGradients
from pallas_kernels.chunked.backward import backward as backward_of_head
from pallas_kernels.chunked.forward import HeadInputs
from pallas_kernels.chunked.forward import forward as forward_of_head
from pallas_kernels.chunked.tiling import tile_size
from pallas_kernels.problem import Gradients, Inputs, Problem, Residuals
from pallas_kernels.visit import TileSizes, VisitRanges, visit_ranges

PLAIN_JAX = True


def plan(problem: Problem, inputs: Inputs) -> Problem:
    """Returns the problem: nothing more is static here."""
    del inputs
    return problem


def place(inputs: Inputs, start: Int[Array, ""]) -> Inputs:
    """Returns the inputs of queries that stand at keys `start`, `start` + 1, ..."""
    return placement.move(inputs, start, tile_size(inputs.query.shape[1]))


def table(
    plan: Problem,
    distance_bias: Float[Array, "heads width"] | None,
    distance_slope: Float[Array, " heads"] | None,
    length: int,
) -> Float[Array, "heads length"] | None:
    """Returns b(x) of every distance 0 <= x < length; None: 0."""
    del plan
    if distance_bias is None:
        return None
    return bias_lib.expand(distance_bias, distance_slope, length)


def ranges(
    plan: Problem,
    inputs: Inputs,
    table: Float[Array, "heads key_length"] | None,
    *,
    training: bool,
) -> Int[Array, " heads"]:
    """Returns the span of each head: the farthest diagonal of tiles that is visited.

    A diagonal is walked for all rows and batch entries at once: the widest counts.
    """
    del training
    found = _visit_ranges(plan, inputs, table)
    return jnp.max(found.visited - 1, axis=(0, 2))


def forward(
    plan: Problem,
    inputs: Inputs,
    table: Float[Array, "heads key_length"] | None,
    ranges: Int[Array, " heads"],
    *,
    training: bool,
) -> tuple[Float[Array, "batch length heads value_dim"], Residuals]:
    """Returns the output and the residuals.

    All floats of these are float32 (float64 for float64 inputs): sums of half-precision values
    may overflow in their own dtype, and delta takes every rounding of them to all keys alike.
    `lse` is [heads, tiles, batch, size], `live` says of each of [heads, diagonals] whether
    there is a live entry, and `live_v` is the sum of the values of live entries.
    """
    length = inputs.query.shape[1]
    heads = _Heads(inputs, table, ranges)
    want_live_v = training and inputs.offset is not None
    run = functools.partial(forward_of_head, scale=plan.scale, want_live_v=want_live_v)
    out, lse, live_v, live = jax.lax.map(
        lambda index: run(heads.head(index)), jnp.arange(heads.num_heads)
    )
    out = _from_tiles(out, length)
    if live_v is not None:
        live_v = _from_tiles(live_v, length)
    residuals = Residuals(lse=lse, out=out, live=live, live_v=live_v)
    if training:
        # Named, so that a checkpoint policy can keep what loops made.
        residuals = jax.tree.map(lambda x: checkpoint_name(x, "attention"), residuals)
    return out.astype(plan.out_dtype or inputs.query.dtype), residuals


def backward(
    plan: Problem,
    inputs: Inputs,
    table: Float[Array, "heads key_length"] | None,
    ranges: Int[Array, " heads"],
    residuals: Residuals,
    d_out: Float[Array, "batch length heads value_dim"],
    groups: int,
) -> Gradients:
    """Returns the gradients; there is one group, since JAX batches this."""
    assert groups == 1 and residuals.out is not None and residuals.live is not None
    live, lse = residuals.live, residuals.lse
    heads = _Heads(inputs, table, ranges)
    out, d_out = _to_tiles(residuals.out, heads.size), _to_tiles(d_out, heads.size)
    live_v = None if residuals.live_v is None else _to_tiles(residuals.live_v, heads.size)

    def one_head(index: Int[Array, ""]) -> HeadGradients:
        return backward_of_head(
            heads.head(index),
            out[index],
            lse[index],
            None if live_v is None else live_v[index],
            live[index],
            d_out[index],
            plan.scale,
        )

    found = jax.lax.map(one_head, jnp.arange(heads.num_heads))

    def sum_group(x: Array) -> Array:
        return x.reshape(-1, heads.group, *x.shape[1:]).sum(axis=1)

    d_bias = d_slope = None
    if inputs.distance_bias is not None:
        width, has_slope = inputs.distance_bias.shape[1], inputs.distance_slope is not None
        d_bias, d_slope = bias_lib.adjoint(found.bias[None], width, has_slope=has_slope)
    query, key, value = inputs.query, inputs.key, inputs.value
    return Gradients(
        query=_from_tiles(found.query, heads.length).astype(query.dtype),
        key=_from_tiles(sum_group(found.key), heads.key_length).astype(key.dtype),
        value=_from_tiles(sum_group(found.value), heads.key_length).astype(value.dtype),
        distance_bias=d_bias,
        distance_slope=d_slope,
        offset=None if inputs.offset is None else found.offset.astype(inputs.offset.dtype)[None],
    )


def _visit_ranges(
    plan: Problem, inputs: Inputs, table: Float[Array, "heads key_length"] | None
) -> VisitRanges:
    """Returns the ranges of the query tiles there are, in tiles of `key`."""
    query, key, start = inputs.query, inputs.key, inputs.segment_start
    size = tile_size(query.shape[1])
    missing = key.shape[1] - query.shape[1]
    # Queries are first filled up to one a key: it is cheap, and `visit.py` stays simple.
    own = jnp.broadcast_to(jnp.arange(missing, dtype=start.dtype), (start.shape[0], missing))
    found = visit_ranges(
        jnp.pad(query, ((0, 0), (missing, 0), (0, 0), (0, 0))),
        key,
        table,
        inputs.offset,
        jnp.concatenate([own, start], axis=1),
        scale=plan.scale,
        skip_mass=plan.skip_mass,
        tiles=TileSizes(size, size),
    )
    ahead = missing // size
    return VisitRanges(found.first[..., ahead:], found.last[ahead:])


class _Heads:
    """A call cut into tiles, from which each query head takes its part."""

    def __init__(
        self,
        inputs: Inputs,
        table: Float[Array, "heads key_length"] | None,
        span: Int[Array, " heads"],
    ):
        self.length, self.num_heads = inputs.query.shape[1:3]
        self.key_length = inputs.key.shape[1]
        self.size = tile_size(self.length)
        self.group = self.num_heads // inputs.key.shape[2]
        self.query = _to_tiles(inputs.query, self.size)
        self.key = _to_tiles(inputs.key, self.size)
        self.value = _to_tiles(inputs.value, self.size)
        self.bias, self.offset, self.span = table, inputs.offset, span
        self.segment_start = _rows_to_tiles(inputs.segment_start, self.size)
        self.offset_scale = _rows_to_tiles(inputs.offset_scale, self.size)

    def head(self, index: Int[Array, ""]) -> HeadInputs:
        return HeadInputs(
            query=self.query[index],
            key=self.key[index // self.group],
            value=self.value[index // self.group],
            bias=None if self.bias is None else self.bias[index],
            offset=None if self.offset is None else self.offset[index],
            segment_start=self.segment_start,
            offset_scale=self.offset_scale,
            span=self.span[index],
        )


def _to_tiles(x: Shaped[Array, "batch length *rest"], size: int) -> Shaped[Array, "..."]:
    """[batch, length, heads, dim] -> [heads, tiles, batch, size, dim], zero-padded."""
    batch, length, heads, dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % size), (0, 0), (0, 0)))
    return x.reshape(batch, -1, size, heads, dim).transpose(3, 1, 0, 2, 4)


def _from_tiles(x: Shaped[Array, "heads tiles batch size dim"], length: int) -> Array:
    """[heads, tiles, batch, size, dim] -> [batch, length, heads, dim]."""
    heads, _, batch, _, dim = x.shape
    return x.transpose(2, 1, 3, 0, 4).reshape(batch, -1, heads, dim)[:, :length]


def _rows_to_tiles(x: Shaped[Array, "batch length"], size: int) -> Array:
    """[batch, length] -> [tiles, batch, size], the last row repeated as padding."""
    batch, length = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % size)), mode="edge")
    return x.reshape(batch, -1, size).transpose(1, 0, 2)
