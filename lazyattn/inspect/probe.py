"""A few numbers on attention for the log of a training run."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lazyattn import sharding
from lazyattn.inspect.sequences import LENGTH, THRESHOLD
from lazyattn.inspect.statistics import bias_spans, layer_sums
from lazyattn.model.config import ModelConfig

# Rows of the training length, and sequences of `LENGTH` cut from them.
_ROWS = 1
_SEQUENCES = 16
_QUANTILES = {"min": 0.0, "lower": 0.25, "median": 0.5, "upper": 0.75, "max": 1.0}


class AttentionProbe:
    """Measures a model's attention on the same few rows every time; compiled once.

    Costs a forward pass of one row and of 16 sequences of 64 tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: jax.sharding.Mesh,
        batch: Mapping[str, Int[np.ndarray, "rows length"]],
    ):
        """Prepares the compiled function.

        Args:
          config: the model.
          mesh: where it runs.
          batch: `inputs` and `segment_ids`, int32, the same in every process; 0 marks
            padding.
        """
        self._mesh = mesh
        self._rows = {name: batch[name][:_ROWS] for name in ("inputs", "segment_ids")}
        self._sequences = _cut(batch)
        everywhere = jax.sharding.NamedSharding(mesh, sharding.spec())
        self._scalars = jax.jit(functools.partial(_scalars, config), out_shardings=everywhere)

    def __call__(self, params: Any) -> dict[str, float]:
        """Returns the scalars, all starting with "attention_".

        zero_share (of visible pairs, exactly 0), mass (mean sum of a query's weights),
        first_token (mean weight of later queries on their document's first token), sink
        (the metric of Gu et al. for the first token, where there are 64 tokens in a row),
        visited (share of the tiles of 64 x 64), and over all heads the quantiles offset_min
        to offset_max of tau and span_min to span_max of `bias_spans`, where there are any.
        """
        with jax.set_mesh(self._mesh):
            found = self._scalars(params, self._rows, self._sequences)
        return {f"attention_{name}": float(x) for name, x in jax.device_get(found).items()}


def _cut(batch: Mapping[str, Int[np.ndarray, "rows length"]]) -> Int[np.ndarray, "sequences 64"]:
    """Returns sequences without padding; what documents they are of doesn't matter."""
    whole = batch["inputs"].shape[1] // LENGTH * LENGTH
    inputs, segments = (
        batch[name][:, :whole].reshape(-1, LENGTH) for name in ("inputs", "segment_ids")
    )
    return inputs[(segments > 0).all(axis=1)][:_SEQUENCES]


def _scalars(
    config: ModelConfig,
    params: Any,
    rows: Mapping[str, Int[Array, "rows length"]],
    sequences: Int[Array, "sequences length"],
) -> dict[str, Float[Array, ""]]:
    sums = {name: x.sum(axis=1) for name, x in layer_sums(params, config=config, **rows).items()}
    found = {
        "zero_share": (sums["zeros"] / sums["pairs"]).mean(),
        "mass": (sums["mass"] / sums["queries"]).mean(),
        "first_token": (sums["first"] / jnp.maximum(sums["later"], 1)).mean(),
        "visited": sums["visited"].sum() / sums["causal"].sum(),
    }
    # tau / length, which that variant has, means nothing in a row of another length.
    if sequences.shape[0] and config.attention.variant != "lazy_length_offset":
        short = layer_sums(params, sequences, jnp.ones_like(sequences), config=config)
        found["sink"] = (short["received"][..., 0] / LENGTH > THRESHOLD).mean()
    offsets = [
        leaf.ravel()
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "offset"
    ]
    by_head = {"offset": jnp.concatenate(offsets)} if offsets else {}
    if config.attention.has_bias:
        spans = bias_spans(params, config, rows["inputs"].shape[1])
        by_head["span"] = spans.ravel().astype(jnp.float32)
    for what, values in by_head.items():
        found |= {f"{what}_{name}": jnp.quantile(values, q) for name, q in _QUANTILES.items()}
    return found
