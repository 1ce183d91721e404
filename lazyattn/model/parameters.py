"""Making the parameters, and what is known of them without making them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from lazyattn import sharding
from lazyattn.model.config import ModelConfig
from lazyattn.model.transformer import Transformer

# A nested dict of arrays, with names as `Transformer` lists them.
Params = dict[str, Any]


def init_params(config: ModelConfig, key: Array) -> Params:
    """Returns freshly initialised parameters, all float32.

    Weight matrices are truncated normals of variance 1 / fan_in; the two that write
    into the residual stream (attention's output, the MLP's down) have variance
    1 / (2 layers fan_in). Embeddings: variance 1 / width. Norm scales: 1. Distance
    biases and offsets: as `AttentionConfig` says.

    Values do not depend on sharding, so under `jax.jit` with `out_shardings` from
    `partition_specs` no device need hold more than its part.
    """
    params = nn.meta.unbox(_boxed(config, key))
    return params if config.scan_layers else unstack_blocks(params)


def _boxed(config: ModelConfig, key: Array) -> Params:
    """Returns a scanned model's parameters in Flax's boxes, which know the logical axes.

    Unrolled layers have the same ones: made one by one they take a minute to compile.
    """
    model = Transformer(dataclasses.replace(config, scan_layers=True))
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def parameter_shapes(config: ModelConfig) -> Params:
    """Returns the parameters' tree with a `jax.ShapeDtypeStruct` for each array."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def logical_axes(config: ModelConfig) -> Params:
    """Returns the parameters' tree with a tuple of logical axis names for each array.

    The names are those of `sharding.RULES`.
    """
    boxed = jax.eval_shape(lambda: _boxed(config, jax.random.key(0)))
    names = jax.tree.map(
        lambda box: box.names, boxed, is_leaf=lambda node: isinstance(node, nn.Partitioned)
    )
    if config.scan_layers:
        return names
    blocks = names.pop("blocks")
    layer = jax.tree.map(lambda names: names[1:], blocks, is_leaf=lambda x: isinstance(x, tuple))
    return {**names, **{f"blocks_{i}": layer for i in range(config.num_layers)}}


def partition_specs(config: ModelConfig) -> Params:
    """Returns the parameters' tree with a `jax.sharding.PartitionSpec` for each array."""
    return jax.tree.map(
        lambda names: sharding.spec(*names),
        logical_axes(config),
        is_leaf=lambda node: isinstance(node, tuple),
    )


def stack_blocks(params: Mapping[str, Any]) -> Params:
    """Returns an unrolled model's parameters as a scanned model has them.

    Every array of blocks_0, blocks_1, ... becomes one with a leading axis of layers.
    Any tree with these names will do, such as an optimizer's moments.
    """
    number = sum(name.startswith("blocks_") for name in params)
    blocks = [params[f"blocks_{i}"] for i in range(number)]
    rest = {name: value for name, value in params.items() if not name.startswith("blocks_")}
    return {**rest, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def unstack_blocks(params: Mapping[str, Any]) -> Params:
    """Returns a scanned model's parameters as an unrolled model has them."""
    rest = {name: value for name, value in params.items() if name != "blocks"}
    number = jax.tree.leaves(params["blocks"])[0].shape[0]
    for i in range(number):
        rest[f"blocks_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
    return rest
