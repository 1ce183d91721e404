"""The learning-rate schedule, who is decayed, who is faster, and the optimizer made of them.

AdamW's decay pulls a parameter towards zero a little every step. That is a sound
prior for a matrix, whose zero is a harmless place to be. It is not for

- norms: their scale sets how loud a block is, and its rest value is one;
- distance biases and slopes: zero is not "small" there but a different attention
  span, and a head trained to look near would be pushed to look far;
- offsets: zero turns Elastic-Softmax back into softmax, so decay would undo the
  very sparsity that the offset learned.

So those are exempt. The choice goes by name, not by number of axes: with scanned
layers a norm's scale is a matrix too.

All parameters have one learning rate but theta, the logarithm of a head's slope
(`distance_log_slope`): its rate is `log_slope_factor` times the common one, 1 by default. A
step of Adam moves every entry by about the rate, so with 30, which older runs had, spans change
by factors of 3 to 10 in the time in which a weight moves by 0.1. In docs/results.md that
brings nothing.

| parameters | decay | learning rate |
|---|---|---|
| embeddings, matrices of attention (the output gate's too) and MLP | yes | common |
| norms, offsets, distance_delta, distance_bias, distance_slope | no | common |
| biases of queries, keys and values (query_bias, key_bias, value_bias) | no | common |
| LoRA's matrices (`lazyattn.model.lora`) | no | common |
| distance_log_slope | no | common times log_slope_factor |
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from lazyattn.experiment.training import OptimizerConfig
from lazyattn.model.lora import is_lora
from lazyattn.training.muon import scale_by_muon_and_adam

DECAYED = frozenset(
    {
        *("embedding", "unembedding"),
        *("query", "key", "value", "output", "output_gate"),
        *("gate", "up", "down"),
    }
)
EXEMPT = frozenset(
    {
        *("distance_bias", "distance_slope", "distance_delta", "distance_log_slope", "offset"),
        *("query_bias", "key_bias", "value_bias"),
    }
)
FASTER = "distance_log_slope"


def is_decayed(path: tuple[str, ...]) -> bool:
    """Returns whether weight decay applies to the parameter at `path`.

    Args:
      path: names from the root of the parameters to the array, e.g.
        ("blocks", "attention", "query", "kernel").

    Raises:
      ValueError: if no name on the path belongs to a group, or names of both do:
        a new kind of parameter must be put in one of them on purpose.
    """
    exempt = any(name in EXEMPT or name.endswith("norm") or is_lora(name) for name in path)
    decayed = any(name in DECAYED for name in path)
    if exempt == decayed:
        raise ValueError(
            f"parameter {'/'.join(path)} is in {'both' if exempt else 'no'} decay group"
        )
    return decayed


def decay_mask(params: optax.Params) -> optax.Params:
    """Returns a tree like `params` (nested dicts) of bools: True where decay applies."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: is_decayed(path) for path in flat})


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the updates already made.

    Update number n (from 1, so that none has rate zero) gets `learning_rate` n /
    `warmup_steps` during the warm-up. After it, "cosine" falls to
    `final_fraction` of the peak at update `steps`; "wsd" stays at the peak and
    falls to it linearly over the last `decay_fraction` of all steps; "constant"
    stays. A run shorter than its warm-up ends inside it.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = config.warmup_steps

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        update = jnp.asarray(count, jnp.float32) + 1
        if config.schedule == "cosine":
            progress = jnp.clip((update - warmup) / max(steps - warmup, 1), 0, 1)
            rate = final + (peak - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        elif config.schedule == "wsd":
            length = max(min(round(config.decay_fraction * steps), steps - warmup), 1)
            progress = jnp.clip((update - (steps - length)) / length, 0, 1)
            rate = peak + (final - peak) * progress
        else:
            rate = jnp.full_like(update, peak)
        return jnp.where(update < warmup, peak * update / max(warmup, 1), rate)

    return schedule


def _faster(inner: optax.GradientTransformation, factor: float) -> optax.GradientTransformation:
    """Returns `inner`, whose updates of parameters named `FASTER` are multiplied.

    It has `inner`'s state and none of its own.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(updates, state, params)
        flat = traverse_util.flatten_dict(updates)
        flat = {path: x * factor if path[-1] == FASTER else x for path, x in flat.items()}
        return traverse_util.unflatten_dict(flat), state

    return optax.GradientTransformation(inner.init, update)


def _scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns Adam whose moments are kept in the dtypes of the settings.

    optax keeps the second moment in the parameters' dtype; here it is rounded to
    `nu_dtype` between steps.
    """
    inner = optax.scale_by_adam(
        b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=config.mu_dtype
    )
    if config.nu_dtype == "float32":
        return inner

    def with_nu(state: Any, dtype: str) -> Any:
        return state._replace(nu=optax.tree.cast(state.nu, jnp.dtype(dtype)))

    def init(params: optax.Params) -> Any:
        return with_nu(inner.init(params), config.nu_dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(updates, with_nu(state, "float32"), params)
        return updates, with_nu(state, config.nu_dtype)

    return optax.GradientTransformation(init, update)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns AdamW, or Muon, with clipping by the global norm of the gradient.

    Decay and learning rates are those of the table above.

    The state has the same structure whatever the settings but `name`, so that a run may be
    resumed with other ones.
    """
    direction = _scale_by_adam(config)
    if config.name == "muon":
        direction = scale_by_muon_and_adam(config, direction)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm if config.clip_norm > 0 else float("inf")),
        direction,
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        _faster(
            optax.scale_by_learning_rate(make_schedule(config, steps)), config.log_slope_factor
        ),
    )
