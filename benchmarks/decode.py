"""Times decoding: the attention of one token alone, and a whole token, beside the limit of bytes.

    python -m benchmarks.decode --output=benchmarks/results/h200_decode.jsonl

The shape is that of the 340M model: 24 layers, 16 heads of 64, bfloat16. Cases are

  softmax-full   plain softmax, every key held and read
  lazy-full      Elastic-Softmax with ALiBi's slopes, every key held; pages that cannot matter
                 are not read, nor are values without a weight
  lazy-spans     the same with the rings that each head's span asks for
  cudnn          plain softmax by jax.nn.dot_product_attention with lengths
  torch          plain softmax by torch's scaled_dot_product_attention, where torch is installed
  today          Elastic-Softmax by lazy_attention with query_start, what decoding was before

Queries and keys are random, of the norm that `qk_norm` gives them at initialization. Every row
is as long as the context. Attention is timed over a few layers, each with a cache of its own, so
that none stays in the chip's cache, and given for all 24. `bytes` is what a token must read:
weights (for the whole token), keys of pages that are read, and values of pages with a weight,
counted on the inputs themselves. `limit_ms` is the time of that many bytes at the rate of a copy
in the same run. One line of JSON a case is added to the file; --contexts, --batches, --tokens,
--cases and --seconds choose how much is done, and what doesn't fit in memory or time is left out
and said. Compiling takes most of the time, and does not stop at --seconds.
"""

import concurrent.futures
import dataclasses
import datetime
import functools
import json
import math
import pathlib
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import Array, Float

from benchmarks import timing
from lazyattn import decode_attention, lazy_attention, paths
from lazyattn.decode_attention import PAGE
from lazyattn.errors import require
from lazyattn.generation import cache as cache_lib
from lazyattn.generation import serving, spans
from lazyattn.generation.cache import SPARE
from lazyattn.generation.prepared import prepare
from lazyattn.model.config import AttentionConfig, ModelConfig
from lazyattn.model.parameters import init_params
from pallas_kernels.decode import pages, xla
from pallas_kernels.decode.types import Inputs, Settings

CASES = ("softmax-full", "lazy-full", "lazy-spans", "cudnn", "torch", "today")

_CONTEXTS = flags.DEFINE_list("contexts", ["4096", "32768"], "Keys of a row.")
_BATCHES = flags.DEFINE_list("batches", ["8", "64"], "Rows.")
_CASES = flags.DEFINE_list("cases", list(CASES[:5]), "Of " + ", ".join(CASES))
_TOKENS = flags.DEFINE_list(
    "tokens",
    ["32768x16", "4096x8"],
    "Context x batch that is timed besides, whole tokens too; each takes half a minute.",
)
_JOBS = flags.DEFINE_integer("jobs", 8, "Programs compiled at once.")
_HEADS = flags.DEFINE_integer("heads", 16, "Query heads.")
_KV_HEADS = flags.DEFINE_integer("kv_heads", 16, "Key/value heads.")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "Numbers of a head.")
_LAYERS = flags.DEFINE_integer("layers", 24, "Layers of the model.")
_OFFSET = flags.DEFINE_float("offset", -0.5, "tau of Elastic-Softmax.")
_WIDTH = flags.DEFINE_integer("width", 1024, "Bias table.")
_SECONDS = flags.DEFINE_float("seconds", 170.0, "Begin no case after so many.")
_CALLS = flags.DEFINE_integer("calls", 10, "Tokens in a row.")
_ROUNDS = flags.DEFINE_integer("rounds", 4, "Times each is timed; the median counts.")
_PROFILE = flags.DEFINE_boolean("profile", False, "Also print the time of each kernel.")
_OUTPUT = paths.define("output", "benchmarks/results/decode.jsonl", "File that lines are added to.")

SKIP_MASS = 1e-6
# Bytes that the layers timed hold together at least: far more than the chip's cache.
_ENOUGH = 2**28


