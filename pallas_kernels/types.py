"""The words every backend shares.

Queries and keys are cut into tiles. For one head, a tile of queries x keys is

- negligible: so little softmax mass that it is never visited (`visit.py`);
- dead: visited, but no entry survives Elastic-Softmax, so that only the
  log-sum-exp, dQ and dK need it;
- live: the rest.
"""

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visibility:
    """What each query may see, and the divisor of its threshold.

    Query i sees keys `first[i] <= j <= i`: causal, within its document and its window.

    Attributes:
      first: [batch, length], index of the first key each query sees.
      offset_scale: [batch, length], what tau is multiplied by: 1 / n_i, or the
        same constant everywhere.
    """

    first: Int[Array, "batch length"]
    offset_scale: Float[Array, "batch length"]


@dataclasses.dataclass(frozen=True)
class AttentionSettings:
    """What is known when a call is traced.

    Attributes:
      scale: factor of the scores, 1 / sqrt(head_dim) as a rule.
      skip_mass: softmax mass a row may lose to negligible tiles; 0 skips none.
      out_dtype: of the output; None: that of the queries. "xla_chunked" only.
    """

    scale: float
    skip_mass: float
    out_dtype: str | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the forward pass leaves for the backward pass, linear in length.

    All floats are float32 (float64 for float64 inputs): sums of half-precision values may
    overflow in their own dtype, and delta takes every rounding of them to all keys alike.

    Attributes:
      out: [batch, length, heads, value_dim].
      log_sum_exp: [heads, tiles, batch, size], of each row's scores.
      masked_value_sum: [batch, length, heads, value_dim], M_i = sum of v_j over live
        entries; None without an offset.
      span: [heads], the farthest diagonal of tiles that is visited.
      live: [heads, diagonals], whether a diagonal of tiles has a live entry.
    """

    out: Float[Array, "batch length heads value_dim"]
    log_sum_exp: Float[Array, "heads tiles batch size"]
    masked_value_sum: Float[Array, "batch length heads value_dim"] | None
    span: Int[Array, " heads"]
    live: Bool[Array, "heads diagonals"]
