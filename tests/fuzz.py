"""Random calls of `lazy_attention` under random settings of JAX, against float64 numpy.

    python -m tests.fuzz --programs=300 --calls=20             # CPU: xla, xla_chunked
    python -m tests.fuzz --implementations=triton --programs=40 --calls=3
    python -m tests.fuzz --platform=gpu --programs=100 --seconds=500 --output=fuzz.json

A program is drawn from its seed: shapes, dtype, options of the op, how JAX runs it (jit, vmap,
scan, remat, shard_map over simulated devices, a mesh of Explicit axes, with `jax_enable_x64`
and strict promotions or without). It is compiled once for each implementation that does the
call, and called with values that are drawn anew every time. Output and gradients are held to
`fuzz_definition`. `--first=SEED --programs=1` repeats a program that failed.
"""

# ruff: noqa: E402

import os
import sys


def _flag_before_jax(name: str, default: str) -> str:
    for argument in sys.argv[1:]:
        if argument.startswith(f"--{name}="):
            return argument.partition("=")[2]
    return default


if __name__ == "__main__":
    # Read when JAX starts.
    if _flag_before_jax("platform", "cpu") == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
        flags_ = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = flags_ + " --xla_force_host_platform_device_count=8"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import collections
import contextlib
import dataclasses
import json
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

from lazyattn import InputError, lazy_attention
from tests import fuzz_definition

# Its own: tests import this module beside train.py's flags, and some names are the same.
_FLAGS = flags.FlagValues()
_OWN: dict[str, Any] = {"flag_values": _FLAGS}
_PLATFORM = flags.DEFINE_enum("platform", "cpu", ["cpu", "gpu", "tpu"], "Where to run.", **_OWN)
_FIRST = flags.DEFINE_integer("first", 0, "Seed of the first program.", **_OWN)
_PROGRAMS = flags.DEFINE_integer("programs", 300, "Programs to draw.", **_OWN)
_CALLS = flags.DEFINE_integer("calls", 20, "Calls of each compiled program.", **_OWN)
_SECONDS = flags.DEFINE_float("seconds", 0, "Draw no more programs after so long; 0: all.", **_OWN)
_IMPLEMENTATIONS = flags.DEFINE_list(
    "implementations",
    [],
    "To try; none named: all that this platform has. On a CPU, triton and tpu are interpreted.",
    **_OWN,
)
_OUTPUT = flags.DEFINE_string("output", "", "File for the counts, as JSON.", **_OWN)

FLOATS = ("query", "key", "value", "distance_bias", "distance_slope", "offset")
PARAMETERS = ("distance_bias", "distance_slope", "offset")
MODES = ("jit", "vmap", "vmap_of_parameters", "scan", "remat", "shard_map", "explicit", "eager")
# Relative errors of what is computed in each dtype.
_UNITS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-23, "float16": 2.0**-23}
_ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
# The least number of float16 apart from 0.
_SMALLEST = {"float16": 2.0**-24}


@dataclasses.dataclass(frozen=True)
class Program:
    """What is drawn once and compiled.

    Attributes:
      seed: that it was drawn from.
      shape: (rows, queries, keys, heads, key heads, head size); rows in all.
      dtype: of queries, keys and values.
      width: of the bias table; 0: none.
      bias: kind of its values.
      slope, offset, documents: whether there are any; the offset's kind of values, or "".
      options: other arguments of the op.
      chunks: of `chunk_starts`; 0: not given.
      cache: whether `query_start` is given.
      traced: whether starts are traced.
      mode: how JAX runs it, one of `MODES`.
      parts: rows that are mapped or scanned over, or (rows, heads) of a mesh.
      check_vma: of the shard_map.
      x64, strict: settings of JAX.
      sharpness: factor of queries and keys.
    """

    seed: int
    shape: tuple[int, int, int, int, int, int]
    dtype: str
    width: int
    bias: str
    slope: bool
    offset: str
    documents: bool
    options: tuple[tuple[str, Any], ...]
    chunks: int
    cache: bool
    traced: bool
    mode: str
    parts: tuple[int, int]
    check_vma: bool
    x64: bool
    strict: bool
    sharpness: float

    @property
    def kinds(self) -> list[str]:
        """Returns what to count it as."""
        found = [self.mode, self.dtype]
        given = {
            "bias": self.width,
            "slope": self.slope,
            "offset": self.offset,
            "documents": self.documents,
            "chunk_starts": self.chunks,
            "query_start": self.cache,
            "grouped": self.shape[3] > self.shape[4],
            "x64": self.x64,
            "strict": self.strict,
            "minus_infinity": self.width and self.bias in ("gaps", "blind"),
        }
        found += [name for name, there in given.items() if there]
        return found + [name for name, _ in self.options]


