"""Times decoding: the attention of one token alone, and a whole token, beside the limit of bytes.

    python -m benchmarks.decode --output=benchmarks/results/h200_decode.jsonl

The shape is that of the 340M model: 24 layers, 16 heads of 64, bfloat16. Cases are

  softmax-full   plain softmax, every key held and read
  lazy-full      Elastic-Softmax with ALiBi's slopes, every key held; pages that cannot matter
                 are not read, nor are values without a weight
  lazy-spans     the same with the rings that each head's span asks for
  trained-full, trained-spans   the same with the slopes and offsets of a trained model
  cudnn          plain softmax by jax.nn.dot_product_attention with lengths
  torch          plain softmax by torch's scaled_dot_product_attention, where torch is installed
  pallas         plain softmax by jax.experimental.pallas.ops.gpu.decode_attention, which comes with
                 jax; a head's keys side by side
  today          Elastic-Softmax by lazy_attention with query_start, what decoding was before

Queries and keys are random, of the norm that `qk_norm` gives them at initialization. Every row
is as long as the context. Attention is timed over a few layers in turn, as many as there are in
all, each of the few with a cache of its own, so that none stays in the chip's cache; tokens follow
each other on the device (torch's as a CUDA graph), since the host takes longer to start short
kernels than they run. A call of a compiled loop takes milliseconds before its first kernel, so that
few tokens a call say too much.
--profile=FILE also gets a line of JSON of each of our timings: kernels a token, their times, and
the gaps between them; the attention of a token, then the whole token.
`bytes` is what a token must read: weights (for the whole token), keys of pages that are read, and
values of pages with a weight, counted on the inputs themselves. `limit_ms` is the time of that many
bytes at the rate of a copy in the same run.

The plan (`plan.py`) goes from what matters most to what matters least, in waves: all of a wave is
compiled at once, then timed. After --seconds nothing more begins and the program ends, whatever
is still being compiled. The file is written anew after each case, so that a run that is
cut short keeps what it has; what could not be timed has an `error`. --points and --cases choose
some of it: `--points=32768x16,4096x8` takes these alone, whole tokens too; points with a plus
between them, `4096x8+4096x64`, are compiled together.

Trained slopes come from --slopes: lines of the study (of --variant), or an npz file with
`slopes` and `offsets` [layers, heads], perhaps `score_bound` [layers]. The 24 layers are
--trained_layers of the file's, evenly taken, in turn; so are the heads. Lines of the study have
no bound of the scores: spans are those of norms' scales of 1.
"""

import concurrent.futures
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import timing
from benchmarks.decode import heads as heads_lib
from benchmarks.decode import token
from benchmarks.decode.attention import Attention
from benchmarks.decode.heads import Heads, Shape
from benchmarks.decode.plan import CASES, Line, Point, Wave, chosen
from lazyattn import paths
from lazyattn.errors import InputError, require

_POINTS = flags.DEFINE_list("points", [], "Contexts x batches; none: those of the plan.")
_CASES = flags.DEFINE_list("cases", [], "Of " + ", ".join(CASES) + "; none: those of the plan.")
_SLOPES = paths.define("slopes", "benchmarks/results/study.jsonl", "Of a trained model.")
_VARIANT = flags.DEFINE_string("variant", "sharp_qk_norm_steady", "Of the study's lines.")
_TRAINED_LAYERS = flags.DEFINE_integer("trained_layers", 4, "Layers of the trained model.")
_JOBS = flags.DEFINE_integer("jobs", 8, "Programs compiled at once.")
_HEADS = flags.DEFINE_integer("heads", 16, "Query heads.")
_KV_HEADS = flags.DEFINE_integer("kv_heads", 16, "Key/value heads.")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "Numbers of a head.")
_LAYERS = flags.DEFINE_integer("layers", 24, "Layers of the model.")
_OFFSET = flags.DEFINE_float("offset", -0.5, "tau of an initialized model.")
_WIDTH = flags.DEFINE_integer("width", 1024, "Bias table.")
_SECONDS = flags.DEFINE_float("seconds", 190.0, "Begin nothing and end after so many.")
_CALLS = flags.DEFINE_integer("calls", 50, "Tokens in a row.")
_ROUNDS = flags.DEFINE_integer("rounds", 4, "Times each is timed; the median counts.")
_PROFILE = paths.define("profile", None, "File for lines with the time of each kernel.")
_OUTPUT = paths.define("output", "benchmarks/results/decode.jsonl", "File that lines are added to.")


