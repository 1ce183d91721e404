"""The trainer's optimizer with its learning rate in the state, so that programs serve them all.

Every update of the trainer's optimizer is proportional to the peak of its schedule. So it is
made with a peak of 1, and what it returns is multiplied by the peak: the same up to rounding.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lazyattn.checkpoint.state import TrainState
from lazyattn.experiment.training import OptimizerConfig
from lazyattn.training.optimizer import make_optimizer


class PeakState(NamedTuple):
    """State of the optimizer within, and the peak of the learning rate."""

    inner: Any
    peak: Float[Array, ""]


def with_peak_of_one(config: OptimizerConfig) -> OptimizerConfig:
    """Returns the settings that programs are compiled for."""
    return dataclasses.replace(config, learning_rate=1.0)


def peak_in_state(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns the optimizer; `set_peak` sets its learning rate."""
    inner = make_optimizer(with_peak_of_one(config), steps)

    def init(params: optax.Params) -> PeakState:
        return PeakState(inner.init(params), jnp.zeros((), jnp.float32))

    def update(
        updates: optax.Updates, state: PeakState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, PeakState]:
        updates, found = inner.update(updates, state.inner, params)
        return jax.tree.map(lambda x: state.peak * x, updates), PeakState(found, state.peak)

    return optax.GradientTransformation(init, update)


def set_peak(state: TrainState, peak: Float[Array, ""]) -> TrainState:
    """Returns the state with another peak of the learning rate."""
    return dataclasses.replace(state, opt_state=optax.tree.set(state.opt_state, peak=peak))
