"""RMS norm of each head of queries and keys, with RoPE, as one operation on a mesh."""

import functools
import math
from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lazyattn import sharding
from lazyattn.model.config import ModelConfig
from lazyattn.model.layers import parameter
from lazyattn.rotary import RopeScaling, norm_rotate

# 1 + the relative error of a number after it was normalized, rotated and rounded each time.
_ROUNDED = {"float32": (1 + 2.0**-23) ** 4, "bfloat16": (1 + 2.0**-8) ** 4}


def score_bound(config: ModelConfig, query_scale: Any, key_scale: Any) -> Any:
    """Returns U: no score of normalized queries and keys exceeds it before the bias, in nats.

    Args:
      config: a model with `qk_norm`.
      query_scale, key_scale: [head_dim], those of the norms; of numpy or JAX, as what comes back.
    """
    largest = abs(query_scale).max() * abs(key_scale).max()
    return math.sqrt(config.head_dim) * _ROUNDED[config.compute_dtype] * largest


class RotatedNorm(nn.Module):
    """RoPE after an RMS norm over each head; parameter: scale [head_dim], float32.

    Attributes:
      epsilon: of the norm.
      base: of the rotation.
      axis: logical axis of the heads: "heads" or "kv_heads".
      scaling: of the rotation; None: there is none.
    """

    epsilon: float
    base: float
    axis: str
    scaling: RopeScaling | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length some_heads d"], positions: Int[Array, "batch length"]
    ) -> Float[Array, "batch length some_heads d"]:
        """Returns the heads of `x` normalized and rotated, same shape and dtype."""
        scale = parameter(self, "scale", nn.initializers.ones_init(), x.shape[-1:], ("norm",))
        if self.is_initializing():
            return x
        run: Any = functools.partial(
            norm_rotate, base=self.base, epsilon=self.epsilon, scaling=self.scaling
        )
        mesh = sharding.active_mesh()
        if mesh is not None:
            # A kernel works on what a device has.
            heads = sharding.fitting_spec(mesh, x.shape, "batch", "length", self.axis, None)
            tokens = jax.sharding.PartitionSpec(*heads[:2])
            whole = jax.sharding.PartitionSpec()
            run = jax.shard_map(run, in_specs=(heads, whole, tokens), out_specs=heads)
        return run(x, scale, positions)
