"""The decoder: token ids to hidden states, and hidden states to logits."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lazyattn import sharding
from lazyattn.errors import InputError, require
from lazyattn.model import attention_layer
from lazyattn.model.config import ModelConfig
from lazyattn.model.embedding import look_up
from lazyattn.model.layers import RMSNorm, SwiGLU, matrix_init, parameter
from lazyattn.model.rope import document_positions

if TYPE_CHECKING:
    from lazyattn.generation.cache import KVCache

# What the forward pass keeps for the backward pass, by ModelConfig.remat. "dots"
# keeps products with weights; those of attention, quadratic in length, are redone.
_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)); fields as in `Attention`."""

    config: ModelConfig
    sequence_shards: int = 1

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        cache: attention_layer.LayerCache | None,
        positions: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None,
        query_start: Int[Array, " batch"] | None,
    ) -> tuple[Float[Array, "batch length width"], attention_layer.LayerCache | None]:
        """Returns the residual stream after the layer, and the layer's cache."""
        cfg = self.config
        update, cache = attention_layer.Attention(cfg, self.sequence_shards, name="attention")(
            RMSNorm(cfg.norm_eps, name="attention_norm")(x),
            positions,
            segment_ids,
            cache,
            query_start,
        )
        x = sharding.constrain(x + update, "batch", "length", None)
        update = SwiGLU(cfg, name="mlp")(RMSNorm(cfg.norm_eps, name="mlp_norm")(x))
        return sharding.constrain(x + update, "batch", "length", None), cache


