"""Where a training step's time goes, part by part, beside the least that it could take.

    python -m benchmarks.step_profile --config=configs/fineweb_edu.py:lazy_340m_10b --batch=8

The step is that of `train.py`, as in `benchmarks.train_step`. A trace of some steps says how long
each kernel took; the compiled program says which part of the step it belongs to, how many bytes it
moves and how many products it makes. The least time is the larger of bytes over the rate of a
copy, and products over the rate of a large matrix product, both measured in the same run.
Attention's products depend on what it skips, so its limit is that of its bytes alone.

Without a GPU the program is compiled for one, and bytes and products are all there is:

    pip install --no-deps --target build/cuda jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2
    PYTHONPATH=build/cuda python -m benchmarks.step_profile --config=... --compile_only

Prints a table; `--output` gets it as a line of JSON.
"""

import os
import sys

if __name__ == "__main__":
    # Kernels of a CUDA graph don't say which instruction they are.
    _GRAPHS = "--xla_gpu_enable_command_buffer="
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_GRAPHS}"
    if any(argument.startswith("--compile_only") for argument in sys.argv):
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        # There is nothing to try kernels on.
        os.environ["XLA_FLAGS"] += " --xla_gpu_autotune_level=0"

import dataclasses
import json
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from benchmarks import hopper_target, provenance, timing, train_step
from lazyattn import compile_for, paths, sharding
from lazyattn.compile import work
from lazyattn.compile.hlo import Computation, Instruction, Module
from lazyattn.errors import InputError, require
from lazyattn.experiment import ExperimentConfig, from_config_dict

ATTENTION, PLANNING = "attention", "attention's planning"
PRODUCTS, LOSS, OPTIMIZER = "matrix products", "loss", "optimizer"
ELEMENTWISE, COPIES = "norms, RoPE, activations", "copies"
COLLECTIVES, GAPS = "collectives", "gaps"
PARTS = (
    *(ATTENTION, PLANNING, PRODUCTS, LOSS, ELEMENTWISE),
    *(OPTIMIZER, COPIES, COLLECTIVES, GAPS),
)

_COLLECTIVE = re.compile(r"^(all-|reduce-scatter|collective-|ragged-all)")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_LIBRARY = re.compile(r"cublas|gemm|matmul", re.IGNORECASE)
_KERNEL = re.compile(r"lazy_(forward|backward)|fmha|flash", re.IGNORECASE)
# A fusion of nothing else moves numbers without changing them.
_MOVES = frozenset(
    {
        *("parameter", "constant", "bitcast", "copy", "transpose", "reshape", "tuple"),
        *("get-tuple-element", "dynamic-slice", "dynamic-update-slice", "slice"),
        *("concatenate", "pad", "broadcast", "iota", "compare", "select", "add", "and"),
    }
)
_COPIES = ("copy", "dynamic-slice", "dynamic-update-slice", "transpose", "concatenate", "pad")


@dataclasses.dataclass
class Part:
    """What one part of the step does.

    Attributes:
      ms: on the device; 0 where nothing was run.
      bytes: read and written.
      flops: of matrix products.
    """

    ms: float = 0.0
    bytes: float = 0.0
    flops: float = 0.0

    def least(self, rates: "Rates") -> float:
        """Returns the milliseconds below which it can't be."""
        return 1e3 * max(self.bytes / rates.bytes, self.flops / rates.flops)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Bytes of a copy, read and written, and FLOPs of a large product, a second."""

    bytes: float
    flops: float


@dataclasses.dataclass(frozen=True)
class Event:
    """A kernel that ran.

    Attributes:
      instruction: name in the program, or "".
      kernel: its own name.
      start, stop: nanoseconds.
    """

    instruction: str
    kernel: str
    start: float
    stop: float


def part_of(instruction: Instruction, owner: Computation, module: Module) -> str:
    """Returns the part of a step that a scheduled instruction belongs to."""
    where = instruction.op_name
    if _COLLECTIVE.match(instruction.opcode):
        return COLLECTIVES
    if re.search(r"\bloss\b", where):
        return LOSS
    if re.search(r"\boptimizer\b", where):
        return OPTIMIZER
    inside = [(instruction, owner), *module.inside(instruction)]
    if instruction.opcode.startswith("custom-call"):
        target = _TARGET.search(instruction.rest)
        name = f"{where} {target[1] if target else ''}"
        if _KERNEL.search(name):
            return ATTENTION
        if "norm_rotate" in name:
            return ELEMENTWISE
        return PRODUCTS if _LIBRARY.search(name) else PLANNING
    if any(work.product_flops(*one) for one in inside):
        return PRODUCTS
    if re.search(r"lazy_attention|_attention\)", where):
        return PLANNING
    opcodes = {one.opcode for one, _ in inside if not one.opcode.startswith("fusion")}
    if opcodes & set(_COPIES) and opcodes <= _MOVES:
        return COPIES
    return ELEMENTWISE


def parts_of(module: Module) -> tuple[dict[str, Part], dict[str, str]]:
    """Returns what the program's parts do, and the part of each instruction by name."""
    parts = {name: Part() for name in PARTS}
    places: dict[str, str] = {}
    for instruction, owner, times in module.running():
        # What was started is counted where it starts.
        if instruction.opcode.endswith("-done"):
            continue
        moved = work.hbm_bytes(instruction, owner, module)
        if not moved:
            continue
        name = part_of(instruction, owner, module)
        places[instruction.name] = name
        parts[name].bytes += times * moved
        for one in ((instruction, owner), *module.inside(instruction)):
            parts[name].flops += times * work.product_flops(*one)
    return parts, places


