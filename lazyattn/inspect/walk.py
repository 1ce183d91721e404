"""A forward pass that is looked at layer by layer: never two layers' attention at once."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lazyattn.call import document_starts
from lazyattn.model.attention_layer import OPERANDS, variant_arguments
from lazyattn.model.config import ModelConfig
from lazyattn.model.embedding import look_up
from lazyattn.model.heads import head_windows
from lazyattn.model.parameters import stack_blocks
from lazyattn.model.transformer import Block
from pallas_kernels import bias as bias_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerInput:
    """What a layer's attention weights follow from.

    Attributes:
      query: after RoPE, compute dtype.
      key: likewise.
      bias: b(x) of the distances 0 <= x < length, float32; None: none.
      offset: tau of each head, float32; None: none.
      first: first key of each query's document.
      offset_scale: what tau is multiplied by, 1 / n_i or a constant.
      windows: how many keys each head sees at most, None where all of a document.
      real: False for padding.
    """

    query: Float[Array, "rows length heads head_dim"]
    key: Float[Array, "rows length kv_heads head_dim"]
    bias: Float[Array, "heads length"] | None
    offset: Float[Array, " heads"] | None
    first: Int[Array, "rows length"]
    offset_scale: Float[Array, "rows length heads"]
    real: Bool[Array, "rows length"]
    windows: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})


# Layer's attention, residual stream after the layer, carry -> carry, what to keep.
Observer = Callable[[LayerInput, Float[Array, "rows length width"], Any], tuple[Any, Any]]


def walk(
    params: Mapping[str, Any],
    config: ModelConfig,
    inputs: Int[Array, "rows length"],
    segment_ids: Int[Array, "rows length"],
    observe: Observer,
    carry: Any = None,
) -> tuple[Any, Any]:
    """Runs the blocks one after the other and shows each to `observe`.

    Args:
      params: the model's parameters.
      config: the model.
      inputs: int32 token ids.
      segment_ids: documents are runs of equal ids; 0 marks padding.
      observe: called once a layer, while tracing.
      carry: what `observe` is given at the first layer.

    Returns:
      The carry after the last layer, and what was kept, with a leading axis of layers.
    """
    config = dataclasses.replace(config, remat="none")
    if not config.scan_layers:
        params = stack_blocks(params)
    first = document_starts(segment_ids)
    positions = jnp.arange(inputs.shape[1], dtype=jnp.int32) - first
    real = segment_ids > 0

    def layer(state: tuple[Array, Any], block: Any) -> tuple[tuple[Array, Any], Any]:
        x, carry = state
        (x, _), found = Block(config).apply(
            {"params": block}, x, positions, segment_ids, mutable=[OPERANDS]
        )
        operands = found[OPERANDS]["attention"]["operands"]
        seen = _layer_input(operands, config, first, positions, real)
        carry, kept = observe(seen, x, carry)
        return (x, carry), kept

    (_, carry), kept = jax.lax.scan(layer, (embed(params, config, inputs), carry), params["blocks"])
    return carry, kept


def embed(
    params: Mapping[str, Any], config: ModelConfig, inputs: Int[Array, "rows length"]
) -> Float[Array, "rows length width"]:
    """Returns the residual stream before the first block, as `Transformer` starts it."""
    embedded = look_up(params["embedding"], inputs) * config.embedding_factor
    return embedded.astype(config.compute_dtype)


def _layer_input(
    operands: Mapping[str, Array],
    config: ModelConfig,
    first: Int[Array, "rows length"],
    positions: Int[Array, "rows length"],
    real: Bool[Array, "rows length"],
) -> LayerInput:
    length = first.shape[1]
    table = operands.get("distance_bias")
    bias = None
    if table is not None:
        bias = bias_lib.expand(table, operands.get("distance_slope"), length)
    windows = head_windows(config.attention)
    divisor = variant_arguments(config.attention, length)["offset_divisor"]
    if divisor == "visible":
        seen = jnp.asarray([length if window is None else window for window in windows])
        scale = 1 / jnp.minimum(positions[..., None] + 1, seen)
    else:
        scale = jnp.full((*first.shape, len(windows)), 1 / divisor)
    return LayerInput(
        operands["query"],
        operands["key"],
        bias,
        operands.get("offset"),
        first,
        scale.astype(jnp.float32),
        real,
        windows,
    )
