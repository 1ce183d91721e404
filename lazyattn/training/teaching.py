"""The optimizer of a run that teaches a softmax model to be lazy.

Offsets and slopes of a model that was taken over are 0, which is softmax attention. A ramp
brings each to where a fresh model starts, slopes to a share of that: update n adds what its line
rises from n - 1 to n, on top of what the optimizer does. So a ramp moves the parameters
themselves. A checkpoint in mid-ramp is an ordinary model that every mode reads, and its count is
all that a resumed run needs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jaxtyping import Array, Float, Int

from lazyattn.experiment import ExperimentConfig, TeachingConfig
from lazyattn.model.config import AttentionConfig
from lazyattn.model.distance_bias import LOG_SLOPE_RANGE, NAMES
from lazyattn.model.heads import initial_slopes
from lazyattn.model.taken_over import is_new
from lazyattn.training.optimizer import make_optimizer

# The share of its way that a parameter has come -> its value: [heads] or [heads, width].
Line = Callable[[Float[Array, ""]], Float[Array, "..."]]


class RampState(NamedTuple):
    """State of the optimizer within, and the updates made."""

    inner: Any
    updates: Int[Array, ""]


def make_run_optimizer(experiment: ExperimentConfig) -> optax.GradientTransformation:
    """Returns the optimizer of a run, with all that `teaching` asks for."""
    found = make_optimizer(experiment.optimizer, experiment.training.steps)
    if experiment.teaching.frozen:
        found = optax.multi_transform({True: found, False: optax.set_to_zero()}, _is_new)
    return with_ramps(found, experiment.model.attention, experiment.teaching)


def _is_new(params: optax.Params) -> optax.Params:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: is_new(tuple(part.key for part in path)), params
    )


def lines(config: AttentionConfig, teaching: TeachingConfig) -> dict[str, tuple[int, Line]]:
    """Returns the ramps by the names of parameters: their steps and their lines.

    theta of a "decay" goes along the logarithm of an even slope, from the smallest it can be.
    A "normal" table has no slopes to go to.
    """
    found: dict[str, tuple[int, Line]] = {}
    if config.has_offset and teaching.offset_steps:
        found["offset"] = teaching.offset_steps, lambda share: share * config.offset_init
    if not config.has_bias or not teaching.bias_steps:
        return found
    slopes = teaching.slope_share * initial_slopes(config)
    table_name, slope_name = NAMES[config.bias_kind]
    if config.bias_kind == "decay":
        least, start = LOG_SLOPE_RANGE[0], np.log(np.where(slopes > 0, slopes, 1))

        def log_slope(share: Float[Array, ""]) -> Float[Array, " heads"]:
            at = jnp.log(jnp.maximum(share, np.finfo(np.float32).tiny)) + start
            return jnp.where(slopes > 0, jnp.maximum(at, least), least)

        found[slope_name] = teaching.bias_steps, log_slope
    elif config.bias_init == "alibi":
        distance = np.arange(config.bias_width, dtype=np.float32)
        table = -slopes[:, None] * distance
        found[table_name] = teaching.bias_steps, lambda share: share * table
        if config.has_tail:
            found[slope_name] = teaching.bias_steps, lambda share: share * slopes
    return found


def with_ramps(
    inner: optax.GradientTransformation, config: AttentionConfig, teaching: TeachingConfig
) -> optax.GradientTransformation:
    """Returns an optimizer that adds the ramps to its updates; `inner` itself if there is none."""
    ramps = lines(config, teaching)
    if not ramps:
        return inner

    def rise(name: str, count: Int[Array, ""]) -> Float[Array, "..."]:
        steps, line = ramps[name]

        def at(count: Int[Array, ""]) -> Float[Array, "..."]:
            return line(jnp.minimum(count.astype(jnp.float32) / steps, 1.0))

        return at(count + 1) - at(count)

    def init(params: optax.Params) -> RampState:
        return RampState(inner.init(params), jnp.zeros((), jnp.int32))

    def update(updates: Any, state: RampState, params: Any = None) -> tuple[Any, RampState]:
        updates, found = inner.update(updates, state.inner, params)
        flat = traverse_util.flatten_dict(updates)
        flat = {
            path: x + rise(path[-1], state.updates) if path[-1] in ramps else x
            for path, x in flat.items()
        }
        return traverse_util.unflatten_dict(flat), RampState(found, state.updates + 1)

    return optax.GradientTransformation(init, update)
