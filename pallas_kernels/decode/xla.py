"""Decoding as it is defined, in plain JAX: every key and value of the cache is read."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.decode.types import (
    PAGE,
    Inputs,
    Settings,
    distances,
    finished,
    offset_scales,
    visible,
)


def attention(inputs: Inputs, settings: Settings) -> Float[Array, "batch new heads head_dim"]:
    """Returns the output; arguments as in `op.attention`."""
    query, dtype = inputs.query, jnp.promote_types(inputs.query.dtype, jnp.float32)
    found = weights(inputs, settings)
    if inputs.value_scales is not None:
        found *= of_slots(inputs, inputs.value_scales, dtype)
    # What no query sees may be no number.
    held = visible(inputs, settings).any(axis=1)[:, :, None, None]
    value = jnp.where(held, inputs.of_layer(inputs.value), 0)
    out = jnp.einsum(
        "bhgns,bshd->bnhgd",
        found.astype(query.dtype),
        value.astype(query.dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )
    return finished(out.reshape(query.shape).astype(query.dtype), inputs, settings)


def weights(
    inputs: Inputs, settings: Settings, products: Array | None = None
) -> Float[Array, "batch kv_heads group new slots"]:
    """Returns the weight of each slot; NaN for queries that see nothing.

    Args:
      inputs, settings: of the call.
      products: of queries and keys, where they are known already.
    """
    query = inputs.query
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    if products is None:
        batch, new, _, head_dim = query.shape
        products = jnp.einsum(
            "bnhgd,bshd->bhgns",
            query.reshape(batch, new, inputs.kv_heads, inputs.group, head_dim),
            inputs.of_layer(inputs.key).astype(query.dtype),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=dtype,
        )
    scores = settings.scale * products
    if inputs.key_scales is not None:
        scores *= of_slots(inputs, inputs.key_scales, dtype)
    if inputs.distance_bias is not None:
        bias = bias_of(inputs, distances(inputs), dtype)
        scores += bias.reshape(inputs.kv_heads, inputs.group, *bias.shape[1:]).transpose(
            2, 0, 1, 3, 4
        )
    seen = visible(inputs, settings)[:, None, None]
    return elastic(jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), seen, inputs, settings)


def elastic(
    softmax: Float[Array, "batch kv_heads group new slots"],
    seen: Array,
    inputs: Inputs,
    settings: Settings,
) -> Float[Array, "batch kv_heads group new slots"]:
    """Returns the weights that Elastic-Softmax makes of the softmax's; `seen` broadcasts."""
    if inputs.offset is None:
        return softmax
    offset = inputs.offset.astype(softmax.dtype).reshape(inputs.kv_heads, inputs.group, 1)
    shift = offset * offset_scales(inputs, settings)[:, None, None]
    weights = jnp.where(seen, jax.nn.relu(softmax + shift[..., None]), 0)
    if settings.renormalize:
        total = weights.sum(axis=-1, keepdims=True)
        weights = weights / jnp.where(total > 0, total, 1)
    return weights


def bias_of(inputs: Inputs, distance: Array, dtype: jnp.dtype) -> Array:
    """Returns b(x) of each head for distances x, [heads, *distance.shape].

    Anything where x is negative.
    """
    assert inputs.distance_bias is not None
    table = inputs.distance_bias.astype(dtype)
    width = table.shape[1]
    near = table[:, jnp.clip(distance, 0, width - 1)]
    if inputs.distance_slope is None:
        far = jnp.zeros_like(near)
    else:
        slope = inputs.distance_slope.astype(dtype).reshape(-1, *[1] * distance.ndim)
        far = near - slope * (distance - (width - 1))
    return jnp.where(distance < width, near, far)


def of_slots(
    inputs: Inputs, scales: Array, dtype: jnp.dtype
) -> Float[Array, "batch kv_heads 1 1 slots"]:
    """Returns a number of each page for each of its slots."""
    each = jnp.repeat(inputs.of_layer(scales).astype(dtype), PAGE, axis=-1)
    return each[:, :, None, None, : inputs.slots]
