"""The decoder: token ids to hidden states, and hidden states to logits."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lazyattn import sharding
from lazyattn.call import document_positions
from lazyattn.errors import InputError, require
from lazyattn.model import attention_layer
from lazyattn.model.config import ModelConfig
from lazyattn.model.embedding import look_up
from lazyattn.model.layers import RMSNorm, SwiGLU, matrix_init, parameter
from pallas_kernels.attention import KEPT

# An `attention_layer.Attend` of all layers, whose first argument is the layer's number.
Attend = Callable[[int, Array, Array, Array, dict[str, Array]], Array]

# What the forward pass keeps for the backward pass, by ModelConfig.remat. "dots" keeps
# products with weights, too; those inside attention are quadratic in length.
_ATTENTION = jax.checkpoint_policies.save_only_these_names(KEPT)
_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _ATTENTION
    ),
    "attention": _ATTENTION,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)); fields as in `Attention`."""

    config: ModelConfig
    sequence_shards: int = 1
    quantization: str = "none"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        positions: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None,
        attend: attention_layer.Attend | None = None,
    ) -> tuple[Float[Array, "batch length width"], None]:
        """Returns the residual stream after the layer, and nothing besides, as a scan wants."""
        cfg = self.config
        update = attention_layer.Attention(
            cfg, self.sequence_shards, self.quantization, name="attention"
        )(RMSNorm(cfg.norm_eps, name="attention_norm")(x), positions, segment_ids, attend)
        x = sharding.constrain(x + update, "batch", "length", None)
        update = SwiGLU(cfg, self.quantization, name="mlp")(
            RMSNorm(cfg.norm_eps, name="mlp_norm")(x)
        )
        return sharding.constrain(x + update, "batch", "length", None), None


class Transformer(nn.Module):
    """A decoder-only transformer with pre-normalised blocks.

    Parameters, float32: embedding [vocab, width], blocks (one tree with a leading
    axis of layers, or blocks_0 ... when `scan_layers` is off), final_norm, and
    unembedding [vocab, width] unless tied. Embedding rows start with standard
    deviation width^-1/2 and are multiplied by width^1/2 on the way in (Vaswani et
    al. 2017, section 3.4), so that the residual stream starts at scale 1 and tied
    logits do too; `scale_embedding` can turn that off.

    Attributes:
      config: the model.
      quantization: of the blocks' products with matrices, as `layers.product` takes it.
    """

    config: ModelConfig
    quantization: str = "none"

    @nn.compact
    def __call__(
        self,
        inputs: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None = None,
        positions: Int[Array, "batch length"] | None = None,
        attend: Attend | None = None,
    ) -> Float[Array, "batch length width"]:
        """Returns the final hidden states.

        Args:
          inputs: int32 token ids below `vocab_size`; an id out of range gives NaN.
          segment_ids: int32; documents are runs of equal ids, and no document sees
            another. None: one document a row.
          positions: int32 place of each token in its document, for RoPE. None:
            counted from `segment_ids`.
          attend: what attends in place of the op, as where keys are cached. Only
            without `scan_layers`.

        Returns:
          Normed hidden states [batch, length, width] in the compute dtype.

        Raises:
          InputError: for shapes or arguments that do not go together.
        """
        cfg = self.config
        _check_inputs(inputs, segment_ids, positions)
        if positions is None:
            positions = _default_positions(inputs, segment_ids)

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
        if attend is None and not self.is_mutable_collection(attention_layer.WEIGHTS):
            shards = sharding.sequence_shards(inputs.shape[1])
        if shards > 1:
            inputs, positions = map(sharding.deal_sequence, (inputs, positions))
            if segment_ids is not None:
                segment_ids = sharding.deal_sequence(segment_ids)

        x = look_up(embedding, inputs) * cfg.embedding_factor
        x = sharding.constrain(x.astype(cfg.compute_dtype), "batch", "length", None)
        x = self._blocks(x, positions, segment_ids, shards, attend)
        if shards > 1:
            x = sharding.collect_sequence(x)
        return RMSNorm(cfg.norm_eps, name="final_norm")(x)

    def _blocks(
        self,
        x: Float[Array, "batch length width"],
        positions: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None,
        shards: int,
        attend: Attend | None,
    ) -> Float[Array, "batch length width"]:
        """Applies all layers, scanned or unrolled."""
        cfg = self.config
        block: Any = Block
        if cfg.remat in _REMAT_POLICIES:
            # Inside a scan XLA cannot merge the recomputation with the original.
            block = nn.remat(
                Block, policy=_REMAT_POLICIES[cfg.remat], prevent_cse=not cfg.scan_layers
            )
        if cfg.scan_layers:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0, attention_layer.WEIGHTS: 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast),
                length=cfg.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
                # Nothing comes out but the carry, so a trace that looks for it would be in vain.
                check_constancy_invariants=False,
            )
            if attend is not None:
                raise InputError("attend is given, but scan_layers must be False then.")
            x, _ = scanned(cfg, shards, self.quantization, name="blocks")(x, positions, segment_ids)
            return x
        for i in range(cfg.num_layers):
            own = None if attend is None else functools.partial(attend, i)
            x, _ = block(cfg, shards, self.quantization, name=f"blocks_{i}")(
                x, positions, segment_ids, own
            )
        return x


def _check_inputs(inputs: Array, segment_ids: Array | None, positions: Array | None) -> None:
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


def _default_positions(
    inputs: Int[Array, "batch length"], segment_ids: Int[Array, "batch length"] | None
) -> Int[Array, "batch length"]:
    if segment_ids is not None:
        return document_positions(segment_ids)
    index = jnp.arange(inputs.shape[1], dtype=jnp.int32)
    return jnp.broadcast_to(index, inputs.shape)


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
