"""Lazy Attention as a Flax NNX module."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lazyattn.layer import AttentionLayer


class LazyAttention(nnx.Module):
    """`lazyattn.layer.AttentionLayer` as a module: its settings, parameters and errors.

    Parameters are float32, without biases of projections: query, key, value, output,
    distance_delta, distance_log_slope, offset.
    """

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs, **settings: Any):
        """Makes the parameters.

        Args:
          width: size of what goes in and comes out.
          num_heads: query heads.
          rngs: where random numbers come from; stream "params".
          **settings: the other attributes of `AttentionLayer`.

        Raises:
          InputError: as `AttentionLayer` and its `parameters`.
        """
        self.layer = AttentionLayer(num_heads, **settings)
        makers = self.layer.parameters(width)
        for name, (init, shape) in makers.items():
            setattr(self, name, nnx.Param(init(rngs.params(), shape, jnp.float32)))
        self.names = tuple(makers)

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length width"]:
        """Returns the attention of x to itself, in x's shape and dtype.

        Args:
          x: float32, bfloat16, float16 or float64.
          segment_ids: packed documents are runs of equal ids; None: one a row.

        Raises:
          InputError: as `AttentionLayer.apply`.
        """
        parameters = {name: getattr(self, name)[...] for name in self.names}
        return self.layer.apply(parameters, x, segment_ids)
