"""Times every implementation of the op, and softmax attention by others, in one run.

    python -m benchmarks.attention --implementations=triton,cudnn,tokamax

Implementations of `lazy_attention` by their names; peers, which compute plain causal
softmax: "cudnn" and "xla_softmax" (jax.nn.dot_product_attention), "tokamax" (its Triton
kernel as it configures itself) and "tokamax_tuned" (the fastest of a few configurations).
With --window=512 ours see so many keys only, and so does the peer "cudnn_window"; the other
peers stay causal, so that `x cuDNN` says what the window saves.
Writes a JSON file and a Markdown table; `--profile` adds each kernel's share. TFLOP/s are
softmax attention's over our time; "of work done" counts what our kernels really compute, and
its share of the rate of plain matrix products is of the same run. `python -m benchmarks.tables`
puts JSON files in benchmarks/results/ into docs/kernels.md.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jaxtyping import Array

from benchmarks import cases, peers, provenance, shares, timing
from lazyattn import lazy_attention, paths
from lazyattn.errors import require
from pallas_kernels import problem
from pallas_kernels.mosaic_gpu import config

_IMPLEMENTATIONS = flags.DEFINE_list(
    "implementations", ["triton", "cudnn", "tokamax"], "What to time, see above."
)
_SHAPES = flags.DEFINE_list(
    "shapes",
    ["4x16x4096x64", "4x16x4096x128"],
    "Batch x heads x length x head size, and x key heads where they are fewer.",
)
_CASES = flags.DEFINE_list("cases", ["dense", "alibi"], "Of " + ", ".join(cases.CASES))
_LEARNED = paths.define(
    "learned",
    os.path.join(os.environ.get("LAZYATTN_TEST_DATA", ""), "learned", "alibi_4096.npz"),
    "File of the case `learned`: bias [layers, heads, width] and tau [layers, heads].",
)
_PASSES = flags.DEFINE_list("passes", ["forward", "training"], "training: forward and backward.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Inputs.")
_WINDOW = flags.DEFINE_integer(
    "window", None, "Keys that a query sees, in ours and in cudnn_window.", lower_bound=1
)
_WIDTH = flags.DEFINE_integer("width", 1024, "Bias table.")
_SKIP_MASS = flags.DEFINE_float("skip_mass", 1e-6, "0 visits every tile.")
_SKIP_DEAD = flags.DEFINE_boolean("skip_dead", True, "False computes dead tiles in full.")
_CALLS = flags.DEFINE_integer("calls", 40, "Calls in a row.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Times each is timed; the median counts.")
_JOBS = flags.DEFINE_integer("jobs", 4, "Programs compiled at once.")
_PROFILE = flags.DEFINE_boolean("profile", False, "Also list the kernels of our own.")
_OUTPUT = paths.define("output", "benchmarks/results/attention", "Without suffix.")


@dataclasses.dataclass
class Result:
    """One line of the table.

    Attributes:
      shape, case, implementation, which: what was timed; case "" for peers.
      milliseconds, least, greatest: median and extremes of a call.
      teraflops: what softmax attention computes, over that time: 1e12 a second.
      work: what was really computed, in the same unit; of our GPU kernels.
      temporary: bytes of memory beyond inputs and outputs.
      temporary_arrays: the same in arrays of the query's size.
      visited, live: shares of the causal tiles, measured on these inputs.
      in_full: share of them that the kernel does not take to be dead, as it says itself.
      kernels: milliseconds a call of each kernel, with --profile.
    """

    shape: str
    case: str
    implementation: str
    which: str
    milliseconds: float = 0.0
    least: float = 0.0
    greatest: float = 0.0
    teraflops: float = 0.0
    work: float | None = None
    temporary: int = 0
    temporary_arrays: float = 0.0
    visited: float | None = None
    live: float | None = None
    in_full: float | None = None
    kernels: dict[str, float] | None = None
    error: str | None = None


def _function(result: Result, attention: Callable[..., Array]) -> Callable[..., Any]:
    """Returns a function of (tensors, parameters): out, or out and every gradient."""

    def forward(tensors: Any, parameters: Any) -> Any:
        query, key, value, _ = tensors
        return attention(query, key, value, **parameters)

    def training(tensors: Any, parameters: Any) -> Any:
        query, key, value, d_out = tensors
        out, vjp = jax.vjp(
            lambda *args: attention(*args[:3], **args[3]), query, key, value, parameters
        )
        return out, vjp(d_out)

    return forward if result.which == "forward" else training


def _lazy(implementation: str, query: Array, key: Array, value: Array, **parameters: Array) -> Any:
    with problem.options(skip_dead=_SKIP_DEAD.value):
        return lazy_attention(
            query,
            key,
            value,
            **parameters,
            window=_WINDOW.value,
            skip_mass=_SKIP_MASS.value,
            implementation=implementation,
        )


def _jobs(shape: cases.Shape) -> list[tuple[Result, Callable[..., Array]]]:
    """Returns a line and a function for everything to be timed at one shape."""
    found: list[tuple[Result, Callable[..., Array]]] = []
    for name in _IMPLEMENTATIONS.value:
        for which in _PASSES.value:
            if name in peers.PEERS:
                for variant, attention in peers.PEERS[name](shape.head_dim, _WINDOW.value):
                    found.append((Result(str(shape), "", variant, which), attention))
            else:
                for case in _CASES.value:
                    attention = functools.partial(_lazy, name)
                    found.append((Result(str(shape), case, name, which), attention))
    return found


def _tell(result: Result, error: Exception) -> None:
    """Notes what went wrong: a line that says so is worth more than no table."""
    result.error = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    print(result.implementation, result.case, result.which, result.error, flush=True)


def _design(
    implementation: str, shape: cases.Shape, parameters: dict[str, Any]
) -> tuple[bool, shares.Design]:
    """Returns whether it is Elastic-Softmax to the kernels, and how they divide the work."""
    given = "offset" in parameters
    if implementation == "triton":
        return given, shares.Design()
    table = parameters.get("distance_bias")
    width = 0 if table is None else min(table.shape[1], shape.length)
    head_dim = config.padded_head_dim(shape.head_dim)
    offset = config.is_elastic(head_dim, given)
    tunings = config.tunings(head_dim, width, offset)
    return offset, shares.Design(
        mean_key=True,
        bias_apart=tunings.backward_dbias is not None,
        value_apart=tunings.backward_dv is not None,
    )


def _run_shape(shape: cases.Shape) -> list[Result]:
    learned = pathlib.Path(_LEARNED.value)
    parameters = {
        case: cases.parameters(case, shape, _WIDTH.value, learned) for case in _CASES.value
    } | {"": {}}
    # Two sets of inputs in turn.
    sets = [cases.tensors(shape, _DTYPE.value, seed) for seed in (1, 2)]
    jobs = _jobs(shape)

    def compiled(job: tuple[Result, Callable[..., Array]]) -> Any:
        result, attention = job
        try:
            lowered = jax.jit(_function(result, attention)).lower(sets[0], parameters[result.case])
            program = lowered.compile()
        except Exception as error:
            _tell(result, error)
            return None
        memory = program.memory_analysis()
        result.temporary = int(memory.temp_size_in_bytes)
        result.temporary_arrays = result.temporary / sets[0][0].nbytes
        return program

    with concurrent.futures.ThreadPoolExecutor(_JOBS.value) as pool:
        programs = list(pool.map(compiled, jobs))

    for n, ((result, _), program) in enumerate(zip(jobs, programs, strict=True)):
        try:
            # Not while others compile: a GPU may be recording what the first call launches.
            if program is not None:
                jax.block_until_ready(program(sets[0], parameters[result.case]))
        except Exception as error:
            _tell(result, error)
            programs[n] = None

    runs: dict[str, Callable[[], Any]] = {}
    for n, ((result, _), program) in enumerate(zip(jobs, programs, strict=True)):
        if program is not None:
            turns = [0]

            def run(program=program, result=result, turns=turns) -> Any:
                turns[0] += 1
                return program(sets[turns[0] % 2], parameters[result.case])

            runs[str(n)] = run
    times = timing.rounds_of(runs, calls=_CALLS.value, rounds=_ROUNDS.value)
    query, key = sets[0][:2]
    counted = {
        case: shares.by_definition(
            query, key, parameters[case], skip_mass=_SKIP_MASS.value, window=_WINDOW.value
        )
        for case in _CASES.value
    }
    done = [result for n, (result, _) in enumerate(jobs) if str(n) in runs]
    in_full = {
        case: float(shares.by_triton(sets[0], parameters[case], _SKIP_MASS.value, _WINDOW.value))
        for case in {result.case for result in done if result.implementation == "triton"}
        if "offset" in parameters[case]
    }
    for n, (result, _) in enumerate(jobs):
        if str(n) not in runs:
            continue
        result.milliseconds, result.least, result.greatest = times[str(n)]
        flops = shape.flops(result.which == "training")
        result.teraflops = flops / result.milliseconds / 1e9
        if result.case:
            found = counted[result.case]
            result.visited, result.live = float(found.visited), float(found.live)
            if result.implementation in ("mosaic_gpu", "triton"):
                design = _design(result.implementation, shape, parameters[result.case])
                products = found.products(result.which, *design)
                result.work = products * shape.product / result.milliseconds / 1e9
        if result.implementation == "triton":
            result.in_full = in_full.get(result.case)
        if _PROFILE.value and result.case:
            try:
                result.kernels = timing.kernels(runs[str(n)])
            except Exception as error:
                print("no profile:", error, flush=True)
    return peers.keep_fastest([result for result, _ in jobs])


def _matmul_rate(size: int = 8192) -> float:
    """Returns the TFLOP/s of a product of square bfloat16 matrices."""
    # Of numbers like attention's: products of ones draw less power, and are faster.
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
    # Tuned even where the rest of the program is not.
    tuned = {"xla_gpu_autotune_level": 4}
    product = jax.jit(jnp.dot, compiler_options=tuned).lower(a, b).compile()
    return 2 * size**3 / timing.milliseconds(lambda: product(a, b), calls=20) / 1e9


def table(results: list[Result], matmul: float | None = None) -> str:
    """Returns the results as Markdown.

    Args:
      results: its lines.
      matmul: the rate of plain matrix products, to compare the work done with.
    """
    lines = [
        "| shape | case | implementation | pass | ms | TFLOP/s | of work done | share of matmul |"
        " x cuDNN | x tokamax | temporary, arrays of q | visited | live | in full |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    by_key = {(r.shape, r.implementation, r.which): r.milliseconds for r in results if not r.case}

    def ratio(result: Result, peer: str) -> str:
        base = by_key.get((result.shape, peer, result.which))
        return f"{result.milliseconds / base:.2f}" if base else ""

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    for r in results:
        if r.error:
            cells = [r.shape, r.case, r.implementation, r.which, r.error] + [""] * 9
        else:
            cells = [
                r.shape,
                r.case,
                r.implementation,
                r.which,
                f"{r.milliseconds:.3f}",
                f"{r.teraflops:.0f}",
                f"{r.work:.0f}" if r.work else "",
                f"{r.work / matmul:.2f}" if r.work and matmul else "",
                ratio(r, "cudnn"),
                ratio(r, "tokamax"),
                f"{r.temporary_arrays:.2f}",
                share(r.visited),
                share(r.live),
                share(r.in_full),
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _write(results: list[Result], matmul: float | None) -> None:
    device = jax.devices()[0]
    about = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "dtype": _DTYPE.value,
        "width": _WIDTH.value,
        "window": _WINDOW.value,
        "skip_mass": _SKIP_MASS.value,
        "skip_dead": _SKIP_DEAD.value,
        **provenance.made_by("benchmarks.attention"),
        "matmul_teraflops": matmul,
        "results": [dataclasses.asdict(result) for result in results],
    }
    output = pathlib.Path(_OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    head = f"{device.device_kind}, {_DTYPE.value}, W = {_WIDTH.value}, jax {jax.__version__}"
    if _WINDOW.value:
        head += f", window {_WINDOW.value}"
    if matmul:
        head += f"; products of 8192 x 8192 bfloat16 matrices: {matmul:.0f} TFLOP/s"
    output.with_suffix(".md").write_text(f"{head}\n\n{table(results, matmul)}")


def main(argv: list[str]) -> None:
    """Times everything and writes what came out, shape by shape."""
    del argv
    for name in _CASES.value:
        require(name in cases.CASES, "--cases", name, "one of " + ", ".join(cases.CASES))
    if "cudnn_window" in _IMPLEMENTATIONS.value:
        require(_WINDOW.value is not None, "--window", None, "given for cudnn_window")
    if "learned" in _CASES.value:
        exists = os.path.exists(_LEARNED.value)
        require(exists, "--learned", _LEARNED.value, "a file for the case `learned`")
    results: list[Result] = []
    matmul = None if jax.default_backend() == "cpu" else _matmul_rate()
    for text in _SHAPES.value:
        results += _run_shape(cases.Shape.parse(text))
        print(table(results, matmul), flush=True)
        _write(results, matmul)
    for result in results:
        if result.kernels:
            print(result.shape, result.case, result.implementation, result.which)
            for name, ms in list(result.kernels.items())[:25]:
                print(f"  {ms:8.4f} ms  {name}")


if __name__ == "__main__":
    app.run(main)