class Transformer(nn.Module):
    """A decoder-only transformer with pre-normalised blocks.

    Parameters, float32: embedding [vocab, width], blocks (one tree with a leading
    axis of layers, or blocks_0 ... when `scan_layers` is off), final_norm, and
    unembedding [vocab, width] unless tied. Embedding rows start with standard
    deviation width^-1/2 and are multiplied by width^1/2 on the way in (Vaswani et
    al. 2017, section 3.4), so that the residual stream starts at scale 1 and tied
    logits do too.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        inputs: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None = None,
        positions: Int[Array, "batch length"] | None = None,
        cache: "KVCache | None" = None,
    ) -> Any:
        """Returns the final hidden states.

        Args:
          inputs: int32 token ids below `vocab_size`; an id out of range gives NaN.
          segment_ids: int32; documents are runs of equal ids, and no document sees
            another. None: one document a row. Not with a cache.
          positions: int32 place of each token in its document, for RoPE. None:
            counted from `segment_ids`, or on from what the cache holds.
          cache: keys and values of the tokens before `inputs`, row by row.

        Returns:
          Normed hidden states [batch, length, width] in the compute dtype; with a
          cache, (hidden states, cache with `inputs` added).

        Raises:
          InputError: for shapes or arguments that do not go together.
        """
        cfg = self.config
        _check_inputs(inputs, segment_ids, positions, cache)
        if positions is None:
            positions = _default_positions(inputs, segment_ids, cache)

        table = (
            matrix_init(1, 0),
            (cfg.vocab_size, cfg.width),
            ("vocab", "embed"),
        )
        embedding = parameter(self, "embedding", *table)
        if not cfg.tie_embeddings:
            # Used by `logits` and the loss, which read it from the parameters.
            parameter(self, "unembedding", *table)

        # On a mesh that shares rows out, layers see them in another order. Weights, for
        # inspection, are of whole rows.
        shards = 1
        if cache is None and not self.is_mutable_collection(attention_layer.WEIGHTS):
            shards = sharding.sequence_shards(inputs.shape[1])
        if shards > 1:
            inputs, positions = map(sharding.deal_sequence, (inputs, positions))
            if segment_ids is not None:
                segment_ids = sharding.deal_sequence(segment_ids)

        x = look_up(embedding, inputs) * cfg.width**0.5
        x = sharding.constrain(x.astype(cfg.compute_dtype), "batch", "length", None)
        x, cache = self._blocks(x, cache, positions, segment_ids, shards)
        if shards > 1:
            x = sharding.collect_sequence(x)
        x = RMSNorm(cfg.norm_eps, name="final_norm")(x)
        return x if cache is None else (x, cache)

    def _blocks(
        self,
        x: Float[Array, "batch length width"],
        cache: "KVCache | None",
        positions: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None,
        shards: int,
    ) -> tuple[Float[Array, "batch length width"], "KVCache | None"]:
        """Applies all layers, scanned or unrolled."""
        cfg = self.config
        held = None if cache is None else (cache.keys, cache.values)
        start = None if cache is None else cache.lengths
        block: Any = Block
        if cfg.remat != "none":
            # Inside a scan XLA cannot merge the recomputation with the original.
            block = nn.remat(
                Block, policy=_REMAT_POLICIES[cfg.remat], prevent_cse=not cfg.scan_layers
            )
        if cfg.scan_layers:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0, attention_layer.WEIGHTS: 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
                length=cfg.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, held = scanned(cfg, shards, name="blocks")(x, held, positions, segment_ids, start)
        else:
            layers = []
            for i in range(cfg.num_layers):
                mine = jax.tree.map(lambda leaf, i=i: leaf[i], held)
                layer = block(cfg, shards, name=f"blocks_{i}")
                x, mine = layer(x, mine, positions, segment_ids, start)
                layers.append(mine)
            held = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        if cache is None:
            return x, None
        lengths = cache.lengths + x.shape[1]
        return x, dataclasses.replace(cache, keys=held[0], values=held[1], lengths=lengths)


def _check_inputs(
    inputs: Array, segment_ids: Array | None, positions: Array | None, cache: "KVCache | None"
) -> None:
    require(inputs.ndim == 2, "inputs' shape", inputs.shape, "[batch, length]")
    require(
        jnp.issubdtype(inputs.dtype, jnp.integer), "inputs' dtype", str(inputs.dtype), "an integer"
    )
    for name, array in (("segment_ids", segment_ids), ("positions", positions)):
        if array is not None:
            require(
                array.shape == inputs.shape,
                f"{name}' shape",
                array.shape,
                f"{inputs.shape}, the shape of inputs",
            )
    if cache is not None:
        if segment_ids is not None:
            raise InputError(
                "segment_ids cannot be given with a cache, which holds one document a row."
            )
        batch = cache.lengths.shape[0]
        require(
            inputs.shape[0] == batch, "inputs' batch", inputs.shape[0], f"{batch}, as in the cache"
        )
        room = cache.keys.shape[2]
        require(
            inputs.shape[1] <= room,
            "inputs' length",
            inputs.shape[1],
            f"at most {room}, the length of the cache",
        )


def _default_positions(
    inputs: Int[Array, "batch length"],
    segment_ids: Int[Array, "batch length"] | None,
    cache: "KVCache | None",
) -> Int[Array, "batch length"]:
    if segment_ids is not None:
        return document_positions(segment_ids)
    index = jnp.arange(inputs.shape[1], dtype=jnp.int32)[None]
    start = jnp.zeros((inputs.shape[0], 1), jnp.int32) if cache is None else cache.lengths[:, None]
    return start + index


def output_embedding(params: Mapping[str, Any], config: ModelConfig) -> Float[Array, "vocab width"]:
    """Returns the float32 matrix whose product with hidden states gives logits."""
    return params["embedding" if config.tie_embeddings else "unembedding"]


def logits(
    hidden: Float[Array, "... width"], embedding: Float[Array, "vocab width"]
) -> Float[Array, "... vocab"]:
    """Returns float32 logits; the product's inputs have `hidden`'s dtype.

    For a few positions at a time, as in sampling; the loss has its own way
    (`lazyattn.model.loss`), which never holds all of them.

    Args:
      hidden: final hidden states.
      embedding: `output_embedding(params, config)`.
    """
    return jnp.einsum(
        "...w,vw->...v", hidden, embedding.astype(hidden.dtype), preferred_element_type=jnp.float32
    )


def attention_weights(
    params: Mapping[str, Any],
    config: ModelConfig,
    inputs: Int[Array, "batch length"],
    segment_ids: Int[Array, "batch length"] | None = None,
) -> Float[Array, "layers batch heads length length"]:
    """Returns every layer's attention weights, by the reference implementation.

    Quadratic in length: for inspection of short rows.

    Args:
      params: the model's parameters.
      config: the model.
      inputs: int32 token ids.
      segment_ids: as in `Transformer.__call__`.

    Returns:
      float32; entry [..., i, j] is the weight of token i on token j, 0 where j is
      not visible. Rows need not sum to 1.
    """
    _, state = Transformer(config).apply(
        {"params": params}, inputs, segment_ids, mutable=[attention_layer.WEIGHTS]
    )
    found = state[attention_layer.WEIGHTS]
    if config.scan_layers:
        return found["blocks"]["attention"]["weights"]
    return jnp.stack(
        [found[f"blocks_{i}"]["attention"]["weights"] for i in range(config.num_layers)]
    )