def draw(seed: int, *, most_devices: int, narrow: bool = False) -> Program:
    """Returns the program of a seed.

    Args:
      seed: any number of at least 0.
      most_devices: that a mesh may have.
      narrow: head sizes and dtypes that most kernels have.
    """
    rng = np.random.default_rng([seed, 77])

    def pick(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    def perhaps(share: float) -> bool:
        return bool(rng.random() < share)

    # Outside jit, every operation is compiled by itself: rarely, and small.
    mode = pick(*MODES[:7] * 6, "eager")
    kv_heads, group = pick(1, 2, 2, 4), pick(1, 1, 2, 3)
    rows, parts = pick(1, 2, 3), (1, 1)
    if mode in ("vmap", "vmap_of_parameters", "scan"):
        parts = (pick(2, 3), 1)
        rows *= parts[0]
    if mode in ("shard_map", "explicit"):
        options = [(r, h) for r in (1, 2, 4) for h in (1, 2, 4) if r * h <= most_devices]
        parts = pick(*options)
        rows *= parts[0]
        kv_heads *= pick(1, 1, parts[1])
        group *= parts[1] if (kv_heads * group) % parts[1] else 1
    heads = kv_heads * group
    length = pick(1, 2, 17, pick(5, 40, 63), 64, pick(65, 100, 127), 128, 129, pick(200, 257, 300))
    length = min(length, 20 if mode == "eager" else 1200 // rows)
    sizes = (16, 32, 64, 64, 96, 128) if narrow else (1, 4, 8, 16, 16, 32, 64)
    dtypes = ("bfloat16", "float16", "float32") if narrow else (*_UNITS, "float32")
    dtype = pick(*dtypes)
    x64 = dtype == "float64" or perhaps(0.3)
    keys, chunks, cache = length, 0, False
    if perhaps(0.15) and length > 1:
        chunks = pick(1, 2)
        keys = length + pick(1, length, 3 * length // 2)
        length -= length % chunks
    elif perhaps(0.1):
        cache, keys = True, length + pick(0, 1, 37)
    width = pick(0, 1, pick(2, 7, 16), 64, 100, 128, keys, keys + 10)
    offset = pick("", "init", "negative", "positive", "both", "zero", "learned")
    options: dict[str, Any] = {}
    if perhaps(0.25):
        options["window"] = int(pick(1, 2, 17, 64, max(1, keys // 2), keys, keys + 3))
    if offset and perhaps(0.2):
        options["offset_divisor"] = pick(1.0, float(keys))
    if offset and perhaps(0.15):
        options["renormalize"] = True
    if perhaps(0.15):
        options["scale"] = pick(0.3, -0.2)
    if perhaps(0.3):
        options["skip_mass"] = 0.0
    return Program(
        seed=seed,
        shape=(rows, length, keys, heads, kv_heads, pick(*sizes)),
        dtype=dtype,
        width=width,
        bias=pick("normal", "alibi", "alibi", "steep", "bumpy", "gaps", "blind"),
        slope=width > 0 and perhaps(0.5),
        offset=offset,
        documents=perhaps(0.4),
        options=tuple(options.items()),
        chunks=chunks,
        cache=cache,
        traced=perhaps(0.7),
        mode=mode,
        parts=parts,
        check_vma=perhaps(0.7),
        x64=x64,
        strict=perhaps(0.3),
        sharpness=pick(1.0, 1.0, 1.0, 0.1, 4.0),
    )


def values(program: Program, call: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns the arrays of one call, and the cotangent of its output."""
    rng = np.random.default_rng([program.seed, 78, call])
    rows, length, keys, heads, kv_heads, head_dim = program.shape
    dtype = jnp.dtype(program.dtype)
    wide = np.float64 if program.dtype == "float64" else np.float32

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    arrays = {
        "query": program.sharpness * normal(rows, length, heads, head_dim),
        "key": program.sharpness * normal(rows, keys, kv_heads, head_dim),
        "value": normal(rows, keys, kv_heads, head_dim) + (20 if rng.random() < 0.1 else 0),
    }
    arrays = {name: x.astype(dtype) for name, x in arrays.items()}
    if program.width:
        x = np.arange(program.width)
        slopes = rng.uniform(0.002, 0.7, (heads, 1))
        noise = normal(heads, program.width)
        table = {
            "normal": 0.02 * noise,
            "alibi": -slopes * x,
            "steep": -8 * slopes * x,
            "bumpy": 3 * np.sin(x / rng.uniform(1, 30)) + noise,
            "gaps": np.where((x + rng.integers(5)) % 5 == 1, -np.inf, noise),
            "blind": np.where(x < rng.integers(1, 4), -np.inf, noise),
        }[program.bias]
        if program.bias == "gaps":
            table[:, 0] = noise[:, 0]
        arrays["distance_bias"] = table.astype(wide)
        if program.slope:
            arrays["distance_slope"] = rng.uniform(-0.001, 0.4, heads).astype(wide)
    if program.offset:
        size = rng.uniform(0.05, 1.5, heads)
        arrays["offset"] = {
            "init": np.full(heads, rng.choice([-1.0, -0.5])),
            "negative": -size,
            "positive": size,
            "both": size * rng.choice([-1, 1], heads),
            "zero": np.zeros(heads),
            "learned": -0.5 + 0.2 * normal(heads),
        }[program.offset].astype(wide)
        if dict(program.options).get("offset_divisor") == 1.0:
            arrays["offset"] /= 8
    if program.documents:
        ids = np.cumsum(rng.random((rows, keys)) < rng.choice([0.02, 0.1, 0.6]), axis=1)
        arrays["segment_ids"] = ids.astype(np.int32)
    if program.chunks:
        size = length // program.chunks
        gaps = np.sort(rng.integers(0, keys - length + 1, program.chunks))
        starts = rng.permutation(gaps + size * np.arange(program.chunks))
        arrays["chunk_starts"] = starts.astype(np.int32)
    if program.cache:
        arrays["query_start"] = rng.integers(0, keys - length + 1, rows).astype(np.int32)
    return arrays, normal(rows, length, heads, head_dim).astype(dtype)


def make(program: Program, implementation: str | None, fixed: dict[str, np.ndarray]) -> Any:
    """Returns a function of (arrays, d_out) that returns output and gradients.

    Args:
      program: to run.
      implementation: of the op.
      fixed: arrays that are known when the function is traced.
    """
    settings = dict(program.options) | {"implementation": implementation}

    def plain(arrays: dict[str, Any]) -> Any:
        return lazy_attention(**arrays, **fixed, **settings)

    call = _moded(program, plain)

    def run(arrays: dict[str, Any], d_out: Any) -> dict[str, Any]:
        floats = {name: x for name, x in arrays.items() if name in FLOATS}
        rest = {name: x for name, x in arrays.items() if name not in floats}
        out, vjp = jax.vjp(lambda floats: call(floats | rest), floats)
        return {"out": out} | vjp(d_out)[0]

    return run if program.mode == "eager" else jax.jit(run)


def _is_shared(name: str) -> bool:
    return name in PARAMETERS or name == "chunk_starts"


def _moded(program: Program, plain: Any) -> Any:
    """Returns `plain`, run as the program's mode says."""
    parts, mode = program.parts[0], program.mode

    def split(arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        rows = {
            name: x.reshape(parts, x.shape[0] // parts, *x.shape[1:])
            for name, x in arrays.items()
            if not _is_shared(name)
        }
        return rows, {name: x for name, x in arrays.items() if _is_shared(name)}

    def joined(out: Any) -> Any:
        return out.reshape(out.shape[0] * out.shape[1], *out.shape[2:])

    def by_vmap(arrays: dict[str, Any]) -> Any:
        rows, shared = split(arrays)
        return joined(jax.vmap(lambda rows: plain(rows | shared))(rows))

    def by_vmap_of_parameters(arrays: dict[str, Any]) -> Any:
        rows, shared = split(arrays)
        copies = {
            name: jnp.broadcast_to(x, (parts, *x.shape))
            for name, x in shared.items()
            if name in PARAMETERS
        }
        rest = {name: x for name, x in shared.items() if name not in copies}
        return joined(jax.vmap(lambda rows: plain(rows | rest))(rows | copies))

    def by_scan(arrays: dict[str, Any]) -> Any:
        rows, shared = split(arrays)
        return joined(jax.lax.scan(lambda _, rows: (None, plain(rows | shared)), None, rows)[1])

    def by_shard_map(arrays: dict[str, Any]) -> Any:
        mesh = jax.make_mesh(
            program.parts, ("rows", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2
        )
        specs = {name: _spec(program, name) for name in arrays}
        return jax.shard_map(
            plain,
            mesh=mesh,
            in_specs=(specs,),
            out_specs=specs["query"],
            check_vma=program.check_vma,
        )(arrays)

    return {
        "vmap": by_vmap,
        "vmap_of_parameters": by_vmap_of_parameters,
        "scan": by_scan,
        "remat": jax.checkpoint(plain),
        "shard_map": by_shard_map,
    }.get(mode, plain)


def _spec(program: Program, name: str) -> PartitionSpec:
    """Returns how an array lies on the mesh of a program."""
    if name in PARAMETERS:
        return PartitionSpec("heads")
    if name == "chunk_starts":
        return PartitionSpec()
    if name in ("key", "value") and program.shape[4] % program.parts[1]:
        return PartitionSpec("rows")
    if name in ("query", "key", "value"):
        return PartitionSpec("rows", None, "heads")
    return PartitionSpec("rows")


def can_run(program: Program) -> bool:
    """Returns whether a plain shard_map can share out the heads."""
    kv_heads, shards = program.shape[4], program.parts[1]
    return program.mode != "shard_map" or kv_heads % shards == 0 or kv_heads == 1


@contextlib.contextmanager
def _settings(program: Program) -> Any:
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(program.x64))
        if program.strict:
            stack.enter_context(jax.numpy_dtype_promotion("strict"))
            stack.enter_context(jax.numpy_rank_promotion("raise"))
        yield


def errors_of(
    program: Program,
    found: dict[str, Any],
    arrays: dict[str, Any],
    true: fuzz_definition.Truth,
    fused: bool = False,
) -> list[str]:
    """Returns what is wrong with the results of a call; with `fused`, of a fused kernel.

    Only there have rows that see nothing no part in gradients.
    """
    unit = _UNITS[program.dtype]
    settings = dict(program.options)
    wide = {name: np.asarray(jnp.asarray(x).astype(jnp.float32) if x.dtype.itemsize < 4 else x)
            for name, x in found.items()}  # fmt: skip
    wrong = []
    for name in true.results:
        like = arrays["query"] if name == "out" else arrays[name]
        if found[name].dtype != like.dtype or found[name].shape != true.results[name].shape:
            wrong.append(f"{name} is {found[name].dtype}{list(found[name].shape)}")
    if not np.all(np.isnan(wide["out"][true.blind])):
        wrong.append("out is a number where a row sees nothing")
    # Other rows at and near a threshold count in the output, but not in gradients.
    renormalized = bool(settings.get("renormalize"))
    counts = ~(true.blind | (true.unsure if renormalized else False))
    tolerance = 64 * unit * (4 + true.largest_score) + 4 * settings.get("skip_mass", 1e-6)
    rounding = _ROUNDING.get(program.dtype, 0.0)
    for name, exact in true.results.items():
        if name != "out" and true.blind.any() and not fused:
            continue
        scale, ours = true.scales[name], wide[name]
        if name == "out":
            exact, scale, ours = (np.where(counts[..., None], x, 0.0) for x in (exact, scale, ours))
        bound = tolerance * np.linalg.norm(scale) + rounding * np.linalg.norm(exact)
        bound += 4 * rounding * np.linalg.norm(true.spreads[name])
        bound += _floor(program, name, arrays, exact)
        error = np.linalg.norm(ours - exact)
        if not error <= bound:
            wrong.append(f"{name} is off by {error:.3g}, above {bound:.3g}")
    return wrong


def _floor(program: Program, name: str, arrays: dict[str, Any], exact: np.ndarray) -> float:
    """Returns the error that a dtype's smallest numbers, and skipped mass, may leave."""
    smallest = _SMALLEST.get(program.dtype, 1e-30)
    keys = program.shape[2]
    largest = {
        "out": "value", "query": "key", "key": "query", "value": "query",
    }.get(name)  # fmt: skip
    if largest is None:
        # Sums over far keys, of which each may be skipped, times their distance.
        return 1e-5 * keys if name == "distance_slope" else 1e-12
    size = max(1.0, float(np.abs(np.asarray(arrays[largest], np.float64)).max()))
    return 4 * smallest * keys * size * np.sqrt(exact.size)


def check_program(
    program: Program, implementation: str | None, calls: int, seconds: float = np.inf
) -> tuple[int, list[str]]:
    """Returns how many calls were made, and what is wrong with the first wrong one.

    Raises:
      InputError: if the implementation can't do it.
    """
    with _settings(program):
        first, d_out = values(program, 0)
        names = () if program.traced else ("chunk_starts", "query_start")
        whole = program.mode not in ("vmap", "vmap_of_parameters", "scan", "shard_map")
        fixed = {name: first[name] for name in names if name in first and whole}
        run = make(program, implementation, fixed)
        start = time.monotonic()
        for call in range(calls):
            arrays, d_out = values(program, call)
            truth = arrays | fixed
            # Rows at a threshold, where rounding decides, get no cotangent.
            exact = fuzz_definition.truth(
                truth | dict(program.options), d_out, _UNITS[program.dtype]
            )
            d_out[exact.unsure | exact.blind] = 0
            given = {name: x for name, x in arrays.items() if name not in fixed}
            found = jax.block_until_ready(run(*_placed(program, given, d_out)))
            fused = implementation in ("mosaic_gpu", "triton", "tpu")
            wrong = errors_of(program, found, truth, exact, fused)
            if wrong:
                return call + 1, [f"call {call}: {text}" for text in wrong]
            if time.monotonic() - start > seconds:
                return call + 1, []
    return calls, []


def _placed(program: Program, arrays: dict[str, Any], d_out: np.ndarray) -> tuple[Any, Any]:
    if program.mode != "explicit":
        return arrays, d_out
    mesh = jax.make_mesh(
        program.parts, ("rows", "heads"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )

    def place(name: str, x: np.ndarray) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, _spec(program, name)))

    return {name: place(name, x) for name, x in arrays.items()}, place("query", d_out)


def _interpreter(implementation: str | None) -> Any:
    """Returns the context in which a kernel runs on a CPU."""
    if jax.default_backend() == "cpu" and implementation == "triton":
        from tests.pallas_kernels import triton_interpreter

        return triton_interpreter.interpreted(triton_interpreter.blocks(64, 32, (32, 16)))
    if jax.default_backend() == "cpu" and implementation == "tpu":
        from tests.pallas_kernels import tpu_interpreter

        return tpu_interpreter.interpreted()
    return contextlib.nullcontext()


def _wanted() -> list[str | None]:
    if _IMPLEMENTATIONS.value:
        return list(_IMPLEMENTATIONS.value)
    kernels = {"gpu": ["mosaic_gpu", "triton"], "tpu": ["tpu"]}.get(jax.default_backend(), [])
    return [*kernels, "xla_chunked", "xla"]


def main(argv: list[str]) -> None:
    """Draws programs, and says which fail."""
    del argv
    wanted, start = _wanted(), time.monotonic()
    interpreted = jax.default_backend() == "cpu" and not set(wanted) <= {"xla", "xla_chunked"}
    if jax.default_backend() == "cpu":
        # Small arrays run for microseconds and compile for seconds.
        jax.config.update("jax_disable_most_optimizations", True)
    else:
        jax.config.update("jax_default_matmul_precision", "highest")
    # Callbacks of several simulated devices at once crash XLA.
    devices = 1 if interpreted else jax.device_count()
    narrow = interpreted or jax.default_backend() != "cpu"
    counts: collections.Counter[str] = collections.Counter()
    failed: list[dict[str, Any]] = []
    refused: collections.Counter[str] = collections.Counter()
    for seed in range(_FIRST.value, _FIRST.value + _PROGRAMS.value):
        if _SECONDS.value and time.monotonic() - start > _SECONDS.value:
            break
        program = draw(seed, most_devices=devices, narrow=narrow)
        if not can_run(program):
            program = dataclasses.replace(program, mode="explicit")
        ran = False
        for implementation in wanted:
            try:
                with _interpreter(implementation):
                    calls, wrong = check_program(program, implementation, _CALLS.value)
            except InputError as error:
                if "can't do this call" not in str(error):
                    calls, wrong = 0, [traceback.format_exc(limit=-3)]
                else:
                    refused[str(error)] += 1
                    continue
            except Exception:
                calls, wrong = 0, [traceback.format_exc(limit=-3)]
            counts[f"calls, {implementation}"] += calls
            counts[f"programs, {implementation}"] += 1
            ran = True
            if wrong:
                failed.append({"seed": seed, "implementation": implementation, "wrong": wrong})
                print(f"seed {seed}, {implementation}: {program}", *wrong, sep="\n  ", flush=True)
        if ran:
            counts["programs"] += 1
            counts.update({f"programs with {kind}": 1 for kind in program.kinds})
            if counts["programs"] % 20 == 0:
                done = counts["programs"]
                jax.clear_caches()
                print(f"{done} programs, {len(failed)} failed, "
                      f"{time.monotonic() - start:.0f} s", flush=True)  # fmt: skip
    calls = sum(n for name, n in counts.items() if name.startswith("calls"))
    report = {
        "device": jax.devices()[0].device_kind,
        "devices": devices,
        "jax": jax.__version__,
        "first": _FIRST.value,
        "seconds": round(time.monotonic() - start),
        "calls": calls,
        "counts": dict(sorted(counts.items())),
        "refused": dict(refused.most_common()),
        "failed": failed,
    }
    if _OUTPUT.value:
        with open(_OUTPUT.value, "w") as file:
            json.dump(report, file, indent=1)
    compiled = ", ".join(
        f"{name} {counts[f'programs, {name}']} ({counts[f'calls, {name}']} calls)"
        for name in wanted
    )
    seeds = sorted({(x["seed"], x["implementation"]) for x in failed})
    print(f"device: {report['device']}, jax {jax.__version__}, {report['seconds']} s")
    print(f"programs: {counts['programs']}; {compiled}")
    print(f"calls: {calls}; failed: {len(failed)} {seeds if seeds else ''}")
    sys.exit(1 if failed else 0)


def _read_flags(argv: list[str]) -> list[str]:
    """Returns what is no flag; for `--help`, or a flag that there is not, this is the end."""
    if {"--help", "-h"} & set(argv):
        print(__doc__, _FLAGS.get_help(), sep="\n")
        sys.exit(0)
    try:
        return _FLAGS(argv)
    except flags.Error as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(_read_flags(sys.argv))
