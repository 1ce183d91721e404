"""What backends that have an op of their own share; see `problem.py` for the others."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int


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
    """

    scale: float
    skip_mass: float