class Results:
    """The lines of a run; the file has them all at any time, after those of other runs."""

    def __init__(self, path: pathlib.Path, about: dict[str, Any]):
        self._path, self._about = path, about
        path.parent.mkdir(parents=True, exist_ok=True)
        self._before = path.read_text() if path.exists() else ""
        self.lines: list[Line] = []

    def add(self, line: Line) -> Line:
        """Returns a line that is written from the next `save` on."""
        for name, x in self._about.items():
            setattr(line, name, x)
        self.lines.append(line)
        return line

    def save(self, line: Line) -> None:
        """Writes the file and prints a line of it."""
        text = "".join(json.dumps(dataclasses.asdict(x)) + "\n" for x in self.lines)
        new = self._path.with_suffix(".new")
        new.write_text(self._before + text)
        new.replace(self._path)
        print(line, flush=True)


def attempt(line: Line, work: Callable[[], Any]) -> None:
    """Does some work on a line; what goes wrong is noted there."""
    try:
        work()
    except Exception as error:
        if not isinstance(error, MemoryError | ImportError):
            traceback.print_exc(limit=-3)
        line.error = f"{type(error).__name__}: {str(error)[:300]}"


class Run:
    """A run over the plan."""

    def __init__(self, shape: Shape, trained: Heads | None, results: Results, rate: float):
        self.began = time.monotonic()
        self.shape, self.trained, self.results, self.rate = shape, trained, results, rate
        self.pool = concurrent.futures.ThreadPoolExecutor(_JOBS.value)
        # One process holds one model of each at most.
        self._compiled: dict[int, Any] = {}

    @property
    def left(self) -> float:
        """Returns how many seconds there are."""
        return _SECONDS.value - (time.monotonic() - self.began)

    def heads(self, case: str) -> Heads:
        """Returns what the heads of a case have learned."""
        if case.startswith("trained"):
            assert self.trained is not None
            return self.trained
        lazy = CASES[case][0] == "lazy"
        return heads_lib.alibi(self.shape) if lazy else heads_lib.softmax(self.shape)

    def attention(self, case: str, point: Point) -> Attention:
        """Returns a case at a point, with a line that is not among the results yet."""
        attention, cache, implementation = CASES[case]
        heads = self.heads(case)
        plan = heads.plan(cache, point.context)
        batch = point.batch
        if batch is None:
            weights = token.weight_bytes(token.shapes(heads))
            batch = token.free_bytes(weights) // plan.row_bytes
        line = Line(implementation, attention, cache, heads.name, point.context, batch)
        job = Attention(line, heads, plan, calls=_CALLS.value)
        line.cache_bytes_share = job.held / job.whole
        line.score_bound = heads.score_bound if cache == "spans" else None
        return job

    def wave(self, wave: Wave) -> None:
        """Compiles and times a wave."""
        jobs: list[tuple[Attention, token.Token | None]] = []
        for point in wave.points:
            for case in wave.cases:
                if case.startswith("trained") and self.trained is None:
                    continue
                job = self.attention(case, point)
                self.results.add(job.line)
                whole = None
                if case in wave.tokens:
                    how = _CALLS.value, _ROUNDS.value
                    whole = token.Token(job.line, job.heads, job.plan, *how)
                jobs.append((job, whole))
        began = time.monotonic()
        ready = self._compile(jobs)
        names = " ".join(f"{p.context}x{p.batch or 'max'}" for p in wave.points)
        print(f"{names}: compiled in {time.monotonic() - began:.0f} s", flush=True)
        groups: dict[Any, list[tuple[Attention, token.Token | None]]] = {}
        for job, whole in jobs:
            if ready(job):
                groups.setdefault(job.same_inputs, []).append((job, whole))
            else:
                self.results.save(job.line)
        for group in groups.values():
            self._attend([job for job, _ in group])
            for job, whole in group:
                if whole is not None and ready(whole) and job.line.bytes_attention is not None:
                    if self._in_time(job.line):
                        attempt(job.line, lambda whole=whole: self._token(whole))
                    self.results.save(job.line)
                    whole.run = None

    def _compile(self, jobs: Sequence[tuple[Attention, token.Token | None]]) -> Callable[..., bool]:
        """Compiles all in time; returns a function that says what was."""
        done: dict[int, bool] = {}

        def compiled(job: Attention | token.Token) -> None:
            before = job.line.error
            attempt(job.line, job.compile)
            done[id(job)] = job.line.error == before

        every = [x for x in (*(w for _, w in jobs), *(job for job, _ in jobs)) if x is not None]
        futures = [self.pool.submit(compiled, job) for job in every]
        heads = {id(w.heads): w.heads for _, w in jobs if w is not None}
        futures += [self.pool.submit(token.model, x) for x in heads.values()]
        # What is compiled by then is still timed.
        until = self.left - 0.1 * _SECONDS.value
        concurrent.futures.wait(futures, timeout=max(0.0, until))
        for future in futures:
            future.cancel()
        for job in every:
            if id(job) not in done and not job.line.error:
                job.line.error = f"not compiled in {_SECONDS.value:.0f} s"
        return lambda job: done.get(id(job), False)

    def _attend(self, jobs: list[Attention]) -> None:
        """Times attention of cases with the same inputs."""
        layers: list[Any] = []
        limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 2**36)
        for job in jobs:
            if job.timed_bytes > 0.8 * limit:
                job.line.error = f"{job.number} layers take {job.timed_bytes / 1e9:.0f} GB"
            elif self._in_time(job.line):
                attempt(job.line, lambda job=job: self._one(job, layers))
            self.results.save(job.line)
            job.run, job.read = None, []

    def _one(self, job: Attention, layers: list[Any]) -> None:
        if not layers:
            layers += job.inputs()
        job.measure(layers, self.rate, _ROUNDS.value)
        if job.line.implementation == "lazyattn":
            self._profile(job.line, job.calls, job.callable(layers))

    def _profile(self, line: Line, calls: int, run: Callable[[], Any]) -> None:
        """Notes where the time of tokens went, if it was asked for."""
        if not _PROFILE.value:
            return
        about = {k: getattr(line, k) for k in ("attention", "cache", "slopes", "context", "batch")}
        about |= timing.breakdown(timing.timeline(run), calls)
        with open(_PROFILE.value, "a") as file:
            file.write(json.dumps(about) + "\n")
        kernels = list(about["kernels"].items())[:8]
        text = ", ".join(f"{name} {runs:g} x {ms:.3f}" for name, (runs, ms) in kernels)
        gaps = f"{about['runs']:g} kernels {about['busy_ms']} ms, gaps {about['gap_ms']}"
        print(f"  {gaps}: {text}", flush=True)

    def _token(self, whole: token.Token) -> None:
        several = whole.measure(self.rate)
        self._profile(whole.line, whole.calls, several)

    def _in_time(self, line: Line) -> bool:
        if self.left > 0:
            return True
        line.error = line.error or f"not begun after {_SECONDS.value:.0f} s"
        return False


