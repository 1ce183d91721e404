"""Lazy Attention as a Flax Linen module."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lazyattn.layer import AttentionLayer


class LazyAttention(nn.Module):
    """`lazyattn.layer.AttentionLayer` as a module: its attributes, parameters and errors.

    Parameters are float32, without biases of projections: query, key, value, output,
    distance_delta, distance_log_slope, offset.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    bias_width: int = 1024
    offset_init: float | None = -0.5
    rope_base: float | None = 10_000.0
    window: int | None = None
    skip_mass: float = 1e-6
    implementation: str | None = None

    @nn.compact
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
          InputError: as `AttentionLayer`, its `parameters` and its `apply`.
        """
        fields = dataclasses.fields(AttentionLayer)
        layer = AttentionLayer(**{field.name: getattr(self, field.name) for field in fields})
        parameters: dict[str, Any] = {
            name: self.param(name, init, shape, jnp.float32)
            for name, (init, shape) in layer.parameters(x.shape[-1]).items()
        }
        return layer.apply(parameters, x, segment_ids)
