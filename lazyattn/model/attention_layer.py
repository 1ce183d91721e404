"""The attention layer: projections, RoPE, a head's bias and offset, one call of the op."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lazyattn import sharding
from lazyattn.model.config import AttentionConfig, ModelConfig
from lazyattn.model.distance_bias import bias_arguments, bias_parameters
from lazyattn.model.fetch import Bound
from lazyattn.model.heads import global_heads, head_blocks, initial_slopes
from lazyattn.model.layers import (
    RMSNorm,
    low_rank_change,
    matrix_init,
    parameter,
    product,
    residual_variance,
)
from lazyattn.model.query_key_norm import RotatedNorm, score_bound
from lazyattn.model.sharded_attention import sharded_attention
from lazyattn.rotary import RopeScaling, rotate

# Collection that receives every layer's attention weights when it is mutable.
WEIGHTS = "attention_weights"
# Another, that receives what a layer gives to the op besides its values.
OPERANDS = "attention_operands"

# What takes the op's place when keys are cached: from rotated queries and keys, values, and the
# op's learned arguments to its output. The query's and output's heads are the model's.
Attend = Callable[[Array, Array, Array, dict[str, Array]], Array]


def variant_arguments(config: AttentionConfig, key_length: int) -> dict[str, Any]:
    """Returns how `lazy_attention` divides the offset and whether it renormalises.

    Args:
      config: the attention layer.
      key_length: keys a row has room for: the training sequence's length, or the cache's
        when decoding. `lazy_length_offset` divides tau by it, so that variant
        decodes as it was trained only with a cache as long as its sequences were.
    """
    divisors = {"lazy_constant_offset": 1.0, "lazy_length_offset": float(key_length)}
    return {
        "offset_divisor": divisors.get(config.variant, "visible"),
        "renormalize": config.variant == "lazy_renormalized",
    }


def rope_scaling(config: AttentionConfig) -> RopeScaling | None:
    """Returns how a layer's angles are scaled; None: not at all."""
    if config.rope_scaling == "none":
        return None
    if config.rope_scaling == "linear":
        return RopeScaling(config.rope_factor)
    return RopeScaling(
        config.rope_factor, config.rope_length, low=config.rope_low, high=config.rope_high
    )


