"""The forward pass of one head: log-sum-exp first, then what survives.

Arrays are cut into tiles along the length and keep the batch behind it:
[tiles, batch, size, ...]. The queries are the last ones where keys are more.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from pallas_kernels.chunked.tiling import Diagonal, over_diagonals, pad_lead
from pallas_kernels.varying import vary_alike

# A tile counts as dead only if it is so by this much, in nats: more than the
# rounding of its scores.
_DEAD_SLACK = 1e-4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadInputs:
    """What one query head reads.

    Attributes:
      query: [tiles, batch, size, head_dim].
      key: [key_tiles, batch, size, head_dim].
      value: [key_tiles, batch, size, value_dim].
      bias: [key_length], b(x) of every distance; None: 0.
      offset: [], tau; None: ordinary softmax.
      segment_start: [tiles, batch, size], first key each query sees.
      offset_scale: [tiles, batch, size], 1 / n_i or a constant.
      span: [], the farthest diagonal visited.
    """

    query: Float[Array, "tiles batch size head_dim"]
    key: Float[Array, "key_tiles batch size head_dim"]
    value: Float[Array, "key_tiles batch size value_dim"]
    bias: Float[Array, " key_length"] | None
    offset: Float[Array, ""] | None
    segment_start: Int[Array, "tiles batch size"]
    offset_scale: Float[Array, "tiles batch size"]
    span: Int[Array, ""]

    @property
    def ahead(self) -> int:
        """Returns how many key tiles come before the first query tile's own."""
        return self.key.shape[0] - self.query.shape[0]

    @property
    def threshold(self) -> Float[Array, "tiles batch size"]:
        """Returns -tau / n_i, what a softmax weight must exceed to live.

        No weight exceeds 1. Said outright, since the only weight of a document's first query
        is 1, and -tau / n_i is 1 where tau is -1: rounding must not leave anything of it, which
        renormalization would make 1 again.
        """
        assert self.offset is not None
        threshold = -self.offset * self.offset_scale
        return jnp.where(threshold >= 1, 2, threshold)


def matmul(subscripts: str, a: Array, b: Array) -> Array:
    """Contracts with at least float32 accumulation and no loss on float32 inputs."""
    return jnp.einsum(
        subscripts,
        a,
        b,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(a.dtype, jnp.float32),
    )


def masked_scores(
    head: HeadInputs, key: Array, diagonal: Diagonal, scale: float
) -> tuple[Float[Array, "rows batch size size"], Bool[Array, "rows batch size size"]]:
    """Returns the scores of a diagonal's tiles, -inf where unseen, and what is seen."""
    scores = matmul("tbqd,tbkd->tbqk", diagonal.queries(head.query), diagonal.keys(key)) * scale
    if head.bias is not None:
        scores = scores + diagonal.bias(head.bias).astype(scores.dtype)
    visible = diagonal.visible(head.segment_start)
    return jnp.where(visible, scores, -jnp.inf), visible


def elastic_softmax(
    softmax: Float[Array, "rows batch size size"],
    threshold: Float[Array, "rows batch size"],
    visible: Bool[Array, "rows batch size size"],
) -> tuple[Float[Array, "rows batch size size"], Bool[Array, "rows batch size size"]]:
    """Returns the weights max(0, p - threshold) and which of them are live."""
    shifted = softmax - threshold[..., None]
    live = visible & ~(shifted <= 0)  # so that NaN stays NaN
    return jnp.where(live, shifted, 0), live


