"""Compiled programs of a run, made ahead of time in the background and shared between seeds."""

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import softmax_by_jax
from benchmarks.study import data, look, optimizer, scorer
from lazyattn import sharding
from lazyattn.checkpoint.state import StateFactory, TrainState
from lazyattn.experiment import ExperimentConfig
from lazyattn.inspect.sequences import LENGTH as SINK_LENGTH
from lazyattn.model.objective import make_loss_fn
from lazyattn.model.parameters import init_params, partition_specs
from lazyattn.training.optimizer import make_schedule
from lazyattn.training.step import make_train_step
from lazyattn.training.teaching import with_ramps

SINK_SEQUENCES = 100


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program and what it took to make it.

    Attributes:
      run: the program.
      seconds: tracing and compiling.
      bytes: of arguments and temporaries, as the compiler says; 0: it doesn't.
    """

    run: Callable[..., Any]
    seconds: float
    bytes: int


def program_key(experiment: ExperimentConfig) -> str:
    """Names the settings that compiled programs depend on."""
    training = dataclasses.replace(experiment.training, seed=0)
    peak = optimizer.with_peak_of_one(experiment.optimizer)
    settings = dataclasses.replace(experiment, training=training, optimizer=peak).to_dict()
    return json.dumps(settings, sort_keys=True)


class Compiler:
    """Compiles in a thread of its own, one program after the other, each once."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="compile")
        self._lock, self._asking = threading.Lock(), threading.Lock()
        self._futures: dict[str, Future[Program]] = {}

    def submit(self, key: str, make: Callable[[], Any]) -> Future[Program]:
        """Returns the program of a key, on its way; `make` returns it compiled."""
        with self._asking:
            if key not in self._futures:
                self._futures[key] = self._pool.submit(self._compile, make)
            return self._futures[key]

    def background(self, function: Callable[[], Any]) -> Future[Any]:
        """Calls a function in that thread, before what is asked for later."""
        return self._pool.submit(function)

    def _compile(self, make: Callable[[], Any]) -> Program:
        with self._lock:
            start = time.perf_counter()
            compiled = make()
            seconds = time.perf_counter() - start
        memory = compiled.memory_analysis()
        size = 0
        if memory is not None:
            size = memory.argument_size_in_bytes + memory.temp_size_in_bytes
            size += memory.output_size_in_bytes - memory.alias_size_in_bytes
        return Program(compiled, seconds, size)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Within it nothing is compiled, so that times can be taken."""
        with self._lock:
            yield

    def close(self) -> None:
        """Gives up what has not been begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Programs:
    """The programs of one kind of run, whatever its seed and its learning rate.

    Attributes:
      experiment: the settings.
      factory: knows the state's shapes and shardings.
    """

    def __init__(
        self,
        compiler: Compiler,
        experiment: ExperimentConfig,
        *,
        eos: int,
        tokens: int,
        mesh: jax.sharding.Mesh,
    ):
        """Compiles nothing yet.

        Args:
          compiler: makes the programs.
          experiment: the settings.
          eos: ends a document.
          tokens: of the text that is trained on.
          mesh: of one device.
        """
        self.experiment = experiment
        self._compiler, self._mesh = compiler, mesh
        self._eos, self._tokens = eos, tokens
        model = experiment.model
        # Parameters are made by running the model on one token, which needs no kernel.
        attention = dataclasses.replace(model.attention, implementation="xla_chunked")
        self._initial = dataclasses.replace(model, attention=attention)
        self._optimizer = with_ramps(
            optimizer.peak_in_state(experiment.optimizer, experiment.training.steps),
            model.attention,
            experiment.teaching,
        )
        self._specs = partition_specs(self._initial)
        self.factory = self._factory(experiment.training.seed)
        self._all = program_key(experiment)
        self._model = json.dumps(dataclasses.asdict(model), sort_keys=True)

    def _factory(self, seed: Any) -> StateFactory:
        return StateFactory(
            lambda key: init_params(self._initial, key),
            self._specs,
            self._optimizer,
            self._mesh,
            seed,
        )

    def create(self) -> Future[Program]:
        """Seed (int32), learning rate -> the initial state, as `StateFactory.create` makes it."""

        def make() -> Any:
            def create(seed: Any, peak: Any) -> TrainState:
                return optimizer.set_peak(self._factory(seed).create(), peak)

            jitted = jax.jit(create, out_shardings=self.factory.shardings)
            scalars = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.int32, jnp.float32))
            with jax.set_mesh(self._mesh):
                return jitted.lower(*scalars).compile()

        return self._compiler.submit(f"create {self._all}", make)

    def cut(self) -> Future[Program]:
        """Stream, starts, step (int32) -> the step's batch."""
        experiment = self.experiment
        batch, length = experiment.data.batch_size, experiment.data.sequence_length

        def make() -> Any:
            rows = jax.sharding.NamedSharding(self._mesh, sharding.spec("batch", "length"))
            jitted = jax.jit(
                lambda stream, starts, step: data.cut(
                    stream, starts, step, length=length, eos=self._eos
                ),
                out_shardings=rows,
            )
            return jitted.lower(
                self._array((self._tokens,), jnp.uint16),
                self._array((experiment.training.steps, batch), jnp.int32),
                jax.ShapeDtypeStruct((), jnp.int32),
            ).compile()

        key = f"cut {experiment.training.steps} {batch} {length} {self._tokens} {self._eos}"
        return self._compiler.submit(key, make)

    def step(self, cudnn: bool = False) -> Future[Program]:
        """State, batch -> state, metrics: the trainer's step.

        Args:
          cudnn: with attention by cuDNN (`softmax_by_jax`), which sees whole rows.
        """
        experiment = self.experiment

        def make() -> Any:
            training = experiment.training
            step = make_train_step(
                make_loss_fn(experiment.model, training.z_loss, quantization=training.quantization),
                self._optimizer,
                make_schedule(optimizer.with_peak_of_one(experiment.optimizer), training.steps),
                mesh=self._mesh,
                shardings=self.factory.shardings,
                microbatches=training.microbatches,
            )
            shape = experiment.data.batch_size, experiment.data.sequence_length
            rows = jax.sharding.NamedSharding(self._mesh, sharding.spec("batch", "length"))
            one: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
            batch = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), one)
            attention = softmax_by_jax.instead_of_ours() if cudnn else contextlib.nullcontext()
            with attention:
                return step.lower(self.factory.abstract, batch).compile()

        return self._compiler.submit(f"step {cudnn} {self._all}", make)

    def score(self, length: int) -> Future[Program]:
        """Parameters, rows of `length` + 1 tokens -> as `scorer.score`."""

        def make() -> Any:
            jitted = jax.jit(
                lambda params, tokens: scorer.score(
                    params, tokens, config=self.experiment.model, eos=self._eos
                )
            )
            rows = self._array((scorer.rows(length), length + 1), jnp.int32)
            with jax.set_mesh(self._mesh):
                return jitted.lower(self.factory.abstract.params, rows).compile()

        return self._compiler.submit(f"score {length} {self._eos} {self._model}", make)

    def look(self, rows: int, length: int) -> Future[Program]:
        """Parameters, rows -> as `look.look`."""

        def make() -> Any:
            jitted = jax.jit(
                lambda params, inputs: look.look(params, inputs, config=self.experiment.model)
            )
            with jax.set_mesh(self._mesh):
                return jitted.lower(
                    self.factory.abstract.params, self._array((rows, length), jnp.int32)
                ).compile()

        return self._compiler.submit(f"look {rows} {length} {self._model}", make)

    def sink(self) -> Future[Program]:
        """`look` at the short sequences of the sink metric."""
        return self.look(SINK_SEQUENCES, SINK_LENGTH)

    def _array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        everywhere = jax.sharding.NamedSharding(self._mesh, sharding.spec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    def put(self, array: np.ndarray) -> jax.Array:
        """Returns an array on the device."""
        return jax.device_put(array, jax.sharding.NamedSharding(self._mesh, sharding.spec()))
