"""RMSNorm, SwiGLU, and the initialisers of weight matrices."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from lazyattn import sharding
from lazyattn.model.config import ModelConfig


def matrix_init(
    in_axis: int | Sequence[int], out_axis: int | Sequence[int], variance: float = 1.0
) -> nn.initializers.Initializer:
    """Returns a truncated normal of variance `variance` / fan_in.

    Keeps the scale of activations whatever the width (LeCun initialisation).
    """
    return nn.initializers.variance_scaling(
        variance, "fan_in", "truncated_normal", in_axis=in_axis, out_axis=out_axis
    )


def residual_variance(config: ModelConfig) -> float:
    """Returns the variance factor of matrices that write into the residual stream.

    1 / (2 layers), two of them a block, so that the stream's variance does not grow
    with depth (Radford et al. 2019, section 2.3).
    """
    return 1.0 / (2 * config.num_layers)


def parameter(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
) -> Float[Array, "..."]:
    """Returns the module's float32 parameter, declared with its logical axes."""
    boxed = nn.with_logical_partitioning(init, axes)
    value: Any = module.param(name, boxed, shape, jnp.float32)
    return value


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis.

    Float32 inside; the result has the input's dtype. Source: Zhang and Sennrich,
    arXiv 1910.07467, eq. 4, with epsilon.
    """

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """Returns `x` normalised, same shape and dtype."""
        scale = parameter(self, "scale", nn.initializers.ones_init(), x.shape[-1:], ("norm",))
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        return (x32 * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases.

    Source: Shazeer, arXiv 2002.05202, eq. 6.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        """Returns the block's update to the residual stream, in `x`'s dtype."""
        cfg = self.config
        into = (cfg.width, cfg.hidden_width), ("embed", "mlp")
        back = (cfg.hidden_width, cfg.width), ("mlp", "embed")
        if self.has_variable("params", "gate_up"):  # `lazyattn.generation` has stacked them.
            stacked: Array = self.get_variable("params", "gate_up")
        else:
            gate = parameter(self, "gate", matrix_init(0, 1), *into)
            up = parameter(self, "up", matrix_init(0, 1), *into)
            stacked = jnp.stack([gate, up], axis=1)
        down = parameter(self, "down", matrix_init(0, 1, residual_variance(cfg)), *back)

        # One product, so that the backward pass goes over all that is as wide as `hidden` once.
        both = jnp.einsum("...w,wch->...ch", x, stacked.astype(x.dtype))
        hidden = jax.nn.silu(both[..., 0, :]) * both[..., 1, :]
        hidden = sharding.constrain(hidden, "batch", "length", "mlp")
        return hidden @ down.astype(x.dtype)
