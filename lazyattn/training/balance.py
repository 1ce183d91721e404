"""What a run says about the balance of its devices before it starts."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from lazyattn import sharding
from lazyattn.model.config import ModelConfig
from lazyattn.model.distance_bias import bias_arguments, bias_parameters
from lazyattn.model.heads import head_windows
from lazyattn.sharding.balance import Imbalance, imbalance, visited_tiles

_TILE = 128
_EVEN = 0.05
_LAYERS = 8  # as many as are looked at, evenly spread


def measure(
    config: ModelConfig,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    length: int,
    heads: Mapping[str, Float[np.ndarray, "layers heads *rest"]],
) -> Imbalance:
    """Returns how unevenly attention falls on the mesh's devices, over the layers.

    Queries and keys are taken to have entries of variance 1, as they have at
    initialisation, and rows to be one document.

    Args:
      config: the model.
      mesh: its devices.
      length: tokens a row.
      heads: distance_bias, distance_slope and offset of every layer, those there are.
    """
    att = config.attention
    parts = sharding.num_shards(mesh, "length")
    chunk = length // (2 * parts)
    tile = math.gcd(chunk, _TILE) if chunk % _TILE else _TILE
    # Very small tiles would take long, and say no more.
    tile = tile if tile >= min(chunk, 16) else chunk
    tables = heads.get("distance_bias", np.zeros((1, att.num_heads, 1)))
    total = np.zeros((att.num_heads, length // tile))
    for layer in np.unique(np.linspace(0, len(tables) - 1, _LAYERS).round().astype(int)):
        table = tables[layer]
        slope = heads["distance_slope"][layer] if "distance_slope" in heads else None
        offset = heads["offset"][layer] if "offset" in heads else np.full(att.num_heads, -1.0)
        total += visited_tiles(
            _expand(table, slope, length),
            offset >= 0,
            score_bound=math.sqrt(config.head_dim),
            skip_mass=att.skip_mass,
            tile=tile,
            windows=head_windows(att),
        )
    return imbalance(total, head_shards=sharding.num_shards(mesh, "heads"), sequence_shards=parts)


def _expand(
    table: Float[np.ndarray, "heads width"],
    slope: Float[np.ndarray, " heads"] | None,
    length: int,
) -> Float[np.ndarray, "heads length"]:
    """Returns b(x) of every distance, as `pallas_kernels.bias.expand` does."""
    width = table.shape[1]
    near = table[:, :length].astype(np.float64)
    past = np.arange(1, length - width + 1)
    if slope is None:
        return np.concatenate([near, np.zeros((len(table), past.size))], axis=1)
    return np.concatenate([near, near[:, -1:] - slope[:, None] * past], axis=1)


def describe(
    config: ModelConfig, mesh: jax.sharding.Mesh, length: int, params: Mapping[str, Any]
) -> list[str]:
    """Returns a line on the balance, none where neither heads nor rows are shared out.

    Args:
      config: the model.
      mesh: its devices; all processes must call this.
      length: tokens a row.
      params: the parameters, wherever they are.
    """
    heads, parts = (sharding.num_shards(mesh, axis) for axis in ("heads", "length"))
    if heads == parts == 1:
        return []
    found = measure(config, mesh, length, _by_layer(config, mesh, params))
    said = []
    if heads > 1:
        said.append(
            f"the busiest share of the heads {found.heads:+.1%}" + _remedy(config, heads, found)
        )
    if parts > 1:
        said.append(
            f"the busiest share of the length {found.sequence:+.1%}"
            f" (contiguous ones: {found.contiguous:+.1%})"
        )
    return ["balance  attention tiles over the mean: " + ", ".join(said)]


def _remedy(config: ModelConfig, heads: int, found: Imbalance) -> str:
    """Returns what would help a new run, if anything."""
    att = config.attention
    if found.heads <= _EVEN or not att.has_bias or att.slope_shards % heads == 0:
        return ""
    return f" (in a new run less with config.model.attention.slope_shards={heads})"


def _by_layer(
    config: ModelConfig, mesh: jax.sharding.Mesh, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Returns what heads have learned, on the host, with a leading axis of layers."""
    att = config.attention
    if config.scan_layers:
        blocks = [params["blocks"]["attention"]]
    else:
        blocks = [params[f"blocks_{i}"]["attention"] for i in range(config.num_layers)]
    names = {*bias_parameters(att), *(("offset",) if att.has_offset else ())}
    held: list[dict[str, Array]] = [{name: block[name] for name in names} for block in blocks]

    def arguments(held: list[dict[str, Array]]) -> list[dict[str, Array]]:
        offsets = [{n: block[n] for n in ("offset",) if n in block} for block in held]
        return [bias_arguments(b, att) | offset for b, offset in zip(held, offsets, strict=True)]

    everywhere = jax.sharding.NamedSharding(mesh, sharding.spec())
    here = jax.device_get(jax.jit(arguments, out_shardings=everywhere)(held))
    if config.scan_layers:
        return dict(here[0])
    return {name: np.stack([block[name] for block in here]) for name in here[0]}