@dataclasses.dataclass
class Line:
    """One line of results.

    Attributes:
      implementation: "lazyattn" or another's name.
      attention: "softmax" or "lazy".
      cache: "full" or "spans".
      slopes: "alibi", those of an initialized model; "none".
      context, batch: keys of a row, rows.
      ms_token: a whole token, milliseconds; None: not timed.
      ms_attention: attention of all layers.
      bytes: that a whole token must read.
      limit_ms: time of these at the rate of a copy.
      cache_bytes_share: what the cache holds of all keys and values.
      bytes_attention, limit_attention_ms: the same of attention alone.
      read_share: what attention must read of all keys and values.
      layers_timed: layers that attention was timed over.
      copy_gb_s: rate of the copy, bytes read and written, 1e9 a second.
      device, commit, date: of the run.
      error: why there is no time.
    """

    implementation: str
    attention: str
    cache: str
    slopes: str
    context: int
    batch: int
    ms_token: float | None = None
    ms_attention: float | None = None
    bytes: int | None = None
    limit_ms: float | None = None
    cache_bytes_share: float | None = None
    bytes_attention: int | None = None
    limit_attention_ms: float | None = None
    read_share: float | None = None
    layers_timed: int = 0
    copy_gb_s: float = 0.0
    device: str = ""
    commit: str = ""
    date: str = ""
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """Key/value heads that hold equally many keys."""

    heads: tuple[int, ...]
    slots: int


def learned(case: str) -> dict[str, Array]:
    """Returns the op's learned arguments at initialization."""
    if not case.startswith("lazy"):
        return {}
    slopes = 2.0 ** (-8 * (np.arange(_HEADS.value) + 1) / _HEADS.value)
    table = -slopes[:, None] * np.arange(_WIDTH.value)
    return {
        "distance_bias": jnp.asarray(table, jnp.float32),
        "distance_slope": jnp.asarray(slopes, jnp.float32),
        "offset": jnp.full(_HEADS.value, _OFFSET.value, jnp.float32),
    }


def groups(case: str, context: int) -> list[Group]:
    """Returns which heads hold how many keys: the spans of docs/decoding.md, in buckets."""
    every = tuple(range(_KV_HEADS.value))
    if not case.endswith("spans"):
        return [Group(every, context)]
    bound = math.sqrt(_HEAD_DIM.value) * (1 + 2.0**-8) ** 4
    slopes = np.asarray(learned(case)["distance_slope"]).reshape(_KV_HEADS.value, -1).min(axis=1)
    needed = [
        spans.span(-slope * np.arange(context), bound, SKIP_MASS / 2) + SPARE for slope in slopes
    ]
    lengths = (*spans.best_lengths(needed, context), context)
    found: dict[int, list[int]] = {}
    for head, keys in enumerate(needed):
        slots = min(length for length in lengths if length >= min(keys, context))
        found.setdefault(slots, []).append(head)
    return [Group(tuple(heads), slots) for slots, heads in found.items()]


def unit(key: Array, shape: tuple[int, ...]) -> Array:
    """Returns random numbers whose last axis has the norm that RMS normalization gives."""

    def row(key: Array) -> Array:
        x = jax.random.normal(key, shape[1:], jnp.float32)
        x *= math.sqrt(shape[-1]) / jnp.linalg.norm(x, axis=-1, keepdims=True)
        return x.astype(jnp.bfloat16)

    return jax.lax.map(row, jax.random.split(key, shape[0]))


@functools.partial(jax.jit, static_argnums=(1, 2))
def layer(
    seed: Array, parts: tuple[Group, ...], batch: int
) -> tuple[Array, list[tuple[Array, Array]]]:
    """Returns the queries, and the keys and values of each group, of one layer."""
    keys = jax.random.split(jax.random.key(seed), 2 * len(parts) + 1)
    query = unit(keys[0], (batch, 1, _HEADS.value, _HEAD_DIM.value))
    caches = []
    for n, part in enumerate(parts):
        shape = (batch, part.slots, len(part.heads), _HEAD_DIM.value)
        caches.append((unit(keys[2 * n + 1], shape), unit(keys[2 * n + 2], shape)))
    return query, caches


