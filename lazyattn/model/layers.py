"""RMSNorm, SwiGLU, and the initialisers of weight matrices."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from lazyattn import sharding
from lazyattn.model import fp8, lora
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


def product(
    x: Float[Array, "..."], matrix: Float[Array, "..."], quantization: str, inputs: int = 1
) -> Float[Array, "..."]:
    """Returns the product of activations and a matrix, in `x`'s dtype.

    Args:
      x: activations; their last `inputs` axes are summed over.
      matrix: float32; its first `inputs` axes are those.
      quantization: "none": in `x`'s dtype; "fp8": `lazyattn.model.fp8`.
      inputs: how many axes.
    """
    if quantization == "fp8":
        return fp8.product(x, matrix, inputs)
    return jnp.tensordot(x, matrix.astype(x.dtype), inputs)


def low_rank_change(
    module: nn.Module,
    config: ModelConfig,
    name: str,
    x: Float[Array, "..."],
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    inputs: int = 1,
) -> Float[Array, "..."]:
    """Returns what LoRA adds to the product of `x` and the module's matrix `name`.

    Args:
      module: that has the matrix, and gets its A and B.
      config: the model, with `lora_rank` above 0.
      name: of the matrix.
      x: what it is multiplied with; its last `inputs` axes are the matrix's first.
      shape: of the matrix.
      axes: their logical names.
      inputs: how many of its axes are summed over.
    """
    rank = config.lora_rank
    a_init = matrix_init(range(inputs), inputs)
    a = parameter(module, name + lora.A, a_init, (*shape[:inputs], rank), (*axes[:inputs], "rank"))
    b_init, b_shape = nn.initializers.zeros_init(), (rank, *shape[inputs:])
    b = parameter(module, name + lora.B, b_init, b_shape, ("rank", *axes[inputs:]))
    hidden = jnp.tensordot(x, a.astype(x.dtype), inputs)
    return jnp.tensordot(hidden, lora.scaled(b, config).astype(x.dtype), 1)


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

    Attributes:
      config: the model.
      quantization: of its products, as `product` takes it.
    """

    config: ModelConfig
    quantization: str = "none"

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
        both = product(x, stacked, self.quantization)
        if cfg.lora_rank:
            changes = [low_rank_change(self, cfg, name, x, *into) for name in ("gate", "up")]
            both += jnp.stack(changes, axis=-2)
        hidden = jax.nn.silu(both[..., 0, :]) * both[..., 1, :]
        hidden = sharding.constrain(hidden, "batch", "length", "mlp")
        out = product(hidden, down, self.quantization)
        if cfg.lora_rank:
            out += low_rank_change(self, cfg, "down", hidden, *back)
        return out