class Attention(nn.Module):
    """Multi-head (or grouped-query) causal attention of the configured variant.

    Parameters, all float32: query [width, heads, head_dim], key and value
    [width, kv_heads, head_dim], output [heads, head_dim, width], and where the layer has
    them output_gate [width, heads, head_dim], query_bias [heads, head_dim], key_bias and
    value_bias [kv_heads, head_dim], offset [heads] and the distance bias's, which
    `lazyattn.model.distance_bias` lists, and two for each matrix of `lazyattn.model.lora`.

    Attributes:
      config: the model.
      sequence_shards: devices that share every row, whose tokens are then in the order
        of `sharding.deal_sequence`.
      quantization: of products with matrices, as `layers.product` takes it.
    """

    config: ModelConfig
    sequence_shards: int = 1
    quantization: str = "none"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        positions: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None = None,
        attend: Attend | None = None,
    ) -> Float[Array, "batch length width"]:
        """Returns the update to the residual stream.

        Args:
          x: normalised residual stream, compute dtype.
          positions: place of each token in its document, for RoPE.
          segment_ids: documents are runs of equal ids; None: one a row.
          attend: what attends in place of the op.
        """
        cfg, att = self.config, self.config.attention

        def projection(name: str, heads: int, axis: str) -> Float[Array, "batch length heads d"]:
            shape = (cfg.width, heads, cfg.head_dim)
            axes = ("embed", axis, "head_dim")
            kernel = parameter(self, name, matrix_init(0, (1, 2)), shape, axes)
            heads_out = product(x, kernel, self.quantization)
            if cfg.lora_rank:
                heads_out += low_rank_change(self, cfg, name, x, shape, axes)
            if att.qkv_bias and name in ("query", "key", "value"):
                zeros, bias_name = nn.initializers.zeros_init(), f"{name}_bias"
                bias = parameter(self, bias_name, zeros, shape[1:], axes[1:])
                heads_out += bias.astype(x.dtype)
            return sharding.constrain(heads_out, "batch", "length", axis, "head_dim")

        query = projection("query", att.num_heads, "heads")
        key = projection("key", att.kv_heads, "kv_heads")
        value = projection("value", att.kv_heads, "kv_heads")
        everywhere = att.rope and (att.global_rope or not att.num_global_heads)
        if att.qk_norm and everywhere:
            norm = functools.partial(
                RotatedNorm, cfg.norm_eps, att.rope_base, scaling=rope_scaling(att)
            )
            query = norm("heads", name="query_norm")(query, positions)
            key = norm("kv_heads", name="key_norm")(key, positions)
        elif att.qk_norm:
            query = RMSNorm(cfg.norm_eps, name="query_norm")(query)
            key = RMSNorm(cfg.norm_eps, name="key_norm")(key)
        if att.rope and not (att.qk_norm and everywhere):
            query = self._rotated(query, positions)
            key = self._rotated(key, positions)
        head_parameters = self._head_parameters()
        if self.is_mutable_collection(OPERANDS) and not self.is_initializing():
            self._keep(OPERANDS, "operands", {"query": query, "key": key, **head_parameters})
        if self.is_initializing():
            out = query  # Parameters need no kernel.
        elif attend is not None:
            out = attend(query, key, value, head_parameters)
        else:
            out = self._attend(query, key, value, segment_ids, head_parameters)

        if att.output_gate:
            gate = jax.nn.sigmoid(projection("output_gate", att.num_heads, "heads"))
            out = out * gate
        back = (att.num_heads, cfg.head_dim, cfg.width), ("heads", "head_dim", "embed")
        init = matrix_init((0, 1), 2, residual_variance(cfg))
        kernel = parameter(self, "output", init, *back)
        update = product(out, kernel, self.quantization, inputs=2)
        if cfg.lora_rank:
            update += low_rank_change(self, cfg, "output", out, *back, inputs=2)
        return update

    def _attend(
        self,
        query: Float[Array, "batch length heads d"],
        key: Float[Array, "batch length kv_heads d"],
        value: Float[Array, "batch length kv_heads d"],
        segment_ids: Int[Array, "batch length"] | None,
        head_parameters: dict[str, Array],
    ) -> Float[Array, "batch length heads d"]:
        att = self.config.attention
        observed = self.is_mutable_collection(WEIGHTS)
        out = sharded_attention(
            query,
            key,
            value,
            {"segment_ids": segment_ids, **head_parameters},
            sequence_shards=self.sequence_shards,
            window=None if att.num_global_heads == att.num_heads else att.window,
            blocks=head_blocks(att) if att.by_group else None,
            bound=self._bound(),
            skip_mass=att.skip_mass,
            # Only the definition returns weights.
            implementation="xla" if observed else att.implementation,
            return_weights=observed,
            **variant_arguments(att, key.shape[1]),
        )
        if observed:
            out, weights = out
            self._keep(WEIGHTS, "weights", weights)
        return out

    def _bound(self) -> Bound | None:
        """Returns what bounds the layer's scores, where devices may then fetch fewer keys."""
        att = self.config.attention
        if self.sequence_shards == 1 or not (att.qk_norm and att.has_tail and att.skip_mass > 0):
            return None
        parameters: Any = nn.meta.unbox(self.variables["params"])
        scales = (parameters[name]["scale"] for name in ("query_norm", "key_norm"))
        return Bound(score_bound(self.config, *scales), initial_slopes(att))

    def _rotated(
        self, x: Float[Array, "batch length some_heads d"], positions: Int[Array, "batch length"]
    ) -> Float[Array, "batch length some_heads d"]:
        """Returns queries or keys with RoPE, in the heads that have it."""
        att = self.config.attention
        rotated = rotate(x, positions, att.rope_base, rope_scaling(att))
        if att.global_rope or not att.num_global_heads:
            return rotated
        without = global_heads(att).reshape(x.shape[2], -1)[:, :1]
        return jnp.where(without, x, rotated)

    def _keep(self, collection: str, name: str, value: Any) -> None:
        self.sow(collection, name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)

    def _head_parameters(self) -> dict[str, Array]:
        """Returns the op's learned arguments, those the variant has."""
        att = self.config.attention
        heads = (att.num_heads,)
        learned = {
            name: parameter(self, name, bias.init, bias.shape, bias.axes)
            for name, bias in bias_parameters(att).items()
        }
        found = bias_arguments(learned, att)
        if att.has_offset:
            init = nn.initializers.constant(att.offset_init)
            found["offset"] = parameter(self, "offset", init, heads, ("heads",))
        return found
