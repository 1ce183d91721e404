"""The backward pass of one head, one sweep over the visited diagonals.

With m the live entries, dP = dO V^T and delta_i = dO_i . (O_i - tau/n_i M_i):

    dS = P (m dP - delta)     dV += A^T dO     dQ += dS K     dK += dS^T Q

A dead diagonal still has dS = -P delta, but needs neither dP nor dV.
Source: docs/lazy_attention.md, "Gradients".
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from pallas_kernels.chunked.forward import HeadInputs, elastic_softmax, masked_scores, matmul
from pallas_kernels.chunked.tiling import Diagonal, drop_lead, over_diagonals, pad_lead
from pallas_kernels.varying import vary_alike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadGradients:
    """Gradients of one query head; key and value still to be summed over its group.

    Attributes:
      query, key, value: as in `HeadInputs`.
      bias: [key_length], of b(x) at every distance; None as the input.
      offset: [], of tau; None as the input.
    """

    query: Float[Array, "tiles batch size head_dim"]
    key: Float[Array, "key_tiles batch size head_dim"]
    value: Float[Array, "key_tiles batch size value_dim"]
    bias: Float[Array, " key_length"] | None
    offset: Float[Array, ""] | None


def backward(
    head: HeadInputs,
    out: Float[Array, "tiles batch size value_dim"],
    lse: Float[Array, "tiles batch size"],
    live_v: Float[Array, "tiles batch size value_dim"] | None,
    live: Bool[Array, " key_tiles"],
    d_out: Float[Array, "tiles batch size value_dim"],
    scale: float,
) -> HeadGradients:
    """Returns the gradients of one head from what `forward` returned."""
    key, value = pad_lead(head.key), pad_lead(head.value)
    tiles, batch, size, head_dim = head.query.shape
    key_tiles = tiles + head.ahead
    dtype = lse.dtype

    def row_dot(a: Array, b: Array) -> Float[Array, "tiles batch size"]:
        return jnp.sum(a.astype(dtype) * b.astype(dtype), axis=-1)

    delta = row_dot(d_out, out)
    d_offset = None
    if head.offset is not None:
        assert live_v is not None
        pull = row_dot(d_out, live_v)
        delta = delta + head.threshold * pull
        d_offset = jnp.sum(head.offset_scale * pull)

    def step(diagonal: Diagonal, state: PyTree) -> PyTree:
        d_query, d_key, d_value, d_bias = state
        scores, visible = masked_scores(head, key, diagonal, scale)
        # A row that sees no mass is no number: that must not reach keys that it does not see.
        softmax = jnp.where(visible, jnp.exp(scores - diagonal.queries(lse)[..., None]), 0)
        rows_delta = diagonal.queries(delta)[..., None]

        def live_part(d_value: Array) -> tuple[Array, Array]:
            rows_d_out, values = diagonal.queries(d_out), diagonal.keys(value)
            d_weights = matmul("tbqd,tbkd->tbqk", rows_d_out, values)
            weights = softmax
            if head.offset is not None:
                weights, alive = elastic_softmax(softmax, diagonal.queries(head.threshold), visible)
                d_weights = jnp.where(alive, d_weights, 0)
            d_value = diagonal.add_to_keys(
                d_value, matmul("tbqk,tbqd->tbkd", weights.astype(values.dtype), rows_d_out)
            )
            return softmax * (d_weights - rows_delta), d_value

        def dead_part(d_value: Array) -> tuple[Array, Array]:
            return -softmax * rows_delta, d_value

        d_scores, d_value = jax.lax.cond(
            live[diagonal.tile_distance], live_part, dead_part, d_value
        )
        d_scores = jnp.where(visible, d_scores, 0)
        if d_bias is not None:
            d_bias = diagonal.add_to_bias(d_bias, d_scores.sum(axis=(0, 1)))
        d_scores = (d_scores * scale).astype(head.query.dtype)
        d_query = diagonal.add_to_queries(
            d_query, matmul("tbqk,tbkd->tbqd", d_scores, diagonal.keys(key))
        )
        d_key = diagonal.add_to_keys(
            d_key, matmul("tbqk,tbqd->tbkd", d_scores, diagonal.queries(head.query))
        )
        return d_query, d_key, d_value, d_bias

    d_bias = None if head.bias is None else jnp.zeros(size - 1 + key_tiles * size, dtype)
    zeros = (
        jnp.zeros((tiles, batch, size, head_dim), dtype),
        jnp.zeros(key.shape, dtype),
        jnp.zeros(value.shape, dtype),
        d_bias,
    )
    leaves, tree = jax.tree.flatten(zeros)
    state = jax.tree.unflatten(tree, vary_alike(*leaves, like=(head.query,)))
    d_query, d_key, d_value, d_bias = over_diagonals(
        head.span, tiles, head.ahead, size, step, state
    )
    if head.bias is not None:
        d_bias = d_bias[size - 1 :][: head.bias.shape[0]].astype(head.bias.dtype)
    return HeadGradients(
        query=d_query,
        key=drop_lead(d_key, key_tiles),
        value=drop_lead(d_value, key_tiles),
        bias=d_bias,
        offset=d_offset,
    )
