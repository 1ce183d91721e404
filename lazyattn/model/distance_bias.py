"""The learned distance bias: its parameters, where they start, and what the op gets of them.

"decay": b_h(x) = -exp(theta_h) x + delta_h(min(x, W - 1)), with `distance_log_slope` theta
[heads] and `distance_delta` [heads, W]. "table": b_h(x) = table_h[x], with `distance_bias`
[heads, W], and where it has a tail `distance_slope` [heads] past W. `bias_arguments` makes
of either the table and the slope that `lazy_attention` takes; nothing else should.

Why a decay: a slope learned directly is multiplied by thousands of tokens, so that small
steps of it turn the whole tail, and turn it upwards; docs/lazy_attention.md has the numbers.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lazyattn.errors import InputError
from lazyattn.model.config import AttentionConfig
from lazyattn.model.heads import global_heads, initial_slopes

# Bounds of theta in the forward pass. A slope of e^10 a token leaves a head its own token,
# one of e^-30 is none in any context; in between, float32 neither overflows nor gives 0.
LOG_SLOPE_RANGE = (-30.0, 10.0)

# What each kind learns: for the op's table, and for its slope.
NAMES = {
    "decay": ("distance_delta", "distance_log_slope"),
    "table": ("distance_bias", "distance_slope"),
}


class BiasParameter(NamedTuple):
    """One learned array of a layer's bias.

    Attributes:
      init: its initializer.
      shape: of the array.
      axes: their logical names.
    """

    init: Callable[..., Array]
    shape: tuple[int, ...]
    axes: tuple[str, ...]


def bias_parameters(config: AttentionConfig) -> dict[str, BiasParameter]:
    """Returns what a layer learns of its bias, by name; nothing where it has none.

    theta starts at the logarithm of the initial slope (0 in a global head, whose theta is
    not used) and delta at 0. An "alibi" table starts as the lines of these slopes and its
    tail goes on with them; a "normal" one is random with standard deviation `bias_std`,
    and its tail is flat.
    """
    if not config.has_bias:
        return {}
    table_name, slope_name = NAMES[config.bias_kind]
    slopes = initial_slopes(config)
    if config.bias_kind == "decay":
        table_init: Callable[..., Array] = jax.nn.initializers.zeros
        start = np.log(np.where(slopes > 0, slopes, 1))
    elif config.bias_init == "alibi":
        table_init = _constant(-slopes[:, None] * np.arange(config.bias_width, dtype=np.float32))
        start = slopes
    else:
        table_init = jax.nn.initializers.normal(config.bias_std)
        start = np.zeros_like(slopes)
    shape = (config.num_heads, config.bias_width)
    found = {table_name: BiasParameter(table_init, shape, ("heads", "distance"))}
    if config.has_tail:
        found[slope_name] = BiasParameter(_constant(start), (config.num_heads,), ("heads",))
    return found


def _constant(value: Float[np.ndarray, "..."]) -> Callable[..., Array]:
    def init(key: Array, shape: Any, dtype: Any) -> Float[Array, "..."]:
        del key
        assert shape == value.shape
        return jnp.asarray(value, dtype)

    return init


def bias_arguments(
    parameters: Mapping[str, Any], config: AttentionConfig
) -> dict[str, Float[Array, "..."]]:
    """Returns the op's `distance_bias` and `distance_slope`, those there are, float32.

    theta is kept within `LOG_SLOPE_RANGE`, so that the slope of a "decay" is positive and
    finite whatever theta is. Its gradient goes on past the bounds as if there were none
    (straight through), so that no head is stuck there. In a global head the slope is 0 and
    so is the last entry of the table, with which the op goes on past it.

    Args:
      parameters: one attention layer's, or any with leading axes such as layers; names that
        are none of the bias's are passed over.
      config: the layer.

    Raises:
      InputError: if there are parameters of both kinds of bias, or not those of the
        configured one.
    """
    if not config.has_bias:
        return {}
    table_name, slope_name = NAMES[config.bias_kind]
    _check_names(parameters, config)
    table = jnp.asarray(parameters[table_name])
    if not config.has_tail:
        return {"distance_bias": _without_last(table, config)}
    slope = jnp.asarray(parameters[slope_name])
    if config.bias_kind == "decay":
        bounded = jnp.clip(jax.lax.stop_gradient(slope), *LOG_SLOPE_RANGE)
        slope = jnp.exp(bounded + (slope - jax.lax.stop_gradient(slope)))
    if config.num_global_heads:
        slope = jnp.where(global_heads(config), 0.0, slope)
    if config.bias_kind == "decay":
        table -= slope[..., None] * jnp.arange(table.shape[-1], dtype=table.dtype)
    return {"distance_bias": _without_last(table, config), "distance_slope": slope}


def _without_last(
    table: Float[Array, "*layers heads width"], config: AttentionConfig
) -> Float[Array, "*layers heads width"]:
    if not config.num_global_heads:
        return table
    last = np.arange(config.bias_width) == config.bias_width - 1
    return jnp.where(global_heads(config)[:, None] & last, 0.0, table)


def _check_names(parameters: Mapping[str, Any], config: AttentionConfig) -> None:
    wanted = set(bias_parameters(config))
    found = {name for names in NAMES.values() for name in names if name in parameters}
    if found != wanted:
        raise InputError(
            f"The parameters of the distance bias are {', '.join(sorted(found)) or 'missing'}, but"
            f" a layer with model.attention.bias_kind = {config.bias_kind!r} has"
            f" {' and '.join(sorted(wanted))}, and no other."
        )