def largest(module: Module, number: int) -> list[tuple[str, str, int, float]]:
    """Returns what moves most bytes: part, place in the program, how often it runs, bytes.

    Layers that are not scanned count together.
    """
    found: dict[tuple[str, str, str], list[float]] = {}
    for instruction, owner, times in module.running():
        moved = work.hbm_bytes(instruction, owner, module)
        if moved:
            where = re.sub(r"blocks_\d+", "blocks", instruction.op_name)
            key = part_of(instruction, owner, module), where, str(instruction.arrays)
            runs_and_bytes = found.setdefault(key, [0, 0.0])
            runs_and_bytes[0] += times
            runs_and_bytes[1] += times * moved
    rows = [(part, where, int(runs), size) for (part, where, _), (runs, size) in found.items()]
    return sorted(rows, key=lambda row: -row[3])[:number]


def add_times(
    parts: dict[str, Part], places: dict[str, str], events: Iterable[Event], steps: int
) -> dict[str, float]:
    """Adds the milliseconds a step of each part, and of the gaps between kernels.

    Args:
      parts: as from `parts_of`, as the next.
      places: the part of each instruction.
      events: of some steps in a row.
      steps: how many.

    Returns:
      milliseconds a step of kernels whose instruction is not known, by their own name; they
      count as elementwise.
    """
    unknown: dict[str, float] = {}
    stop = None
    gaps = 0.0
    for event in sorted(events, key=lambda event: event.start):
        ms = (event.stop - event.start) / 1e6 / steps
        name = places.get(event.instruction)
        if name is None:
            unknown[event.kernel] = unknown.get(event.kernel, 0.0) + ms
            name = ATTENTION if _KERNEL.search(event.kernel) else ELEMENTWISE
        parts[name].ms += ms
        if stop is not None:
            gaps += max(0.0, event.start - stop)
        stop = event.stop if stop is None else max(stop, event.stop)
    parts[GAPS].ms += gaps / 1e6 / steps
    return unknown


def trace(run: Callable[[], Any]) -> list[Event]:
    """Returns the kernels that GPUs run in a call of `run`."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    events = []
    for plane in profile.planes:
        if not plane.name.startswith("/device:GPU:0"):
            continue
        for line in plane.lines:
            if "Stream" not in line.name:
                continue
            for event in line.events:
                stats = dict(event.stats)
                start = event.start_ns
                stop = start + event.duration_ns
                events.append(Event(str(stats.get("hlo_op", "")), event.name, start, stop))
    return events


def measure_rates() -> Rates:
    """Returns the device's rates."""
    x = jnp.zeros(2**29, jnp.bfloat16)
    copy = jax.jit(lambda x: x + jnp.ones((), x.dtype))
    square = jnp.full((8192, 8192), 0.01, jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    times = timing.rounds_of(
        {"copy": lambda: copy(x), "product": lambda: product(square)}, calls=5, rounds=3
    )
    copied, multiplied = (times[name][0] / 1e3 for name in ("copy", "product"))
    return Rates(2 * x.nbytes / copied, 2 * 8192**3 / multiplied)


def table(parts: dict[str, Part], rates: Rates | None) -> str:
    """Returns the parts as Markdown; without rates bytes and products alone."""
    lines = ["| part | ms | GB | GFLOP | least ms |", "|---|---|---|---|---|"]
    total = Part()
    for name, part in parts.items():
        if not (part.ms or part.bytes):
            continue
        total = Part(total.ms + part.ms, total.bytes + part.bytes, total.flops + part.flops)
        lines.append(_row(name, part, rates))
    return "\n".join([*lines, _row("all", total, rates)])


def _row(name: str, part: Part, rates: Rates | None) -> str:
    cells = [
        name,
        f"{part.ms:.2f}" if part.ms else "",
        f"{part.bytes / 1e9:.2f}",
        f"{part.flops / 1e9:,.0f}" if part.flops else "",
        "" if rates is None or name in (GAPS, "all") else f"{part.least(rates):.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _compiled_elsewhere(experiment: ExperimentConfig, kind: str) -> Any:
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=1), [hopper_target.device()])
    with compile_for("sm90"):
        return train_step.compiled_step(kind, experiment, mesh)