def taken(x: Array, part: Group, axis: int) -> Array:
    """Returns the query heads that read a group."""
    size = x.shape[axis] // _KV_HEADS.value
    index = np.arange(x.shape[axis]).reshape(-1, size)[list(part.heads)].reshape(-1)
    return jnp.take(x, index, axis=axis)


def calls(
    case: str, parts: list[Group], query: Array, caches: list[Any], lengths: Array
) -> list[dict[str, Any]]:
    """Returns the arguments of `decode_attention` for each group of one layer."""
    found = []
    for part, (key, value) in zip(parts, caches, strict=True):
        given: dict[str, Any] = {name: taken(x, part, 0) for name, x in learned(case).items()}
        if given:
            shape = (key.shape[0], key.shape[2], -(-part.slots // PAGE))
            norm = math.sqrt(_HEAD_DIM.value) * (1 + 2.0**-7)
            given["key_norms"] = jnp.full(shape, norm, jnp.float32)
        given |= {"query": taken(query, part, 2), "key_cache": key, "value_cache": value}
        found.append(given | {"lengths": lengths})
    return found


def attend(case: str, parts: list[Group], context: int, given: dict[str, Any]) -> Array:
    """Returns the attention's output."""
    each = calls(case, parts, given["query"], given["caches"], given["lengths"])
    cached = [name for name in ("key_cache", "value_cache", "key_norms") if name in each[0]]
    return decode_attention(
        given["query"],
        lengths=given["lengths"],
        **{name: [mine[name] for mine in each] for name in cached},
        **learned(case),
        head_groups=[part.heads for part in parts],
        ring=min(part.slots for part in parts) < context,
        # Half of it goes to the keys that are no longer held.
        skip_mass=SKIP_MASS / 2 if case.endswith("spans") else SKIP_MASS,
    )


def read_pages(case: str, parts: list[Group], given: dict[str, Any]) -> Float[Array, ""]:
    """Returns how many pages of keys, and pages of values, a layer must read."""
    total = jnp.zeros((), jnp.float32)
    for mine in calls(case, parts, given["query"], given["caches"], given["lengths"]):
        arrays = {"key": mine["key_cache"], "value": mine["value_cache"]}
        rows = {name: mine[name] for name in ("query", "lengths", "key_norms")} | arrays
        shared = {name: mine[name] for name in learned(case)}
        total += _read_pages(rows, shared)
    return total


def _read_pages(rows: dict[str, Array], shared: dict[str, Array]) -> Float[Array, ""]:
    """The same for one group of heads."""

    def of_row(row: dict[str, Array]) -> Array:
        cached = {name: row[name][None, None] for name in ("key", "value", "key_norms")}
        rest = {name: row[name][None] for name in ("query", "lengths")}
        nothing: dict[str, Any] = {"key_scales": None, "value_scales": None}
        inputs = Inputs(**cached, **rest, **shared, **nothing, layer=jnp.int32(0))
        settings = Settings(_HEAD_DIM.value**-0.5, SKIP_MASS, None, None, False, True)
        read = pages.visited(inputs, settings)
        live = xla.weights(inputs, settings) > 0
        live = jnp.pad(live, [(0, 0)] * 4 + [(0, -inputs.slots % PAGE)])
        live = live.reshape(*live.shape[:4], -1, PAGE).any(axis=(2, 3, 5))
        return (read.sum() + (live & read).sum()).astype(jnp.float32)

    return jax.lax.map(of_row, rows).sum()


def peer(case: str, given: dict[str, Any]) -> Array:
    """Returns the output of another implementation, or of ours as it was."""
    ((key, value),) = given["caches"]
    if case == "today":
        start = given["lengths"] - 1
        how: dict[str, Any] = {"query_start": start, "implementation": "xla"}
        return lazy_attention(given["query"], key, value, **learned("lazy"), **how)
    return jax.nn.dot_product_attention(
        given["query"],
        key,
        value,
        key_value_seq_lengths=given["lengths"],
        query_seq_lengths=jnp.ones_like(given["lengths"]),
        implementation="cudnn",
    )


def torch_run(layers: list[dict[str, Any]]) -> Callable[[], Any]:
    """Returns torch's fused attention of these layers, on tensors of its own."""
    import torch

    arrays = []
    for given in layers:
        ((key, value),) = given["caches"]
        arrays.append([torch.from_dlpack(x).transpose(1, 2) for x in (given["query"], key, value)])
    attention = torch.nn.functional.scaled_dot_product_attention

    class Result:
        """What `jax.block_until_ready` waits for."""

        def block_until_ready(self) -> None:
            torch.cuda.synchronize()

    def run() -> Any:
        for x in arrays:
            attention(*x)
        return Result()

    return run


def copy_rate() -> float:
    """Returns bytes read and written a second by a copy."""
    size = 2**26 if jax.default_backend() == "cpu" else min(2**31, _memory() // 8)
    x = jnp.zeros(size // 4, jnp.int32)
    copy = jax.jit(lambda x: x + 1).lower(x).compile()
    return 2 * x.nbytes / (1e-3 * timing.milliseconds(lambda: copy(x), calls=20))


@dataclasses.dataclass
class Job:
    """A line that is to be filled in, and what is compiled for it.

    Attributes:
      line, case: what is timed.
      parts: its groups of heads.
      make: returns a layer's queries and caches.
      read: returns the pages of keys and of values of each group that a layer must read.
      token: attention of several layers.
    """

    line: Line
    case: str
    parts: list[Group]
    make: Any = None
    read: Any = None
    token: Any = None

    @property
    def ours(self) -> bool:
        """Returns whether it is this package's attention."""
        return self.line.implementation == "lazyattn"

    @property
    def row_bytes(self) -> int:
        """Returns the bytes that the key/value heads of a layer hold of one position."""
        return 2 * 2 * self.line.batch * _HEAD_DIM.value

    @property
    def held(self) -> int:
        """Returns the bytes of keys and values of one layer."""
        return sum(len(part.heads) * part.slots for part in self.parts) * self.row_bytes

    @property
    def whole(self) -> int:
        """Returns what they would be if every key were held."""
        return _KV_HEADS.value * self.line.context * self.row_bytes

    def compile(self) -> None:
        """Compiles all three; notes what goes wrong in the line."""
        if self.line.error:
            return
        try:
            self._compile()
        except Exception as error:
            self.line.error = f"{type(error).__name__}: {str(error)[:300]}"

    def _compile(self) -> None:
        line, case, parts = self.line, self.case, self.parts
        seed = jnp.int32(0)
        self.make = layer.lower(seed, tuple(parts), line.batch).compile()
        query, caches = jax.eval_shape(lambda seed: layer(seed, tuple(parts), line.batch), seed)
        lengths = jax.ShapeDtypeStruct((line.batch,), jnp.int32)
        given = {"query": query, "caches": caches, "lengths": lengths}
        if self.ours and line.attention == "lazy":
            pages_of = functools.partial(read_pages, case, parts)
            self.read = jax.jit(pages_of).lower(given).compile()
        if case == "torch":
            return

        def token(layers: list[dict[str, Any]]) -> list[Array]:
            if self.ours:
                return [attend(case, parts, line.context, given) for given in layers]
            return [peer(case, given) for given in layers]

        self.token = jax.jit(token).lower([given] * line.layers_timed).compile()

    def measure(self, rate: float) -> None:
        """Times the attention."""
        line = self.line
        layers = []
        for n in range(line.layers_timed):
            query, caches = self.make(jnp.int32(n))
            lengths = jnp.full(line.batch, line.context, jnp.int32)
            layers.append({"query": query, "caches": caches, "lengths": lengths})
        read = float(self.held)
        if self.read is not None:
            read = float(self.read(layers[0])) * 2 * PAGE * _HEAD_DIM.value
        run = functools.partial(self.token, layers)
        if self.case == "torch":
            run = torch_run(layers)
        ms = timing.milliseconds(run, calls=_CALLS.value, rounds=_ROUNDS.value)
        line.ms_attention = ms * _LAYERS.value / line.layers_timed
        line.bytes_attention = int(read * _LAYERS.value)
        line.limit_attention_ms = 1e3 * line.bytes_attention / rate
        line.read_share = read / self.whole
        if _PROFILE.value and self.ours:
            print(f"{self.case}, context {line.context}, batch {line.batch}: ms of a layer")
            for name, each in list(timing.kernels(run).items())[:5]:
                print(f"  {each / line.layers_timed:8.4f}  {name}", flush=True)


def new_job(case: str, context: int, batch: int) -> Job:
    """Returns a job whose line says what is to be timed, or why it can't be."""
    attention = "lazy" if case.startswith("lazy") or case == "today" else "softmax"
    line = Line(
        "lazyattn" if case.split("-")[0] in ("softmax", "lazy") else case,
        attention,
        "spans" if case.endswith("spans") else "full",
        "alibi" if attention == "lazy" else "none",
        context,
        batch,
    )
    job = Job(line, case, groups(case, context))
    line.cache_bytes_share = job.held / job.whole
    line.layers_timed = min(_LAYERS.value, max(2, -(-_ENOUGH // job.held)))
    limit = _memory()
    if line.layers_timed * job.held > 0.8 * limit:
        line.error = f"{line.layers_timed} layers take {line.layers_timed * job.held / 1e9:.0f} GB"
    return job


def _memory() -> int:
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 2**36)


@functools.cache
def model(variant: str) -> Any:
    """Returns parameters, configuration and the model for decoding, at initialization."""
    attention = AttentionConfig(
        variant=variant,
        num_heads=_HEADS.value,
        num_kv_heads=_KV_HEADS.value,
        head_dim=_HEAD_DIM.value,
        qk_norm=True,
        offset_init=_OFFSET.value,
    )
    config = ModelConfig(
        width=_HEADS.value * _HEAD_DIM.value, num_layers=_LAYERS.value, attention=attention
    )
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    ready = prepare(params, config)
    layers = {k: x for k, x in ready.params.items() if k.startswith("blocks")}
    weights = sum(x.nbytes for x in jax.tree.leaves((layers, ready.output)))
    return params, config, ready, weights


def time_token(line: Line, rate: float) -> None:
    """Times a whole token, where there is memory for the cache."""
    params, config, ready, weights = model(line.attention)
    assert line.bytes_attention is not None
    line.bytes = weights + line.bytes_attention
    line.limit_ms = 1e3 * line.bytes / rate
    if line.cache == "spans":
        plan = spans.plan_cache(params, config, line.context, buckets=None)
    else:
        plan = cache_lib.full_plan(config, line.context)
    if plan.row_bytes * line.batch > 0.85 * _memory():
        line.error = f"the cache takes {plan.row_bytes * line.batch / 1e9:.0f} GB"
        return
    cache = cache_lib.init_cache(plan, line.batch)
    fill = jax.jit(lambda x, seed: unit(jax.random.key(seed), x.shape), donate_argnums=0)
    norms = jax.jit(lambda x: jnp.full_like(x, math.sqrt(_HEAD_DIM.value) * (1 + 2.0**-7)))
    filled = []
    for n, held in enumerate(cache.layers):
        filled.append(
            tuple(
                dataclasses.replace(
                    group,
                    keys=fill(group.keys, 2 * n),
                    values=fill(group.values, 2 * n + 1),
                    key_norms=norms(group.key_norms),
                )
                for group in held
            )
        )
    steps = _CALLS.value * (_ROUNDS.value + 1)
    lengths = jnp.full(line.batch, line.context - steps, jnp.int32)
    cache = dataclasses.replace(cache, layers=tuple(filled), lengths=lengths)
    state = [(cache, jnp.ones((line.batch, 1), jnp.int32))]

    # As in `generate`: tokens follow each other without the host.
    @functools.partial(jax.jit, donate_argnums=1)
    def tokens(ready: Any, state: Any) -> Any:
        def one(_: Array, state: Any) -> Any:
            cache, token = state
            logits, cache = serving.step_rows(ready, cache, token)
            return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, _CALLS.value, one, state)

    run = tokens.lower(ready, state[0]).compile()

    def several() -> Array:
        state.append(run(ready, state.pop()))
        return state[0][1]

    several_ms = timing.milliseconds(several, calls=1, rounds=_ROUNDS.value)
    line.ms_token = several_ms / _CALLS.value


def _commit() -> str:
    here = pathlib.Path(__file__).parent
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()


def main(argv: list[str]) -> None:
    """Times everything, and writes each line when it is known."""
    del argv
    for case in _CASES.value:
        require(case in CASES, "--cases", case, "of " + ", ".join(CASES))
    began = time.monotonic()
    rate = copy_rate()
    print(f"{jax.devices()[0].device_kind}, a copy: {rate / 1e9:.0f} GB/s", flush=True)
    output = pathlib.Path(_OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "copy_gb_s": round(rate / 1e9, 1),
        "device": jax.devices()[0].device_kind,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }
    pairs = [f"{context}x{batch}" for context in _CONTEXTS.value for batch in _BATCHES.value]
    jobs = [
        new_job(case, *map(int, pair.split("x")))
        for pair in dict.fromkeys(pairs + _TOKENS.value)
        for case in _CASES.value
    ]
    with concurrent.futures.ThreadPoolExecutor(_JOBS.value) as pool:
        list(pool.map(Job.compile, jobs))
    print(f"compiled after {time.monotonic() - began:.0f} s", flush=True)

    def in_time(job: Job) -> bool:
        late = time.monotonic() - began > _SECONDS.value
        if late:
            print(f"{_name(job)}: left out after {_SECONDS.value:.0f} s", flush=True)
        return not late

    def attempt(job: Job, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            job.line.error = f"{type(error).__name__}: {str(error)[:300]}"

    def write(job: Job) -> None:
        found = dataclasses.asdict(dataclasses.replace(job.line, **about))
        with output.open("a") as file:
            file.write(json.dumps(found) + "\n")

    later = []
    for job in jobs:
        if not job.line.error and in_time(job):
            attempt(job, functools.partial(job.measure, rate))
        print(f"{_name(job)}: {_short(job.line)}", flush=True)
        job.make = job.read = job.token = None
        if job.ours and f"{job.line.context}x{job.line.batch}" in _TOKENS.value:
            later.append(job)
        else:
            write(job)
    for job in later:
        if job.line.bytes_attention is not None and in_time(job):
            attempt(job, functools.partial(time_token, job.line, rate))
            print(f"{_name(job)}: {_short(job.line)}", flush=True)
        write(job)


def _name(job: Job) -> str:
    return f"{job.case}, context {job.line.context}, batch {job.line.batch}"


def _short(line: Line) -> str:
    words = []
    for what, ms, limit in (
        ("attention", line.ms_attention, line.limit_attention_ms),
        ("token", line.ms_token, line.limit_ms),
    ):
        if ms is not None and limit is not None:
            words.append(f"{what} {ms:.3f} ms, limit {limit:.3f}, {ms / limit:.2f} x")
    if line.read_share is not None:
        words.append(f"reads {line.read_share:.1%} of all keys and values")
    if line.cache_bytes_share is not None:
        words.append(f"holds {line.cache_bytes_share:.1%}")
    return "; ".join([*words, line.error or ""])


if __name__ == "__main__":
    app.run(main)
