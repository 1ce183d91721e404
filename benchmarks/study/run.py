"""`python -m benchmarks.study run`: trains, measures, writes a line a run."""

import contextlib
import dataclasses
import functools
import itertools
import json
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax

from benchmarks.study import attention_speed, data, measures, train
from benchmarks.study.ledger import Ledger, short_name
from benchmarks.study.programs import Compiler, Programs, program_key
from benchmarks.study.settings import Spec, experiment_of
from benchmarks.study.turns import turn
from lazyattn import sharding
from lazyattn.checkpoint.state import TrainState
from lazyattn.errors import InputError, require
from lazyattn.experiment import ExperimentConfig
from lazyattn.sharding import MeshConfig

# Seconds kept for the end: a checkpoint and an orderly exit; and what measuring is taken to
# need before one has been timed.
_RESERVE, _MEASURING = 15.0, 30.0
# A run isn't begun for less than this.
_WORTHWHILE = 45.0
TOKENIZER = "tokenizer.json"
_TIMED_STEPS, _TIMED_ROUNDS = 8, 4


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
      data: folder of the tokens.
      variants, seeds, learning_rates, log_slope_factors: every combination is a run.
      tokens: of a run.
      output: file of the lines.
      length, batch: of the rows.
      overrides: further settings.
      workdir: for checkpoints and claims; None: a run that is cut begins anew.
      cache: folder of JAX's compilation cache.
      deadline: seconds of the process; nothing runs beyond.
      measure: "all", or "loss" for validation loss and time alone.
      cudnn: time the variant `softmax` with cuDNN too.
      commit: of the code.
      keep: keep each run's folder, as a folder that `train.py`'s other modes read.
      turn: file of a lock; of the processes that name it one trains, while others compile.
      time_attention: time attention alone on the trained model's own queries and keys.
      first: "variants": a seed of all variants before the next seed; "seeds": all seeds of a
        variant before the next variant, so that less is compiled while others train.
      elapsed: seconds since the process began.
      checkpoint_every: steps between checkpoints.
    """

    data: str
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    tokens: int
    output: Path
    log_slope_factors: tuple[float | None, ...] = (None,)
    length: int = 4096
    batch: int = 16
    overrides: tuple[tuple[str, str], ...] = ()
    workdir: Path | None = None
    cache: Path | None = None
    deadline: float | None = None
    measure: str = "all"
    cudnn: bool = False
    commit: str | None = None
    keep: bool = False
    turn: Path | None = None
    time_attention: bool = False
    first: str = "variants"
    elapsed: Callable[[], float] = time.monotonic
    checkpoint_every: int = train.CHECKPOINT_EVERY

    def specs(self) -> list[Spec]:
        """Returns the runs in their order."""
        found = [
            Spec(variant, seed, self.tokens, rate, factor, self.batch, self.length, self.overrides)
            for seed, rate, factor, variant in itertools.product(
                self.seeds, self.learning_rates, self.log_slope_factors, self.variants
            )
        ]
        if self.first == "seeds":
            found.sort(key=lambda spec: self.variants.index(spec.variant))
        return found


def run(options: Options, kind: "type[Study] | None" = None) -> int:
    """Makes the runs that aren't finished; returns how many lines were written.

    Args:
      options: what to do.
      kind: of study; None: the plain one.

    Raises:
      InputError: for anything wrong with the options, before anything is trained.
    """
    if options.keep:
        require(options.workdir is not None, "--keep", True, "given with --workdir")
        where = Path(options.data).expanduser()
        require((where / TOKENIZER).exists(), "--data", options.data, f"a folder with {TOKENIZER}")
    specs = options.specs()
    experiments = {spec.identity: experiment_of(spec) for spec in specs}
    claims = None if options.workdir is None else options.workdir / "claims"
    ledger = Ledger(options.output, claims)
    ledger.finished()
    set_cache(options.cache)
    study = (kind or Study)(options, ledger, experiments)
    before = len(ledger.finished() & set(experiments))
    text = f"{study.tokens.train.size:,} tokens of text"
    say(f"{len(specs)} runs, {before} of them finished before; {study.device}, {text}")
    written, tried = 0, set[str]()
    try:
        # In the second round also what another process has only prepared for.
        for steal in (False, True):
            for number, spec in enumerate(specs):
                known = spec.identity in tried or spec.identity in ledger.finished()
                if study.stopped or known:
                    continue
                if study.too_late(spec):
                    tried.add(spec.identity)
                    say(f"{spec.label}: not begun, the deadline is too near")
                    continue
                if ledger.claim(spec.identity, steal=steal):
                    tried.add(spec.identity)
                    rest = specs[number + 1 :]
                    written += study.make(spec, functools.partial(_next, rest, ledger))
    finally:
        study.close()
    say(f"{written} lines written, {len(ledger.finished())} in {options.output}")
    return written


def _next(specs: Sequence[Spec], ledger: Ledger) -> Spec | None:
    done = ledger.finished()
    free = (s for s in specs if s.identity not in done)
    return next((s for s in free if ledger.claim(s.identity, ahead=True)), None)


def set_cache(folder: Path | None) -> None:
    """Has JAX keep what it compiles, and XLA what it found by trying."""
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def one_device() -> jax.sharding.Mesh:
    """Returns the mesh of the study.

    Raises:
      InputError: where JAX sees several GPUs.
    """
    require(
        jax.default_backend() != "gpu" or jax.device_count() == 1,
        "the number of GPUs",
        jax.device_count(),
        "1: set CUDA_VISIBLE_DEVICES, and start a process for each",
    )
    return sharding.make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])


class Study:
    """What the runs of one process share.

    Attributes:
      tokens: the text.
      device: its name.
      stopped: whether the deadline has cut a run.
    """

    def __init__(self, options: Options, ledger: Ledger, experiments: dict[str, ExperimentConfig]):
        """Reads the text and brings it to the device.

        Raises:
          InputError: if the text doesn't fit the models.
        """
        self._options, self._ledger, self._experiments = options, ledger, experiments
        self.tokens = data.read(options.data)
        for experiment in experiments.values():
            require(
                self.tokens.vocab_size <= experiment.model.vocab_size,
                "model.vocab_size",
                experiment.model.vocab_size,
                f"at least {self.tokens.vocab_size}, the text's",
            )
            train.order_of(self.tokens, experiment)
            break
        for name, text in self.tokens.validation.items():
            require(
                text.size > options.length,
                "--length",
                options.length,
                f"below {text.size}, the tokens of {name}'s validation text",
            )
        self._mesh = one_device()
        self.device = jax.devices()[0].device_kind
        self._compiler = Compiler()
        self._made: dict[str, Future[Programs]] = {}
        self._stream: jax.Array | None = None
        self._found = measures.material(self.tokens, options.length, options.data)
        self._measuring = _MEASURING
        self._ms: dict[str, float] = {}
        self.stopped = False

    def close(self) -> None:
        """Gives up compiling ahead."""
        self._compiler.close()

    @property
    def _remaining(self) -> float:
        deadline = self._options.deadline
        return float("inf") if deadline is None else deadline - self._options.elapsed()

    def too_late(self, spec: Spec) -> bool:
        """Returns whether a run should not be begun any more."""
        if self._options.workdir is not None:
            return self._remaining < _WORTHWHILE + _RESERVE
        ms = self._ms.get(spec.variant, max(self._ms.values(), default=0.0))
        return self._remaining < spec.steps * ms / 1000 + self._measuring

    def programs(self, spec: Spec) -> Future[Programs]:
        """Returns the programs of a run, all of them asked for in the background."""
        experiment = self._experiments[spec.identity]
        key = program_key(experiment)
        if key not in self._made:
            everything = self._options.measure == "all"

            def make() -> Programs:
                programs = Programs(
                    self._compiler,
                    experiment,
                    eos=self.tokens.eos,
                    tokens=self.tokens.train.size,
                    mesh=self._mesh,
                )
                for ask in (programs.create, programs.cut, programs.step):
                    ask()
                measures.prepare(programs, self._found, everything)
                if self._by_cudnn(spec):
                    programs.step(cudnn=True)
                return programs

            self._made[key] = self._compiler.background(make)
        return self._made[key]

    def _by_cudnn(self, spec: Spec) -> bool:
        return self._options.cudnn and spec.variant == "softmax"

    def make(self, spec: Spec, following: Callable[[], Spec | None]) -> int:
        """Makes one run; returns how many lines it wrote.

        Args:
          spec: the run.
          following: says which will be next, to compile for it.
        """
        say(f"{spec.label}: begins at {self._options.elapsed():.0f} s")
        workdir = self._options.workdir
        folder = None if workdir is None else workdir / short_name(spec.identity)
        line = self._head(spec)
        try:
            line |= self._line(spec, folder, following)
        except train.Cut as cut:
            say(f"{spec.label}: cut {cut}, for the deadline")
            self.stopped = True
            return 0
        except InputError:
            raise
        except Exception as error:  # A line that says so is worth more than none.
            text = (str(error).splitlines() or [""])[0][:300]
            known = isinstance(error, train.NonFiniteError)
            line["error"] = text if known else f"{type(error).__name__}: {text}"
            say(f"{spec.label}: {line['error']}\n{traceback.format_exc()}")
        self._ledger.append(line)
        if folder is not None and not self._options.keep:
            shutil.rmtree(folder, ignore_errors=True)
        return 1

    def _head(self, spec: Spec) -> dict[str, Any]:
        experiment = self._experiments[spec.identity]
        return {
            "id": spec.identity,
            "variant": spec.variant,
            "seed": spec.seed,
            "tokens": spec.tokens,
            "learning_rate": spec.learning_rate,
            "log_slope_factor": spec.log_slope_factor,
            "device": self.device,
            "commit": self._options.commit or commit(),
            "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
            "jax": jax.__version__,
            "measure": self._options.measure,
            "text": {
                "tokens": int(self.tokens.train.size),
                "checksum": f"{self.tokens.checksum:08x}",
                "validation": {name: int(x.size) for name, x in self.tokens.validation.items()},
            },
            "settings": json.loads(json.dumps(experiment.to_dict())),
        }

    def _line(
        self, spec: Spec, folder: Path | None, following: Callable[[], Spec | None]
    ) -> dict[str, Any]:
        options, experiment = self._options, self._experiments[spec.identity]
        began = time.perf_counter()
        programs = self.programs(spec).result()
        order = self._order(experiment)
        if self._stream is None:
            self._stream = programs.put(self.tokens.train)
        course = train.Course(self._stream, programs.put(order.starts), self._found)
        ready = [ask().result() for ask in (programs.create, programs.cut, programs.step)]
        waited = time.perf_counter() - began
        with self._turn(spec):
            # Who takes turns leaves compiling to those who wait.
            ahead = following() if options.turn is None else None
            if ahead is not None:
                self.programs(ahead)
            line = self._train_and_measure(spec, folder, programs, course, experiment)
        return line | {
            "epochs": round(order.epochs, 4),
            "seconds_compile": sum(program.seconds for program in ready),
            "seconds_waited": waited,
            "bytes_step": ready[-1].bytes,
        }

    @contextlib.contextmanager
    def _turn(self, spec: Spec) -> Iterator[None]:
        """Has the device for itself among the processes that take turns.

        Raises:
          train.Cut: the deadline is too near.
        """
        if self._options.turn is None:
            yield
            return
        with turn(self._options.turn, lambda: self.too_late(spec)) as mine:
            if not mine:
                raise train.Cut("before its turn came")
            say(f"{spec.label}: its turn at {self._options.elapsed():.0f} s")
            yield

    def _order(self, experiment: ExperimentConfig) -> data.Order:
        return train.order_of(self.tokens, experiment)

    def _start(
        self, spec: Spec, programs: Programs, line: dict[str, Any]
    ) -> Callable[[TrainState], TrainState]:
        """Returns what makes a run's first state of a fresh one; it may add to the line."""
        del spec, programs, line
        return lambda state: state

    def _train_and_measure(
        self,
        spec: Spec,
        folder: Path | None,
        programs: Programs,
        course: train.Course,
        experiment: ExperimentConfig,
    ) -> dict[str, Any]:
        options = self._options
        everything = options.measure == "all"
        first: dict[str, Any] = {}
        state, history = train.train(
            programs,
            experiment,
            course,
            workdir=folder,
            looks=everything,
            stop=self._stop,
            every=options.checkpoint_every,
            said=lambda text: say(f"{spec.label}: {text}"),
            start=self._start(spec, programs, first),
        )
        if folder is not None and self._remaining < self._measuring:
            train.save(folder, experiment, state, history)
            raise train.Cut(f"at step {spec.steps} of {spec.steps}, to be measured")
        if options.keep and folder is not None:
            train.save(folder, experiment, state, history)
            shutil.copy(Path(options.data).expanduser() / TOKENIZER, folder / TOKENIZER)
        began = time.perf_counter()
        line = first | {
            "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
            "curve": history.curve,
            "visited_in_training": history.visited,
            **measures.measure(programs, state.params, self._found, everything),
        }
        measured = time.perf_counter() - began
        if options.time_attention and attention_speed.times_alone(experiment.model):
            line["attention_ms"] = self._attention_times(experiment, state.params)
        line |= self._times(spec, programs, course, state)
        self._measuring = time.perf_counter() - began + 2
        self._ms[spec.variant] = line["ms_per_step"]
        stats = jax.devices()[0].memory_stats() or {}
        line |= {
            "seconds_train": history.seconds,
            "seconds_measure": measured,
            "bytes_peak": stats.get("peak_bytes_in_use"),
        }
        say(
            f"{spec.label}: val {line['val']:.4f}, {line['ms_per_step']:.1f} ms a step,"
            f" measured in {measured:.1f} s"
        )
        return line

    def _attention_times(self, experiment: ExperimentConfig, params: Any) -> dict[str, Any]:
        with self._compiler.quiet(), jax.set_mesh(self._mesh):
            return {
                "x".join(map(str, rows.shape)): attention_speed.times(
                    params, rows, config=experiment.model
                )
                for rows in self._found.looked.values()
            }

    def _stop(self, step: int, seconds: float) -> bool:
        # The steps up to the next point of the curve come before the next question.
        del step
        points = 2 * max(1.0, seconds * self._options.tokens / self._step_tokens / train.POINTS)
        return self._options.workdir is not None and self._remaining < _RESERVE + points

    @property
    def _step_tokens(self) -> int:
        return self._options.batch * self._options.length

    def _times(
        self, spec: Spec, programs: Programs, course: train.Course, state: Any
    ) -> dict[str, Any]:
        """Returns the milliseconds of a step of trained weights; consumes the state."""
        kinds = {"ours": False} | ({"cudnn": True} if self._by_cudnn(spec) else {})
        for cudnn in kinds.values():
            programs.step(cudnn).result()
        found = {}
        with self._compiler.quiet():
            for name, cudnn in kinds.items():
                found[name], state = train.time_steps(
                    *(programs, course, state),
                    cudnn=cudnn,
                    steps=_TIMED_STEPS,
                    rounds=_TIMED_ROUNDS,
                )
        best = min(found, key=lambda name: found[name])
        line: dict[str, Any] = {"ms_per_step": found[best], "attention_by": best}
        return line | {f"ms_per_step_{name}": value for name, value in found.items()}


def commit() -> str:
    """Returns the commit of the working tree, or "unknown"."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def say(text: str) -> None:
    """Prints a line at once."""
    print(text, file=sys.stderr, flush=True)
