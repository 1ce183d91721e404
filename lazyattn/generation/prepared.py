"""The model as decoding reads it, and one pass of it over new tokens and a cache."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lazyattn.generation.attend import Step, cached_attention
from lazyattn.generation.cache import KVCache
from lazyattn.model.config import ModelConfig
from lazyattn.model.distance_bias import NAMES, bias_arguments
from lazyattn.model.lora import merged
from lazyattn.model.transformer import Transformer, logits, output_embedding

# Weights that a pass reads whole, and rounds to the compute dtype first.
_MATRICES = frozenset({"query", "key", "value", "output", "output_gate", "gate", "up", "down"})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreparedModel:
    """A model for decoding: each layer's weights apart, in the compute dtype.

    Attributes:
      params: as `Transformer` lists them without `scan_layers`, the bias as a table and slope;
        no unembedding.
      output: what hidden states are multiplied by for logits, compute dtype.
      config: of `params`.
    """

    params: Mapping[str, Any]
    output: Float[Array, "vocab width"]
    config: ModelConfig = dataclasses.field(metadata={"static": True})


def prepare(params: "Mapping[str, Any] | PreparedModel", config: ModelConfig) -> PreparedModel:
    """Returns the model for decoding; made once, it saves its work for every token.

    Args:
      params: the model's parameters, unboxed; a `PreparedModel` is returned as it is.
      config: the model.
    """
    if isinstance(params, PreparedModel):
        return params
    return _prepare(params, config)


@functools.partial(jax.jit, static_argnums=1)
def _prepare(params: Mapping[str, Any], config: ModelConfig) -> PreparedModel:
    if config.lora_rank:
        params, config = merged(params, config), dataclasses.replace(config, lora_rank=0)
    attention = config.attention
    if attention.has_bias:
        attention = dataclasses.replace(
            attention, bias_kind="table", bias_init="alibi", bias_tail=attention.has_tail
        )
    changed = dataclasses.replace(
        config, scan_layers=False, remat="none", tie_embeddings=True, attention=attention
    )

    def layer(index: int) -> Mapping[str, Any]:
        if not config.scan_layers:
            return params[f"blocks_{index}"]
        return jax.tree.map(lambda x: x[index], params["blocks"])

    prepared = {k: x for k, x in params.items() if not k.startswith(("blocks", "unembedding"))}
    for i in range(config.num_layers):
        prepared[f"blocks_{i}"] = _layer(layer(i), config)
    output = output_embedding(params, config).astype(config.compute_dtype)
    return PreparedModel(prepared, output, changed)


def _layer(block: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    def cast(path: Any, x: Array) -> Array:
        return x.astype(config.compute_dtype) if path[-1].key in _MATRICES else x

    whole = dict(jax.tree_util.tree_map_with_path(cast, dict(block)))
    attention = dict(whole["attention"])
    bias = bias_arguments(attention, config.attention)
    for names in NAMES.values():
        for name in names:
            attention.pop(name, None)
    # Stacked once: a step would write them anew.
    mlp = dict(whole["mlp"])
    mlp["gate_up"] = jnp.stack([mlp.pop("gate"), mlp.pop("up")], axis=1)
    return whole | {"attention": attention | bias, "mlp": mlp}


def forward(
    model: PreparedModel,
    tokens: Int[Array, "batch length"],
    cache: KVCache,
    count: Int[Array, " batch"],
    step: Step,
) -> tuple[Float[Array, "batch length width"], KVCache]:
    """Returns final hidden states of new tokens, and the cache with them.

    Args:
      model: the model.
      tokens: int32, the next tokens of each row, padding after them.
      cache: what the rows had before.
      count: how many of the tokens each row has.
      step: what is known of them.
    """
    config = model.config
    start = jnp.zeros_like(cache.lengths) if step is Step.START else cache.lengths
    positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    layers = list(cache.layers)

    def attend(index: int, query: Array, key: Array, value: Array, own: dict[str, Array]) -> Array:
        out, layers[index] = cached_attention(
            query,
            key,
            value,
            own,
            layers[index],
            start,
            count,
            config=config.attention,
            plan=cache.plan,
            groups=cache.plan.layers[index],
            step=step,
        )
        return out

    hidden: Any = Transformer(config).apply(
        {"params": model.params}, tokens, positions=positions, attend=attend
    )
    return hidden, dataclasses.replace(cache, layers=tuple(layers), lengths=start + count)


def last_logits(
    model: PreparedModel, hidden: Float[Array, "batch length width"], count: Int[Array, " batch"]
) -> Float[Array, "batch vocab"]:
    """Returns float32 logits of the token after each row's last new one."""
    rows = jnp.arange(hidden.shape[0])
    return logits(hidden[rows, jnp.maximum(count - 1, 0)], model.output)