def copy_rate() -> float:
    """Returns bytes read and written a second by a copy."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 2**29)
    size = min(2**31, limit // 8)
    x = jnp.zeros(size // 4, jnp.int32)
    copy = jax.jit(lambda x: x + 1).lower(x).compile()
    return 2 * x.nbytes / (1e-3 * timing.milliseconds(lambda: copy(x), calls=20))


def _commit() -> str:
    here = pathlib.Path(__file__).parent
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()


def _trained(shape: Shape, waves: Sequence[Wave]) -> Heads | None:
    """Returns the trained heads, where a case asks for them and there is a file."""
    if not any(case.startswith("trained") for wave in waves for case in wave.cases):
        return None
    path = pathlib.Path(_SLOPES.value)
    require(path.is_file(), "--slopes", str(path), "a file with a trained model's slopes")
    return heads_lib.trained(path, _VARIANT.value, shape, _TRAINED_LAYERS.value)


def main(argv: list[str]) -> None:
    """Times everything, and writes each line when it is known."""
    del argv
    # A cache of 103 GB is timed; JAX would take three quarters of the memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    shape = Shape(
        _LAYERS.value,
        _HEADS.value,
        _KV_HEADS.value,
        _HEAD_DIM.value,
        _WIDTH.value,
        _OFFSET.value,
    )
    try:
        waves = chosen(_POINTS.value, _CASES.value)
        trained = _trained(shape, waves)
    except InputError as error:
        sys.exit(str(error))
    rate = copy_rate()
    about = {
        "copy_gb_s": round(rate / 1e9, 1),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "jax_triton": importlib.metadata.version("jax-triton"),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }
    print(f"{about['device']}, a copy: {rate / 1e9:.0f} GB/s", flush=True)
    run = Run(shape, trained, Results(pathlib.Path(_OUTPUT.value), about), rate)
    for wave in waves:
        if run.left <= 0:
            print(f"ended after {_SECONDS.value:.0f} s", flush=True)
            break
        try:
            run.wave(wave)
        except Exception:
            traceback.print_exc()
    sys.stdout.flush()
    # A program that is still being compiled would be waited for.
    os._exit(0)


if __name__ == "__main__":
    app.run(main)
