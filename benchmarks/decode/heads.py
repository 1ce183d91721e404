"""What the heads of a model have learned, at initialization or from a file, and its cache."""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lazyattn.errors import InputError
from lazyattn.generation import cache as cache_lib
from lazyattn.generation import spans
from lazyattn.generation.cache import CachePlan
from lazyattn.model.config import AttentionConfig, ModelConfig
from lazyattn.model.distance_bias import bias_arguments
from lazyattn.model.heads import initial_slopes


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the model; `table` is the width of the bias table, `offset` the initial tau."""

    layers: int = 24
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 64
    table: int = 1024
    offset: float = -0.5

    def config(self, variant: str) -> ModelConfig:
        """Returns the model with the attention "lazy" or "softmax"."""
        attention = AttentionConfig(
            variant=variant,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            qk_norm=True,
            bias_kind="table",
            bias_width=self.table,
            offset_init=self.offset,
        )
        width = self.heads * self.head_dim
        return ModelConfig(width=width, num_layers=self.layers, attention=attention)


@dataclasses.dataclass(frozen=True, eq=False)
class Heads:
    """What the attention layers have learned; two are equal if they are the same object.

    Attributes:
      name: "alibi", "none" or a trained model's.
      config: the model.
      attention: parameters of all attention layers but their matrices, stacked.
      distinct: layers i and i + distinct are equal.
    """

    name: str
    config: ModelConfig
    attention: dict[str, Any]
    distinct: int = 1

    def arguments(self, layer: int) -> dict[str, Float[Array, "heads ..."]]:
        """Returns the op's learned arguments in a layer."""
        attention = self.config.attention
        found = dict(bias_arguments({k: x[layer] for k, x in self._plain.items()}, attention))
        if attention.has_offset:
            found["offset"] = jnp.asarray(self.attention["offset"][layer])
        return found

    @property
    def _plain(self) -> dict[str, Any]:
        names = ("distance_bias", "distance_slope")
        return {name: self.attention[name] for name in names if name in self.attention}

    @property
    def score_bound(self) -> float:
        """Returns the largest U of any layer."""
        scales = (self.attention[f"{x}_norm"]["scale"] for x in ("query", "key"))
        largest = math.prod(np.abs(x).max(axis=1) for x in scales)
        return math.sqrt(self.config.head_dim) * float(np.max(largest))

    @property
    def norm(self) -> float:
        """Returns by how much norms of queries and keys are above those of initialization."""
        return math.sqrt(self.score_bound / math.sqrt(self.config.head_dim))

    def plan(self, cache: str, context: int) -> CachePlan:
        """Returns which keys a cache "full" or of "spans" holds."""
        if cache == "full":
            return cache_lib.full_plan(self.config, context)
        return _spans(self, context)


@functools.cache
def _spans(heads: Heads, context: int) -> CachePlan:
    params = {"blocks": {"attention": heads.attention}}
    return spans.plan_cache(params, heads.config, context)


@functools.cache
def softmax(shape: Shape) -> Heads:
    """Returns the heads of plain softmax."""
    return Heads("none", shape.config("softmax"), _norms(shape, np.ones(shape.layers)))


@functools.cache
def alibi(shape: Shape) -> Heads:
    """Returns those of a model at initialization."""
    config = shape.config("lazy")
    slopes = np.asarray(initial_slopes(config.attention))
    offsets = np.full(shape.heads, shape.offset)
    return _heads("alibi", shape, slopes[None], offsets[None], np.ones(1))


def trained(path: pathlib.Path, variant: str, shape: Shape, distinct: int) -> Heads:
    """Returns the heads of a trained model of any size: some of its layers in turn.

    Args:
      path: an npz file with `slopes` [layers, heads], or `bias` [layers, heads, distances],
        `offsets` (or `tau`) [layers, heads], and perhaps `score_bound` [layers], U in nats; or
        lines of JSON as the study keeps them, of which the last of the variant counts. Without
        a table the bias is a line; without U the norms' scales are 1, as at initialization.
      variant: of lines of JSON.
      shape: of the model to time, which gets heads and layers taken evenly from these.
      distinct: how many layers of the file.

    Raises:
      InputError: if the file has no such heads.
    """
    found = _npz(path) if path.suffix == ".npz" else _line(path, variant)
    slopes, offsets = (np.asarray(found[x], np.float64) for x in ("slopes", "offsets"))
    layers, heads = slopes.shape
    distinct = min(distinct, layers, shape.layers)
    layer = np.arange(distinct) * layers // distinct
    head = np.arange(shape.heads) * heads // shape.heads
    pick = np.ix_(layer, head)
    bound = found.get("score_bound")
    scale = np.ones(distinct)
    if bound is not None:
        scale = np.sqrt(np.asarray(bound)[layer] / math.sqrt(shape.head_dim))
    table = found.get("bias")
    name = path.stem if path.suffix == ".npz" else f"{path.stem} {variant}"
    return _heads(
        name,
        shape,
        slopes[pick],
        offsets[pick],
        scale,
        None if table is None else np.asarray(table, np.float64)[pick],
    )


def _npz(path: pathlib.Path) -> dict[str, Any]:
    with np.load(path) as file:
        found = {name: np.asarray(file[name]) for name in file.files}
    found.setdefault("offsets", found.get("tau"))
    if "slopes" not in found and "bias" in found:
        bias = found["bias"].astype(np.float64)
        half = bias.shape[-1] // 2
        found["slopes"] = (bias[..., half] - bias[..., -1]) / (bias.shape[-1] - 1 - half)
    if found.get("slopes") is None or found["offsets"] is None:
        names = ", ".join(found)
        raise InputError(f"--slopes is {path}, but it must have slopes and offsets, not {names}.")
    return found


def _line(path: pathlib.Path, variant: str) -> dict[str, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if line.get("slopes") and line.get("offsets")]
    own = [line for line in lines if line["variant"] == variant]
    if not own:
        known = ", ".join(sorted({line["variant"] for line in lines})) or "none"
        raise InputError(f"--variant is {variant!r}, but it must be one of {path}: {known}.")
    return own[-1]


def _norms(shape: Shape, scale: Float[np.ndarray, " layers"]) -> dict[str, Any]:
    norm = {"scale": np.repeat(scale[:, None], shape.head_dim, axis=1).astype(np.float32)}
    return {"query_norm": norm, "key_norm": norm}


def _heads(
    name: str,
    shape: Shape,
    slopes: Float[np.ndarray, "distinct heads"],
    offsets: Float[np.ndarray, "distinct heads"],
    scale: Float[np.ndarray, " distinct"],
    table: Float[np.ndarray, "distinct heads distances"] | None = None,
) -> Heads:
    distinct = len(slopes)
    line = -slopes[..., None] * np.arange(shape.table)
    if table is not None:
        near = min(shape.table, table.shape[-1])
        line += (table[..., near - 1] - line[..., near - 1])[..., None]
        line[..., :near] = table[..., :near]
    turn = np.arange(shape.layers) % distinct
    arrays = {"distance_bias": line, "distance_slope": slopes, "offset": offsets}
    attention: dict[str, Any] = {k: x[turn].astype(np.float32) for k, x in arrays.items()}
    return Heads(name, shape.config("lazy"), attention | _norms(shape, scale[turn]), distinct)