def forward(
    head: HeadInputs, scale: float, *, want_live_v: bool
) -> tuple[
    Float[Array, "tiles batch size value_dim"],
    Float[Array, "tiles batch size"],
    Float[Array, "tiles batch size value_dim"] | None,
    Bool[Array, " key_tiles"],
]:
    """Returns out, the log-sum-exp, the sum of live values and the live diagonals.

    Without an offset one sweep does it all. With one, the threshold needs the whole
    row's log-sum-exp, so there are two; the first also marks the diagonals in which
    no weight can survive, and the second leaves them out.
    """
    key, value = pad_lead(head.key), pad_lead(head.value)
    tiles, batch, size, _ = head.query.shape
    dtype = jnp.promote_types(head.query.dtype, jnp.float32)
    maximum = jnp.full((tiles, batch, size), -jnp.inf, dtype)
    total = jnp.zeros((tiles, batch, size), dtype)
    out = jnp.zeros((tiles, batch, size, head.value.shape[-1]), dtype)
    live = jnp.zeros(tiles + head.ahead, bool)
    # Loops want what goes in to be as varied as what comes out.
    maximum, total, out, live = vary_alike(maximum, total, out, live, like=(head.query,))

    def accumulate(diagonal: Diagonal, state: PyTree, *, with_values: bool) -> PyTree:
        maximum, total, out, live = state
        scores, _ = masked_scores(head, key, diagonal, scale)
        row_maximum = scores.max(axis=-1)
        old_maximum, old_total = diagonal.queries(maximum), diagonal.queries(total)
        new_maximum = jnp.maximum(old_maximum, row_maximum)
        # Where the bias is -inf, a row may have seen nothing yet.
        base = jnp.where(new_maximum == -jnp.inf, 0, new_maximum)
        shrink = jnp.exp(old_maximum - base)
        weights = jnp.exp(scores - base[..., None])
        new_total = old_total * shrink + weights.sum(axis=-1)
        if with_values:
            old_out = diagonal.queries(out) * shrink[..., None]
            values = diagonal.keys(value)
            out = diagonal.set_queries(
                out, old_out + matmul("tbqk,tbkd->tbqd", weights.astype(values.dtype), values)
            )
        else:
            # The log-sum-exp only grows, so this never calls a live diagonal dead, nor
            # one with NaN in it.
            threshold = diagonal.queries(head.threshold)
            log_threshold = jnp.log(jnp.maximum(threshold, 0))
            bar = new_maximum + jnp.log(new_total) + log_threshold - _DEAD_SLACK
            # Below 0 every key counts, without mass too. And rows without any are NaN.
            alive = ~(row_maximum <= bar) | (threshold < 0) | (new_maximum == -jnp.inf)
            live = live.at[diagonal.tile_distance].set(jnp.any(alive))
        maximum = diagonal.set_queries(maximum, new_maximum)
        total = diagonal.set_queries(total, new_total)
        return maximum, total, out, live

    def sweep(body, state):
        return over_diagonals(head.span, tiles, head.ahead, size, body, state)

    if head.offset is None:
        maximum, total, out, _ = sweep(
            lambda diagonal, state: accumulate(diagonal, state, with_values=True),
            (maximum, total, out, live),
        )
        live = jnp.arange(tiles + head.ahead) <= head.span
        return out / total[..., None], maximum + jnp.log(total), None, live

    # `out` is not touched here, and not carried through the loop.
    def first_sweep(diagonal, state):
        maximum, total, live = state
        maximum, total, _, live = accumulate(
            diagonal, (maximum, total, out, live), with_values=False
        )
        return maximum, total, live

    maximum, total, live = sweep(first_sweep, (maximum, total, live))
    lse = maximum + jnp.log(total)
    live_v = jnp.zeros_like(out) if want_live_v else None

    def add_values(diagonal: Diagonal, state: PyTree) -> PyTree:
        out, live_v = state
        scores, visible = masked_scores(head, key, diagonal, scale)
        softmax = jnp.exp(scores - diagonal.queries(lse)[..., None])
        weights, alive = elastic_softmax(softmax, diagonal.queries(head.threshold), visible)
        values = diagonal.keys(value)
        out = diagonal.add_to_queries(
            out, matmul("tbqk,tbkd->tbqd", weights.astype(values.dtype), values)
        )
        if live_v is not None:
            live_v = diagonal.add_to_queries(
                live_v, matmul("tbqk,tbkd->tbqd", alive.astype(values.dtype), values)
            )
        return out, live_v

    out, live_v = sweep(
        lambda diagonal, state: jax.lax.cond(
            live[diagonal.tile_distance], lambda s: add_values(diagonal, s), lambda s: s, state
        ),
        (out, live_v),
    )
    return out, lse, live_v, live
