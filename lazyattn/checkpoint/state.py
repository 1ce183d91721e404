"""All that a step changes and a checkpoint must keep, as one pytree."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, UInt32

from lazyattn.experiment import ExperimentConfig
from lazyattn.model.objective import Params
from lazyattn.model.parameters import init_params, partition_specs
from lazyattn.model.taken_over import twin_params
from lazyattn.sharding import check_divisible


@flax.struct.dataclass
class TrainState:
    """The state of a run after `step` steps.

    Attributes:
      step: steps taken, skipped ones included.
      params: float32 parameters.
      opt_state: the optimiser's; its counts leave skipped steps out.
      rng: legacy key data for whatever is random after initialisation; fold
        `step` in before use.
      nonfinite_total: steps skipped because of a non-finite loss or gradient.
      nonfinite_in_row: those among them since the last good step.
      ema: an exponential moving average of `params`; None: none is kept.
      teacher: parameters of the softmax model that is followed (`teaching.distill`); None:
        there is none, or all are among `params`.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    rng: UInt32[Array, "2"]
    nonfinite_total: Int[Array, ""]
    nonfinite_in_row: Int[Array, ""]
    ema: Params | None = None
    teacher: Params | None = None

    def evaluated(self, use_ema: bool) -> Params:
        """Returns the parameters to evaluate: the average, if there is one and `use_ema`."""
        return self.ema if use_ema and self.ema is not None else self.params


class StateFactory:
    """Knows a state's shapes and shardings before any of it exists.

    Attributes:
      abstract: the state as `jax.ShapeDtypeStruct`s that carry their shardings.
      shardings: the state as `NamedSharding`s.
    """

    def __init__(
        self,
        init_params: Callable[[UInt32[Array, "2"]], Params],
        specs: Params,
        optimizer: optax.GradientTransformation,
        mesh: jax.sharding.Mesh,
        seed: int,
        keep_ema: bool = False,
        keep_teacher: bool = False,
    ):
        """Traces the initialisation without running it.

        Args:
          init_params: key -> parameters.
          specs: the parameters' tree with `PartitionSpec`s; the optimiser's moments
            are split in the same way, everything else is replicated.
          optimizer: makes the optimiser's state.
          mesh: where the state will live.
          seed: of the parameters and of `TrainState.rng`.
          keep_ema: whether there is an average of the parameters.
          keep_teacher: whether the softmax model that the parameters begin as is kept.

        Raises:
          InputError: if the mesh doesn't divide a parameter.
        """

        def create(params: Params | None = None) -> TrainState:
            init_key, rng = jax.random.split(jax.random.PRNGKey(seed))
            params = init_params(init_key) if params is None else params
            zero = jnp.zeros((), jnp.int32)
            return TrainState(
                step=zero,
                params=params,
                opt_state=optimizer.init(params),
                rng=rng,
                nonfinite_total=zero,
                nonfinite_in_row=zero,
                ema=params if keep_ema else None,
                teacher=twin_params(params) if keep_teacher else None,
            )

        shapes = jax.eval_shape(create)
        params = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs)
        check_divisible(shapes.params, params)
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self.shardings: TrainState = dataclasses.replace(
            jax.tree.map(lambda _: everywhere, shapes),
            params=params,
            opt_state=optax.tree.map_params(
                optimizer,
                # A transformation of some of the parameters has no state for the others.
                lambda x, sharding: x if isinstance(x, optax.MaskedNode) else sharding,
                shapes.opt_state,
                params,
                transform_non_params=lambda _: everywhere,
                is_leaf=lambda x: isinstance(x, optax.MaskedNode),
            ),
            ema=params if keep_ema else None,
            teacher=twin_params(params) if keep_teacher else None,
        )
        self.abstract: TrainState = jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(
                shape.shape, shape.dtype, sharding=sharding
            ),
            shapes,
            self.shardings,
        )
        self._create = create
        self._begun: Future[jax.stages.Compiled] | None = None

    def begin(self) -> None:
        """Begins to compile what makes a fresh state, on a thread, for `create` later."""
        # Processes of one program must compile in one order.
        if self._begun is None and jax.process_count() == 1:
            lowered = jax.jit(self._create, out_shardings=self.shardings).lower()
            pool = ThreadPoolExecutor(1, "initial_state")
            self._begun = pool.submit(lowered.compile)
            pool.shutdown(wait=False)

    def create(self, params: Params | None = None) -> TrainState:
        """Returns the initial state, each shard made where it belongs.

        Args:
          params: to start from, on their devices, which are consumed; None: fresh ones.
        """
        begun, self._begun = self._begun, None
        if params is None and begun is not None:
            return begun.result()()
        if params is None:
            return jax.jit(self._create, out_shardings=self.shardings)()
        return jax.jit(self._create, out_shardings=self.shardings, donate_argnums=0)(params)


def make_state_factory(
    experiment: ExperimentConfig, mesh: jax.sharding.Mesh, optimizer: optax.GradientTransformation
) -> StateFactory:
    """Returns the shapes and shardings of the experiment's state, and how to make it."""
    return StateFactory(
        lambda key: init_params(experiment.model, key),
        partition_specs(experiment.model),
        optimizer,
        mesh,
        experiment.training.seed,
        keep_ema=experiment.optimizer.ema_decay > 0,
        keep_teacher=experiment.teaching.distill > 0 and not experiment.teaching.frozen,
    )
