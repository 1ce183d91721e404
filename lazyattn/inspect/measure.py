"""All that the report shows of a model's attention on rows of text."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from lazyattn.inspect.states import state_statistics
from lazyattn.inspect.sums import head_pictures
from lazyattn.inspect.tiles import tile_counts
from lazyattn.inspect.walk import LayerInput, embed, walk
from lazyattn.model.config import ModelConfig

# Columns of the rollout, the first token's own column not counted.
ROLLOUT_CELLS = 64


@dataclasses.dataclass(frozen=True)
class Measured:
    """Numbers by layer and head; sums are over the rows.

    Attributes:
      sums: as `sums.head_sums` names them.
      tiles: as `tiles.tile_counts` names them.
      states: as `states.state_statistics` names them, of the first row, by layer; before
        the first block too.
      maps: of the first row, the largest weight of each cell of queries and keys.
      rollout: of the first row, after the last layer: the share of each token that comes
        from each cell of the input.
      rollout_first: share of the tokens (mean over the first row's) that comes from the
        first one, after each layer.
    """

    sums: dict[str, Float[np.ndarray, "layers heads ..."]]
    tiles: dict[str, Float[np.ndarray, "layers heads"]]
    states: dict[str, np.ndarray]
    maps: Float[np.ndarray, "layers heads cells cells"]
    rollout: Float[np.ndarray, "length rollout_cells"]
    rollout_first: Float[np.ndarray, " layers"]


def measure(
    params: Mapping[str, Any],
    config: ModelConfig,
    rows: Sequence[Int32[np.ndarray, " length"]],
    *,
    length: int | None = None,
    done: Callable[[int], None] = lambda row: None,
) -> Measured:
    """Measures rows of one document each, one after the other; compiles once.

    Memory is linear in length: weights are made a block of queries at a time, and no two
    layers' at once.

    Args:
      params: the model's parameters.
      config: the model.
      rows: int32 token ids, all of one length.
      length: what rows are padded to; None: not at all.
      done: told each row's number when it is measured.
    """
    total: dict[str, dict[str, np.ndarray]] = {}
    first: dict[str, Any] = {}
    for number, row in enumerate(rows):
        inputs, segment_ids = padded([row], length)
        found = jax.device_get(_measure_row(params, inputs, segment_ids, config=config))
        for group in ("sums", "tiles"):
            row_sums = {k: np.asarray(x[:, 0], np.float64) for k, x in found[group].items()}
            old = total.get(group)
            total[group] = row_sums if old is None else {k: old[k] + row_sums[k] for k in old}
        first = first or found
        done(number)
    size = len(rows[0])
    return Measured(
        total["sums"],
        total["tiles"],
        first["states"],
        first["maps"],
        first["rollout"][:size],
        first["rollout_first"],
    )


def padded(
    rows: Sequence[Int32[np.ndarray, " length"]], length: int | None
) -> tuple[Int32[np.ndarray, "rows length"], Int32[np.ndarray, "rows length"]]:
    """Returns inputs and segment ids; what is added is a document of padding."""
    inputs = np.stack(rows)
    real = np.ones_like(inputs)
    missing = 0 if length is None else length - inputs.shape[1]
    return tuple(np.pad(x, ((0, 0), (0, missing))) for x in (inputs, real))  # type: ignore


@functools.partial(jax.jit, static_argnames="config")
def _measure_row(
    params: Mapping[str, Any],
    inputs: Int[Array, "rows length"],
    segment_ids: Int[Array, "rows length"],
    *,
    config: ModelConfig,
) -> dict[str, Any]:
    renormalize = config.attention.variant == "lazy_renormalized"
    real = segment_ids > 0

    def observe(
        layer: LayerInput, x: Float[Array, "rows length width"], flow: Array
    ) -> tuple[Array, dict[str, Any]]:
        sums, pictures = head_pictures(layer, renormalize, flow)
        flow = _roll_on(flow, pictures["rollout"], pictures["mass"])
        return flow, {
            "sums": sums,
            "tiles": tile_counts(layer, pictures["live"], config.attention.skip_mass),
            "maps": pictures["map"][0],
            "states": state_statistics(x, real),
            "rollout_first": _mean_first(flow, real),
        }

    flow, kept = walk(params, config, inputs, segment_ids, observe, _start(inputs.shape[1]))
    before = state_statistics(embed(params, config, inputs), real)
    kept["states"] = jax.tree.map(
        lambda start, rest: jnp.concatenate([start[None], rest]), before, kept["states"]
    )
    # The first token's own column joins its cell again.
    return kept | {"rollout": flow[0, :, 1:].at[:, 0].add(flow[0, :, 0])}


def _start(length: int) -> Float[Array, "rows length columns"]:
    """Returns where each token comes from before the first layer: from its own cell.

    The first token has column 0 to itself, and none in its cell.
    """
    cells = min(ROLLOUT_CELLS, length)
    cell = jnp.arange(length) * cells // length
    column = jnp.where(jnp.arange(length) == 0, 0, cell + 1)
    return jax.nn.one_hot(column, cells + 1)[None]


def _roll_on(
    flow: Float[Array, "rows length columns"],
    product: Float[Array, "rows heads length columns"],
    mass: Float[Array, "rows heads length"],
) -> Float[Array, "rows length columns"]:
    """Returns the flow after a layer: of weights, mean over heads, and the token itself.

    Both are divided by their sum, which is 2 for softmax and as little as 1 where
    nothing is attended to.

    Source: attention rollout, Abnar and Zuidema, arXiv 2005.00928.
    """
    return (flow + product.mean(axis=1)) / (1 + mass.mean(axis=1))[..., None]


def _mean_first(
    flow: Float[Array, "rows length columns"], real: Bool[Array, "rows length"]
) -> Float[Array, ""]:
    later = real[0] & (jnp.arange(real.shape[1]) > 0)
    return jnp.where(later, flow[0, :, 0], 0).sum() / jnp.maximum(later.sum(), 1)
