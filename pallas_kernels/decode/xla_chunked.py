"""Decoding in plain JAX that leaves out what it need not read: made for CPUs.

One head of the cache after the other, in chunks of a few pages: first the scores of all chunks
with a page that must be read, then the values of chunks with a weight above 0.

Where no page can be left out, all heads at once, so that memory is read in order. The products
with the keys are then those of one matrix, of which only its diagonal blocks, the heads, are not
0: that is more work, but CPUs have more of it than of memory. So a key that is no number reaches
the other heads of its row as well.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode import pages, xla
from pallas_kernels.decode.types import (
    PAGE,
    Inputs,
    Settings,
    backs,
    finished,
    offset_scales,
    visible,
)

# Slots of a chunk: a loop's step costs some microseconds.
_CHUNK = 4 * PAGE

# Columns of the matrix of all heads' queries, up to which it is quicker.
_COLUMNS = 32

_HIGHEST = jax.lax.Precision.HIGHEST


def attention(inputs: Inputs, settings: Settings) -> Float[Array, "batch new heads head_dim"]:
    """Returns the output; arguments as in `op.attention`."""
    query = inputs.query
    batch, new, _, head_dim = query.shape
    skips = inputs.key_norms is not None and inputs.distance_bias is not None
    skips = skips and settings.skip_mass > 0
    if not skips and inputs.kv_heads * new * inputs.group <= _COLUMNS:
        return finished(_all_at_once(inputs, settings), inputs, settings)
    grouped = query.reshape(batch, new, inputs.kv_heads, inputs.group, head_dim)
    call = _Call(inputs, settings)
    out = jax.lax.map(
        lambda x: call.head(*x),
        (
            jnp.arange(inputs.kv_heads, dtype=jnp.int32),
            grouped.transpose(2, 0, 3, 1, 4),
            call.needed(),
        ),
    )
    out = out.transpose(1, 3, 0, 2, 4).reshape(query.shape).astype(query.dtype)
    return finished(out, inputs, settings)


def _all_at_once(inputs: Inputs, settings: Settings) -> Float[Array, "batch new heads head_dim"]:
    """Returns the output of a call that reads everything."""
    query, kv_heads = inputs.query, inputs.kv_heads
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    batch, new, _, head_dim = query.shape
    grouped = query.reshape(batch, new, kv_heads, inputs.group, head_dim)
    blocks = grouped.transpose(0, 2, 4, 3, 1)[:, :, :, None]
    blocks = blocks * jnp.eye(kv_heads, dtype=query.dtype)[:, None, :, None, None]
    keys = inputs.of_layer(inputs.key).astype(query.dtype)
    products = jnp.einsum(
        "bse,bec->bsc",
        keys.reshape(batch, inputs.slots, kv_heads * head_dim),
        blocks.reshape(batch, kv_heads * head_dim, -1),
        precision=_HIGHEST,
        preferred_element_type=dtype,
    )
    products = products.reshape(batch, inputs.slots, kv_heads, inputs.group, new)
    weights = xla.weights(inputs, settings, products.transpose(0, 2, 3, 4, 1))
    if inputs.value_scales is not None:
        weights *= xla.of_slots(inputs, inputs.value_scales, dtype)
    weights = weights.astype(query.dtype).astype(dtype).transpose(0, 4, 3, 1, 2)
    values = inputs.of_layer(inputs.value)

    def weighted(values: Array) -> Array:
        return (weights[..., None] * values.astype(dtype)[:, :, None, :, None]).sum(axis=1)

    def masked() -> Array:
        held = visible(inputs, settings).any(axis=1)[:, :, None, None]
        return weighted(jnp.where(held, values, 0))

    # What no query sees may be no number; leaving that out takes five times as long.
    out = weighted(values)
    out = jax.lax.cond(jnp.isfinite(out).all(), lambda: out, masked)
    return out.reshape(query.shape).astype(query.dtype)


class _Call:
    """What all heads share."""

    def __init__(self, inputs: Inputs, settings: Settings):
        self.inputs, self.settings = inputs, settings
        self.dtype = jnp.promote_types(inputs.query.dtype, jnp.float32)
        self.size = min(_CHUNK, inputs.slots)
        self.chunks = -(-inputs.slots // self.size)
        self.key, self.value = inputs.of_layer(inputs.key), inputs.of_layer(inputs.value)
        self.seen = visible(inputs, settings)
        self.back = backs(inputs)

    def needed(self) -> Array:
        """Returns whether some row must read a chunk, bool [kv_heads, chunks]."""
        page = pages.visited(self.inputs, self.settings).any(axis=0)
        a_chunk = -(-self.size // PAGE)
        padded = jnp.pad(page, ((0, 0), (0, self.chunks * a_chunk - page.shape[1])))
        return padded.reshape(page.shape[0], self.chunks, a_chunk).any(axis=-1)

    def start(self, chunk: Int[Array, ""]) -> Int[Array, ""]:
        """Returns a chunk's first slot; the last chunk may overlap the one before it."""
        return jnp.minimum(chunk * self.size, self.inputs.slots - self.size)

    def part(self, x: Array, chunk: Int[Array, ""], axis: int) -> Array:
        """Returns a chunk of x along its axis of slots."""
        return jax.lax.dynamic_slice_in_dim(x, self.start(chunk), self.size, axis)

    def sees(self, chunk: Int[Array, ""]) -> Array:
        """Returns which of a chunk's slots queries see and it alone has, [batch, 1, new, size]."""
        seen = self.part(self.seen, chunk, 2)
        return (seen & (self._slots(chunk) >= chunk * self.size))[:, None]

    def _slots(self, chunk: Int[Array, ""]) -> Array:
        return self.start(chunk) + jnp.arange(self.size, dtype=jnp.int32)

    def numbers(self, cache: Array, head: Int[Array, ""], chunk: Int[Array, ""]) -> Array:
        """Returns a head's keys or values of a chunk, [batch, size, head_dim]."""
        batch, _, _, head_dim = cache.shape
        at = (0, self.start(chunk), head, 0)
        part = jax.lax.dynamic_slice(cache, at, (batch, self.size, 1, head_dim))
        return part[:, :, 0].astype(self.inputs.query.dtype)

    def scales(self, x: Array, head: Int[Array, ""], chunk: Int[Array, ""]) -> Array:
        """Returns a number of each page for each slot of a chunk, [batch, 1, 1, size]."""
        each = jax.lax.dynamic_index_in_dim(self.inputs.of_layer(x), head, 1, False)
        return each.astype(self.dtype)[:, None, None, self._slots(chunk) // PAGE]

    def head(
        self,
        head: Int[Array, ""],
        query: Float[Array, "batch group new head_dim"],
        needed: Array,
    ) -> Float[Array, "batch group new head_dim"]:
        """Returns the output of the queries that read one head of the cache."""
        inputs, settings = self.inputs, self.settings
        shape = (*query.shape[:3], self.size)
        first = head * inputs.group

        def own(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, first, inputs.group, 0).astype(self.dtype)

        def scores(chunk: Int[Array, ""]) -> Array:
            keys = self.numbers(self.key, head, chunk)
            product = jnp.einsum(
                "bgnd,bsd->bgns",
                query,
                keys,
                precision=_HIGHEST,
                preferred_element_type=self.dtype,
            )
            found = settings.scale * product
            if inputs.key_scales is not None:
                found *= self.scales(inputs.key_scales, head, chunk)
            if inputs.distance_bias is not None:
                slope = inputs.distance_slope
                found += self._bias(
                    own(inputs.distance_bias), None if slope is None else own(slope), chunk
                )
            return jnp.where(self.sees(chunk), found, -jnp.inf)

        def scores_or_none(x: tuple[Array, Array]) -> Array:
            chunk, need = x
            return jax.lax.cond(
                need, scores, lambda _: jnp.full(shape, -jnp.inf, self.dtype), chunk
            )

        chunk = jnp.arange(self.chunks, dtype=jnp.int32)
        every = jax.lax.map(scores_or_none, (chunk, needed))
        highest = every.max(axis=(0, -1), keepdims=True)
        exponentials = jnp.exp(every - highest)
        weights = exponentials / exponentials.sum(axis=(0, -1), keepdims=True)
        if inputs.offset is not None:
            shift = own(inputs.offset)[:, None] * offset_scales(inputs, settings)[:, None]
            seen = jax.vmap(self.sees)(chunk)
            weights = jnp.where(seen, jax.nn.relu(weights + shift[..., None]), 0)
            if settings.renormalize:
                total = weights.sum(axis=(0, -1), keepdims=True)
                weights = weights / jnp.where(total > 0, total, 1)
        live = (weights != 0).any(axis=(1, 2, 3, 4))

        def add(chunk: Int[Array, ""], total: Array) -> Array:
            def weighted(chunk: Int[Array, ""]) -> Array:
                mine = weights[chunk]
                if inputs.value_scales is not None:
                    mine *= self.scales(inputs.value_scales, head, chunk)
                values = self.numbers(self.value, head, chunk)
                # What no query sees may be no number.
                seen = self.sees(chunk).any(axis=(1, 2))
                values = jnp.where(seen[..., None], values, 0)
                return jnp.einsum(
                    "bgns,bsd->bgnd",
                    mine.astype(values.dtype),
                    values,
                    precision=_HIGHEST,
                    preferred_element_type=self.dtype,
                )

            return total + jax.lax.cond(
                live[chunk], weighted, lambda _: jnp.zeros_like(total), chunk
            )

        return jax.lax.fori_loop(0, self.chunks, add, jnp.zeros(query.shape, self.dtype))

    def _bias(
        self,
        table: Float[Array, "group width"],
        slope: Float[Array, " group"] | None,
        chunk: Int[Array, ""],
    ) -> Float[Array, "batch group new size"]:
        new, width = self.inputs.new, table.shape[1]
        before_newest = new - 1 - jnp.arange(new, dtype=jnp.int32)
        distance = self.part(self.back, chunk, 1)[:, None] - before_newest[:, None]
        near = table[:, jnp.clip(distance, 0, width - 1)]
        far = jnp.zeros_like(near)
        if slope is not None:
            far = near - slope[:, None, None, None] * (distance - (width - 1))
        return jnp.where(distance < width, near, far).swapaxes(0, 1)