def _run(options: flags.FlagValues) -> None:
    if options.config is None:
        raise InputError("--config is not given, but it must be a config file.")
    kinds = ", ".join(train_step.KINDS)
    require(options.attention in train_step.KINDS, "--attention", options.attention, kinds)
    require(options.steps >= 1, "--steps", options.steps, "at least 1")
    experiment = from_config_dict(options.config)
    sizes = options.batch, options.length, options.microbatches
    experiment = train_step.with_batch(experiment, *sizes)
    require(options.top >= 0, "--top", options.top, "at least 0")
    rates, unknown = None, {}
    # A program that is kept from before may have other names.
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    if options.compile_only:
        compiled = _compiled_elsewhere(experiment, options.attention)
        module = Module.parse(compiled.as_text())
        parts, places = parts_of(module)
    else:
        require(jax.default_backend() == "gpu", "--compile_only", False, "given without a GPU")
        mesh = sharding.make_mesh(experiment.mesh)
        compiled = train_step.compiled_step(options.attention, experiment, mesh)
        state = train_step.initial_state(options.attention, experiment, mesh)
        random = np.random.default_rng(1)
        batches = [
            train_step.random_batch(experiment, mesh, random) for _ in range(options.steps + 2)
        ]

        def steps(state: Any, batches: Sequence[Any]) -> Any:
            for batch in batches:
                state, _ = compiled(state, batch)
            return state

        state = jax.block_until_ready(steps(state, batches[:2]))
        module = Module.parse(compiled.as_text())
        parts, places = parts_of(module)
        events = trace(lambda: steps(state, batches[2:]))
        unknown = add_times(parts, places, events, options.steps)
        rates = measure_rates()
        print(f"copy {rates.bytes / 1e12:.2f} TB/s, product {rates.flops / 1e12:.0f} TFLOP/s")
    print(table(parts, rates))
    for part, where, runs, size in largest(module, options.top):
        print(f"{size / 1e9:.2f} GB in {runs} runs, {part}: {where}")
    for name, ms in sorted(unknown.items(), key=lambda item: -item[1])[:10]:
        print(f"not found in the program: {name}, {ms:.2f} ms")
    if options.output is not None:
        line = {
            "attention": options.attention,
            "batch": experiment.data.batch_size,
            "length": experiment.data.sequence_length,
            "device": "sm90, compiled for" if rates is None else jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "rates": None if rates is None else dataclasses.asdict(rates),
            "parts": {name: dataclasses.asdict(part) for name, part in parts.items()},
            **provenance.made_by("benchmarks.step_profile"),
        }
        with open(options.output, "a") as file:
            file.write(json.dumps(line) + "\n")


def main(argv: Sequence[str]) -> int:
    """Prints the table; returns the exit status."""
    del argv
    logging.set_verbosity(logging.WARNING)
    try:
        _run(flags.FLAGS)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def define(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags."""
    where: dict[str, Any] = {"flag_values": values}
    train_step.define_experiment(argv, values)
    flags.DEFINE_string("attention", "lazy", "Of " + ", ".join(train_step.KINDS), **where)
    flags.DEFINE_integer("steps", 3, "Steps that are traced.", **where)
    flags.DEFINE_integer("top", 0, "Instructions that move most bytes, to print.", **where)
    flags.DEFINE_bool("compile_only", False, "Compile for an H100, run nothing.", **where)
    paths.define("output", None, "File that gets a line of JSON.", **where)


if __name__ == "__main__":
    define(sys.argv)
    app.run(main, flags_parser=train_step.parse)
