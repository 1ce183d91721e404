"""Lazy Attention as it is defined, in one page: the oracle of every kernel.

Memory is quadratic in length. Source: arXiv 2601.00919 and docs/lazy_attention.md.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def lazy_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch key_length kv_heads head_dim"],
    value: Float[Array, "batch key_length kv_heads value_dim"],
    distance_bias: Float[Array, "heads width"] | None,
    distance_slope: Float[Array, " heads"] | None,
    offset: Float[Array, " heads"] | None,
    position: Int[Array, "batch length"],
    segment_start: Int[Array, "batch length"],
    *,
    offset_scale: Float[Array, "batch length"],
    renormalize: bool,
    scale: float,
    sink: Float[Array, " heads"] | None = None,
    soft_cap: float | None = None,
    seen_from: Int[Array, "batch key_length"] | None = None,
) -> tuple[
    Float[Array, "batch length heads value_dim"],
    Float[Array, "batch heads length key_length"],
]:
    """Returns the output and the attention weights.

    Args:
      query, key, value: as in `lazyattn.lazy_attention`.
      distance_bias, distance_slope, offset: as there.
      position: index of the key that stands at each query's own position.
      segment_start: index of the first key each query sees.
      offset_scale: 1 / n_i, or a constant.
      renormalize: divide the weights by their sum, where it isn't 0.
      scale: factor of the scores.
      sink, soft_cap: as in `lazyattn.lazy_attention`.
      seen_from: position of the first query that sees each key; None: the key's own.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    group = query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, group, axis=2), jnp.repeat(value, group, axis=2)
    # Of the position's dtype: under x64 XLA scatters wrongly by int64 distances on a GPU.
    keys = jnp.arange(key.shape[1], dtype=position.dtype)
    distance = position[:, :, None] - keys
    if seen_from is None:
        visible = distance >= 0
    else:
        visible = position[:, :, None] >= seen_from[:, None]
        distance = jnp.abs(distance)
    visible = (visible & (keys >= segment_start[:, :, None]))[:, None]

    # Positional discrimination: s_ij = q_i . k_j / sqrt(d) + b(i - j).
    scores = scale * jnp.einsum(
        "bqhd,bkhd->bhqk",
        query,
        key,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if distance_bias is not None:
        scores += bias_of(distance_bias.astype(dtype), distance_slope, distance)

    # Elastic-Softmax: a_ij = max(0, softmax(s)_ij + tau / n_i).
    scores = jnp.where(visible, scores, -jnp.inf)
    softmax = jax.nn.softmax(scores, axis=-1) if sink is None else softmax_with(sink, scores)
    weights = softmax
    if offset is not None:
        threshold = offset[:, None].astype(dtype) * offset_scale[:, None, :].astype(dtype)
        weights = jax.nn.relu(softmax + threshold[..., None])
        weights = jnp.where(visible, weights, 0)
        if renormalize:
            total = weights.sum(axis=-1, keepdims=True)
            weights = weights / jnp.where(total > 0, total, 1)

    return weighted_sum(weights, value).astype(query.dtype), weights


def softmax_with(
    sink: Float[Array, " heads"], scores: Float[Array, "batch heads length key_length"]
) -> Float[Array, "batch heads length key_length"]:
    """Returns exp(s_ij) / (exp(sink) + sum_j exp(s_ij)); 0 in rows that see nothing."""
    sink = sink.astype(scores.dtype)[:, None, None]
    largest = jnp.maximum(scores.max(axis=-1, keepdims=True), sink)
    largest = jax.lax.stop_gradient(largest)
    mass = jnp.exp(scores - largest)
    return mass / (mass.sum(axis=-1, keepdims=True) + jnp.exp(sink - largest))


@jax.custom_jvp
def weighted_sum(
    weights: Float[Array, "batch heads length key_length"],
    value: Float[Array, "batch key_length heads value_dim"],
) -> Float[Array, "batch length heads value_dim"]:
    """Returns sum_j a_ij v_j in the weights' dtype; the product rounds weights to the values'.

    Gradients of weights are not rounded: where values have a large mean, what counts is a
    small difference of theirs.
    """
    return _sum(weights.astype(value.dtype), value, weights.dtype)


@weighted_sum.defjvp
def _weighted_sum_jvp(primals, tangents):
    weights, value = primals
    d_weights, d_value = tangents
    tangent = _sum(d_weights, value.astype(weights.dtype), weights.dtype)
    tangent += _sum(weights.astype(value.dtype), d_value, weights.dtype)
    return weighted_sum(weights, value), tangent


def _sum(weights: Array, value: Array, dtype: Any) -> Array:
    return jnp.einsum(
        "bhqk,bkhd->bqhd",
        weights,
        value,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )


def bias_of(
    distance_bias: Float[Array, "heads width"],
    distance_slope: Float[Array, " heads"] | None,
    distance: Int[Array, "batch length key_length"],
) -> Float[Array, "batch heads length key_length"]:
    """Returns b(x) for each distance x; anything where x is negative."""
    width = distance_bias.shape[1]
    near = distance_bias[:, jnp.clip(distance, 0, width - 1)]
    if distance_slope is None:
        far = jnp.zeros_like(near)
    else:
        far = near - distance_slope[:, None, None, None] * (distance - (width - 1))
    return jnp.where(distance < width, near, far).swapaxes(0, 1)
