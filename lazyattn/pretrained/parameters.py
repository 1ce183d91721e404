"""Parameters to and from an Orbax checkpoint, their dtype, and a bias table without a tail."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lazyattn import sharding
from lazyattn.errors import InputError, require
from lazyattn.model.config import ModelConfig
from lazyattn.model.distance_bias import LOG_SLOPE_RANGE, NAMES, bias_arguments
from lazyattn.model.parameters import Params, parameter_shapes, partition_specs

# Float32 in every export: they are small, and bfloat16 would move a bias of -500 by up
# to 1, and round what p + tau / n hangs on.
KEPT = (
    *(name for both in NAMES.values() for name in both),
    *("offset", "scale", "query_bias", "key_bias", "value_bias"),
)


def cast(params: Mapping[str, Any], dtype: str) -> Params:
    """Returns the parameters with their matrices in `dtype`, "float32" or "bfloat16"."""

    def one(path: Any, leaf: Any) -> Any:
        return leaf if path[-1].key in KEPT else leaf.astype(jnp.dtype(dtype))

    return jax.tree_util.tree_map_with_path(one, dict(params))


def stored_dtypes(config: ModelConfig, dtype: str) -> Params:
    """Returns the parameters' tree with the shapes and dtypes of an export."""
    return jax.eval_shape(
        lambda: cast(jax.tree.map(jnp.zeros_like, parameter_shapes(config)), dtype)
    )


def save(folder: Path, params: Mapping[str, Any], layout: str) -> None:
    """Writes an Orbax checkpoint.

    Args:
      folder: that does not exist.
      params: on any devices of this process.
      layout: "sharded" writes every array in the pieces that devices hold, all at once;
        "unsharded" brings them together on the host first. Either can be read on any
        number of devices.
    """
    if layout == "unsharded":
        params = jax.tree.map(lambda leaf: np.asarray(jax.device_get(leaf)), dict(params))
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), params)


def restore(folder: Path, config: ModelConfig, mesh: jax.sharding.Mesh | None) -> Params:
    """Returns the parameters in float32, each device of `mesh` reading its own share.

    Args:
      folder: an Orbax checkpoint of parameters.
      config: the model.
      mesh: devices; None: the first one.

    Raises:
      InputError: if it can't be read, or is not of that model, or the mesh does not
        divide an array.
    """
    wanted = placed_shapes(config, mesh)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(
                folder.absolute(),
                args=ocp.args.PyTreeRestore(
                    wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted)
                ),
            )
    except (ValueError, OSError, KeyError) as error:
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise InputError(
            f"The parameters in {str(folder)!r} can't be read ({type(error).__name__}: {first})."
        ) from None


def place(params: Params, config: ModelConfig, mesh: jax.sharding.Mesh | None) -> Params:
    """Returns parameters from the host's memory on devices, as `restore` would.

    Raises:
      InputError: if the mesh does not divide an array.
    """
    wanted = placed_shapes(config, mesh)
    return jax.tree.map(lambda leaf, where: jax.device_put(leaf, where.sharding), params, wanted)


def placed_shapes(config: ModelConfig, mesh: jax.sharding.Mesh | None) -> Params:
    """Returns the parameters' tree of shapes that know their sharding.

    Raises:
      InputError: if the mesh does not divide an array.
    """
    shapes = parameter_shapes(config)
    if mesh is None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: one, shapes)
    else:
        shardings = jax.tree.map(
            lambda spec: jax.sharding.NamedSharding(mesh, spec), partition_specs(config)
        )
        sharding.check_divisible(shapes, shardings)
    return jax.tree.map(
        lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where),
        shapes,
        shardings,
    )


def table_config(config: ModelConfig) -> ModelConfig:
    """Returns the model whose bias is a table and a slope, and else is `config`'s."""
    attention = config.attention
    if attention.bias_kind == "table":
        return config
    attention = dataclasses.replace(attention, bias_kind="table")
    return dataclasses.replace(config, attention=attention)


def as_table(params: Mapping[str, Any], config: ModelConfig) -> tuple[Params, ModelConfig]:
    """Returns the same function with a bias that is a table and a slope, as others know it.

    Args:
      params: the model's parameters.
      config: the model; one whose bias is a table already comes back as it is, but for the
        entries that its global heads don't use, which are 0 then.
    """
    attention = config.attention
    as_it_is = attention.bias_kind == "table" and not attention.num_global_heads
    if as_it_is or not attention.has_bias:
        return dict(params), table_config(config)
    names = NAMES[attention.bias_kind]

    def converted(block: Mapping[str, Any]) -> Params:
        layer = {k: x for k, x in block["attention"].items() if k not in names}
        return {**block, "attention": layer | bias_arguments(block["attention"], attention)}

    return _with_blocks(params, converted), table_config(config)


def as_softmax(params: Mapping[str, Any], config: ModelConfig) -> tuple[Params, ModelConfig]:
    """Returns the model as ordinary attention, if its bias and its offsets are 0; else as it is.

    The smallest slope of a "decay" counts as 0: a model that was softmax starts with that.
    """
    attention = config.attention
    names = ("offset", *(name for both in NAMES.values() for name in both))
    nothing = np.exp(LOG_SLOPE_RANGE[0]) * attention.bias_width

    def is_nothing(layer: Mapping[str, Any]) -> bool:
        found = [*bias_arguments(layer, attention).values()]
        found += [layer["offset"]] if attention.has_offset else []
        return all(float(jnp.abs(x).max()) <= nothing for x in found)

    def without(block: Mapping[str, Any]) -> Params:
        kept = {k: x for k, x in block["attention"].items() if k not in names}
        return {**block, "attention": kept}

    blocks = [block for name, block in params.items() if name.startswith("blocks")]
    if not all(is_nothing(block["attention"]) for block in blocks):
        return dict(params), config
    attention = dataclasses.replace(attention, variant="softmax")
    return _with_blocks(params, without), dataclasses.replace(config, attention=attention)


def _with_blocks(
    params: Mapping[str, Any], change: Callable[[Mapping[str, Any]], Params]
) -> Params:
    return {
        name: change(leaf) if name.startswith("blocks") else leaf for name, leaf in params.items()
    }


def without_tail(
    params: Mapping[str, Any], config: ModelConfig, length: int
) -> tuple[Params, ModelConfig]:
    """Returns the model with its bias tables written out to `length` distances.

    In contexts of up to `length` tokens it is the same function; past them a bias
    without a tail is 0.

    Args:
      params: the model's parameters.
      config: the model, which has a tail.
      length: distances, at least the table's.

    Raises:
      InputError: if it has no tail, or the table is longer.
    """
    if not config.attention.has_tail:
        raise InputError(
            f"--bias_length is {length}, but the model's bias has no tail to write out; leave it"
            " out."
        )
    width = config.attention.bias_width
    require(length >= width, "--bias_length", length, f"at least {width}, the table's own length")

    def extended(block: Mapping[str, Any]) -> Params:
        layer = dict(block["attention"])
        table, slope = layer["distance_bias"], layer.pop("distance_slope")
        beyond = jnp.arange(1, length - width + 1, dtype=table.dtype)
        tail = table[..., -1:] - slope[..., None] * beyond
        return {
            **block,
            "attention": {**layer, "distance_bias": jnp.concatenate([table, tail], axis=-1)},
        }

    params, config = as_table(params, config)
    attention = dataclasses.replace(config.attention, bias_width=length, bias_tail=False)
    return _with_blocks(params, extended), dataclasses.replace(config, attention=attention)
