"""One optimiser step: gradients of all microbatches, or nothing if they aren't finite."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lazyattn.checkpoint.state import Params, TrainState
from lazyattn.model.loss import LossSums
from lazyattn.model.objective import Batch, LossFn, counted
from lazyattn.sharding import spec

Metrics = dict[str, Array]
StepFn = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A jitted step and the mesh it runs on.

    Attributes:
      jitted: of a state and a batch.
      mesh: where everything lives.
    """

    jitted: Any
    mesh: jax.sharding.Mesh

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Takes the step."""
        with jax.set_mesh(self.mesh):
            return self.jitted(state, batch)

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """Traces the step for arrays like these, to be compiled."""
        with jax.set_mesh(self.mesh):
            return self.jitted.lower(state, batch)


def split_microbatches(batch: Batch, microbatches: int) -> Batch:
    """Returns [batch, length] arrays as [microbatches, batch / microbatches, length].

    Rows are dealt out in turn, so that every device keeps the rows it has.
    """
    return {
        name: jnp.swapaxes(array.reshape(-1, microbatches, *array.shape[1:]), 0, 1)
        for name, array in batch.items()
    }


def accumulate_gradients(
    loss_fn: LossFn, params: Params, batch: Batch, *, microbatches: int
) -> tuple[LossSums, Params]:
    """Returns the loss over a batch and its gradient, a microbatch at a time.

    Every part is divided by the whole batch's token count before it is added, so
    a microbatch weighs what its counted tokens weigh and the result is that of the
    whole batch at once, however unevenly padding is spread.

    Args:
      loss_fn: gives sums over the counted tokens of its batch.
      params: what to differentiate by.
      batch: arrays [batch, length].
      microbatches: parts, a divisor of the batch size.

    Returns:
      Means over the batch's counted tokens (0 if there is none) in place of sums,
      and the gradient of the mean objective.
    """
    tokens = jnp.maximum(jnp.sum(counted(batch)), 1).astype(jnp.float32)

    def scaled(params: Params, part: Batch) -> tuple[Float[Array, ""], LossSums]:
        means = jax.tree.map(lambda total: total / tokens, loss_fn(params, part))
        return means.objective, means

    gradient = jax.grad(scaled, has_aux=True)
    if microbatches == 1:
        gradients, means = gradient(params, batch)
        return means, gradients

    def body(total: tuple[Params, LossSums], part: Batch) -> tuple[tuple[Params, LossSums], None]:
        return jax.tree.map(jnp.add, total, gradient(params, part)), None

    parts = split_microbatches(batch, microbatches)
    parts = jax.lax.with_sharding_constraint(parts, spec(None, "batch", "length"))
    zero = jnp.zeros((), jnp.float32)
    start = (jax.tree.map(jnp.zeros_like, params), LossSums(zero, zero, zero, zero))
    (gradients, means), _ = jax.lax.scan(body, start, parts)
    return means, gradients


def _averaged(state: TrainState, params: Params, decay: float) -> Params | None:
    """Returns the next average of the parameters; None: none is kept."""
    if state.ema is None:
        return None
    updates = (state.step - state.nonfinite_total).astype(jnp.float32)
    # A long average would remember the initial parameters for as long.
    kept = jnp.minimum(decay, (1 + updates) / (10 + updates))
    return jax.tree.map(lambda old, new: old + (1 - kept) * (new - old), state.ema, params)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    mesh: jax.sharding.Mesh,
    shardings: TrainState,
    microbatches: int = 1,
    ema_decay: float = 0.0,
) -> TrainStep:
    """Returns the compiled step; it consumes (donates) the state it is given.

    If the loss or the gradient's norm isn't finite, parameters and optimiser state
    stay as they were and the step is counted as skipped.

    Args:
      loss_fn: the model's loss.
      optimizer: turns gradients into updates.
      schedule: the learning rate, only to report it.
      mesh: where everything lives.
      shardings: of the state.
      microbatches: parts of a batch, one after the other.
      ema_decay: of the average of the parameters, if the state has one.

    Returns:
      A function of a state and a batch that gives the next state and scalar
      metrics: loss (nats a token, without the z term), z (mean squared log-normaliser),
      gradient_norm (before clipping), learning_rate, tokens (counted ones), skipped
      (0 or 1), and nonfinite_in_row and nonfinite_total after this step.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss = loss_fn
        if state.teacher is not None:
            loss = functools.partial(loss_fn, teacher=state.teacher)
        means, gradients = accumulate_gradients(
            loss, state.params, batch, microbatches=microbatches
        )
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(gradients)
            finite = jnp.isfinite(means.objective) & jnp.isfinite(norm)
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = _averaged(state, params, ema_decay)
            params, opt_state, ema = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old),
                (params, opt_state, ema),
                (state.params, state.opt_state, state.ema),
            )
        skipped = (~finite).astype(jnp.int32)
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=ema,
            nonfinite_total=state.nonfinite_total + skipped,
            nonfinite_in_row=(state.nonfinite_in_row + 1) * skipped,
        )
        metrics = {
            "loss": means.nll,
            "z": means.log_z_squared,
            "gradient_norm": norm,
            "learning_rate": schedule(state.step - state.nonfinite_total),
            "tokens": jnp.sum(counted(batch)),
            "skipped": skipped,
            "nonfinite_in_row": new_state.nonfinite_in_row,
            "nonfinite_total": new_state.nonfinite_total,
        }
        return new_state, metrics

    rows = jax.sharding.NamedSharding(mesh, spec("batch", "length"))
    everywhere = jax.sharding.NamedSharding(mesh, spec())
    compiled = jax.jit(
        step,
        in_shardings=(shardings, rows),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )

    return TrainStep(compiled, mesh)
