"""Attention weights a block of queries at a time, so that memory is linear in length."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lazyattn.inspect.walk import LayerInput

# Numbers of a block of weights, over the heads that are worked on together.
_MAX_BLOCK = 2**21


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """One row and head of a `LayerInput`, padded to whole blocks."""

    query: Float[Array, "padded head_dim"]
    key: Float[Array, "padded head_dim"]
    bias: Float[Array, " padded"] | None
    offset: Float[Array, ""] | None
    first: Int[Array, " padded"]
    offset_scale: Float[Array, " padded"]
    real: Bool[Array, " padded"]
    window: Int[Array, ""] | None


@dataclasses.dataclass(frozen=True)
class Block:
    """The weights of some consecutive queries on all keys.

    Attributes:
      start: index of the first query.
      softmax: before the offset, 0 where not visible.
      weights: after it.
      visible: whether the query sees the key; padding sees nothing.
      first: index of the first key of each query's document.
    """

    start: Int[Array, ""]
    softmax: Float[Array, "queries keys"]
    weights: Float[Array, "queries keys"]
    visible: Bool[Array, "queries keys"]
    first: Int[Array, " queries"]


def block_size(length: int) -> int:
    """Returns how many queries are looked at together: 64, or 128 and more in long rows."""
    return 64 if length <= 64 else max(128, cell_size(length))


def cell_size(length: int) -> int:
    """Returns the smallest power of two that cuts a length into 128 cells or fewer."""
    return 1 << max(0, (-(-length // 128) - 1).bit_length())


def map_heads(
    layer: LayerInput,
    function: Callable[[Head], Any],
) -> Any:
    """Returns what a function gives for each row and head, as leading axes [rows, heads].

    So many heads are worked on together as bounded memory allows.
    """
    rows, length, heads, _ = layer.query.shape
    size = block_size(length)
    padded = -(-length // size) * size
    layer = _pad(layer, padded)
    group = heads // layer.key.shape[2]
    windows = None
    if any(window is not None for window in layer.windows):
        windows = jnp.asarray([length if w is None else w for w in layer.windows])

    def one(index: Int[Array, ""]) -> Any:
        row, head = index // heads, index % heads
        return function(
            Head(
                layer.query[row, :, head],
                layer.key[row, :, head // group],
                None if layer.bias is None else layer.bias[head],
                None if layer.offset is None else layer.offset[head],
                layer.first[row],
                layer.offset_scale[row, :, head],
                layer.real[row],
                None if windows is None else windows[head],
            )
        )

    # A divisor, so that there is no smaller rest to be compiled for as well.
    together = min(rows * heads, max(1, _MAX_BLOCK // (size * padded)))
    while rows * heads % together:
        together -= 1
    found = jax.lax.map(one, jnp.arange(rows * heads), batch_size=together)
    return jax.tree.map(lambda x: x.reshape(rows, heads, *x.shape[1:]), found)


def scan_blocks(
    head: Head, renormalize: bool, size: int, function: Callable[[Block], tuple[Any, Any]]
) -> tuple[Any, Any]:
    """Looks at a head's weights block by block.

    Args:
      head: a row's head.
      renormalize: divide each row of weights by its sum, where it isn't 0.
      size: queries of a block.
      function: block -> what is added up over blocks, and what is kept of each.

    Returns:
      The sums, and what was kept with a leading axis of blocks.
    """

    def body(total: Any, start: Int[Array, ""]) -> tuple[Any, Any]:
        added, kept = function(block_weights(head, renormalize, size, start))
        return jax.tree.map(jnp.add, total, added), kept

    starts = jnp.arange(0, head.query.shape[0], size)
    shapes = jax.eval_shape(lambda: function(block_weights(head, renormalize, size, starts[0]))[0])
    zero = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return jax.lax.scan(body, zero, starts)


def block_weights(head: Head, renormalize: bool, size: int, start: Int[Array, ""]) -> Block:
    """Returns the weights of `size` queries, as `lazyattn.reference` defines them."""

    def take(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size)

    scores = head.query.shape[-1] ** -0.5 * jnp.dot(
        take(head.query),
        head.key.T,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    first = take(head.first)
    keys = jnp.arange(head.key.shape[0])
    distance = start + jnp.arange(size)[:, None] - keys
    visible = (distance >= 0) & (keys >= first[:, None]) & take(head.real)[:, None]
    if head.window is not None:
        visible &= distance < head.window
    if head.bias is not None:
        scores += head.bias[jnp.clip(distance, 0)]
    # A finite fill: padding sees nothing, and its rows must not become NaN.
    softmax = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
    softmax = jnp.where(visible, softmax, 0)
    weights = softmax
    if head.offset is not None:
        threshold = head.offset * take(head.offset_scale)[:, None]
        weights = jnp.where(visible, jax.nn.relu(softmax + threshold), 0)
        if renormalize:
            total = weights.sum(axis=-1, keepdims=True)
            weights = weights / jnp.where(total > 0, total, 1)
    return Block(start, softmax, weights, visible, first)


def _pad(layer: LayerInput, padded: int) -> LayerInput:
    missing = padded - layer.query.shape[1]

    def pad(x: Array | None) -> Any:
        if x is None:
            return None
        return jnp.pad(x, [(0, missing if axis == 1 else 0) for axis in range(x.ndim)])

    return LayerInput(
        pad(layer.query),
        pad(layer.key),
        pad(layer.bias),
        layer.offset,
        pad(layer.first),
        pad(layer.offset_scale),
        pad(layer.real),
        layer.windows,
    )
