"""How much of the causal matrix counts: measured from a call's own inputs."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from benchmarks import cases
from pallas_kernels import bias as bias_lib
from pallas_kernels.visit import TileSizes, visit_ranges

TILES = TileSizes(128, 64)


class Design(NamedTuple):
    """How our GPU kernels divide the work.

    Attributes:
      mean_key: the forward pass finds the mean of the keys, so that dQ asks nothing of dead
        tiles, rather than the sum of live values.
      bias_apart: the table's gradient has a kernel of its own.
      value_apart: dV has one.
    """

    mean_key: bool = False
    bias_apart: bool = True
    value_apart: bool = False


class Shares(NamedTuple):
    """Shares of the causal tiles.

    Attributes:
      visited: not negligible.
      live: with a weight above zero.
      visited_near, live_near: of these, with a distance inside the bias table.
    """

    visited: Float[Array, ""]
    live: Float[Array, ""]
    visited_near: Float[Array, ""]
    live_near: Float[Array, ""]

    def products(self, which: str, offset: bool, design: Design) -> float:
        """Returns how many causal products of queries and keys our GPU kernels compute.

        In float16 the Hopper kernels compute S once more in training, which is not counted.
        Softmax attention computes 2 forward, and 7 forward and backward.

        Args:
          which: "forward", or "training" for forward and backward.
          offset: whether it is Elastic-Softmax.
          design: of the kernels.
        """
        visited, live, visited_near, live_near = map(float, self)
        if not design.bias_apart:
            visited_near = live_near = 0.0
        if not offset:
            # S, P V; dQ: S, dP, dQ; dK and dV: S, dP, dV, dK; the table's gradient: S, dP.
            return 2 * visited + (7 * visited + 2 * visited_near if which == "training" else 0)
        if which == "forward":
            return visited + 2 * live
        dead = visited - live
        if design.mean_key:
            # S, P K; S, A V. dQ: S, dP, (P dP) K.
            queries = 2 * visited + (2 + 3) * live
        else:
            # The second sweep also sums the values of live weights. dQ: S, dP, dQ.
            queries = visited + 3 * live + 3 * live + 2 * dead
        # dK and dV: S, dP, dV, dK; where dV has a kernel of its own, S again.
        keys = (4 + design.value_apart) * live + 2 * dead
        return queries + keys + visited_near + live_near


@functools.partial(
    jax.jit,
    static_argnames=("skip_mass", "window"),
    # Trying kernels for its products would take minutes on a GPU.
    compiler_options={"xla_gpu_autotune_level": 0},
)
def by_definition(
    query: Float[Array, "batch length heads dim"],
    key: Float[Array, "batch length kv_heads dim"],
    parameters: dict[str, Array],
    *,
    skip_mass: float,
    window: int | None = None,
) -> Shares:
    """Returns what counts of the causal tiles of 128 queries x 64 keys.

    Live tiles are found from their weights, tile by tile, as the definition has them;
    kernels may take a few more to be live.

    Args:
      query: queries of one document a row.
      key: keys.
      parameters: distance_bias, distance_slope, offset, of which each may be missing.
      skip_mass: as in `lazyattn.lazy_attention`, like the next.
      window: of keys that a query sees.
    """
    batch, length, heads, dim = query.shape
    visible_keys = length if window is None else min(window, length)
    place = jnp.arange(length, dtype=jnp.int32)
    segment_start = jnp.maximum(place - visible_keys + 1, 0)
    table, offset = parameters.get("distance_bias"), parameters.get("offset")
    bias = jnp.zeros((heads, length))
    if table is not None:
        bias = bias_lib.expand(table, parameters.get("distance_slope"), length)
    ranges = visit_ranges(
        query,
        key,
        bias,
        offset,
        jnp.broadcast_to(segment_start, (batch, length)),
        scale=dim**-0.5,
        skip_mass=skip_mass,
        tiles=TILES,
    )
    count, _ = TILES.count(length)
    rows = jnp.pad(query, ((0, 0), (0, count * TILES.queries - length), (0, 0), (0, 0)))
    rows = rows.reshape(batch, count, TILES.queries, heads, dim)
    column = jnp.arange(-(-length // TILES.keys) * TILES.keys)
    keys = jnp.pad(key, ((0, 0), (0, column.size - length), (0, 0), (0, 0)))

    first_key = column[:: TILES.keys]
    nearest = jnp.arange(count)[:, None] * TILES.queries - (first_key + TILES.keys - 1)
    near = nearest < (0 if table is None else table.shape[1])

    def live_tiles(index: Array) -> Any:
        b, head, tile = index // (heads * count), index // count % heads, index % count
        row = tile * TILES.queries + jnp.arange(TILES.queries)[:, None]
        of_head = jax.lax.dynamic_index_in_dim(keys[b], head * key.shape[2] // heads, 1, False)
        scores = dim**-0.5 * jnp.dot(
            rows[b, tile, :, head], of_head.T, preferred_element_type=jnp.float32
        )
        scores += bias[head, jnp.clip(row - column, 0, length - 1)]
        visible = (column <= row) & (row < length) & (row - column < visible_keys)
        softmax = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
        threshold = 0.0
        if offset is not None:
            threshold = -offset[head] / jnp.minimum(row + 1, visible_keys)
        live = (softmax > threshold) & visible
        tiles = live.reshape(TILES.queries, -1, TILES.keys).any((0, 2))
        return jnp.stack([tiles.sum(), (tiles & near[tile]).sum()])

    live = jax.lax.map(live_tiles, jnp.arange(batch * heads * count), batch_size=8).sum(axis=0)
    key_tile = jnp.arange(first_key.size)
    visited = (ranges.first[..., None] <= key_tile) & (key_tile <= ranges.last[:, None])
    causal = batch * heads * (ranges.last + 1).sum()
    counts = (ranges.visited.sum(), live[0], (visited & near).sum(), live[1])
    return Shares(*(x / causal for x in counts))


def by_triton(
    tensors: Any, parameters: dict[str, Array], skip_mass: float, window: int | None = None
) -> Float[Array, ""]:
    """Returns the share of causal tiles that the Triton kernels compute in full.

    They take live tiles to be one range from the diagonal on. Arguments as above.
    """
    from pallas_kernels.triton import backend

    problem, inputs = cases.call(tensors, parameters, skip_mass, window)
    plan = backend.plan(problem)
    batch, length, heads, _ = inputs.query.shape

    @jax.jit
    def count(inputs):
        table = backend.table(plan, inputs.distance_bias, inputs.distance_slope, length)
        ranges = backend.ranges(plan, inputs, table, training=True)
        _, residuals = backend.forward(plan, inputs, table, ranges, training=True)
        live = ranges if residuals.live is None else residuals.live
        tiles = plan.blocks.forward
        end = jnp.arange(1, live.shape[-1] + 1) * tiles.queries
        stop = -(-jnp.minimum(end, length) // tiles.keys)
        return (stop - live).sum() / (batch * heads * stop.sum())

    return count(inputs)
