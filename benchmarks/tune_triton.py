"""Writes pallas_kernels/triton/blocks.py: which block sizes each kernel is launched with.

On a GPU, by timing every candidate on the `dense` and `alibi` cases of attention.py:

    python -m benchmarks.tune_triton --head_dims=64,128 --dtype=bfloat16

Without one, the first candidate that neither spills nor runs out of shared memory:

    python -m benchmarks.tune_triton --static --capabilities=80,89,90
"""

import concurrent.futures
import contextlib
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jaxtyping import Array

from benchmarks import cases, timing, triton_static
from lazyattn import paths
from pallas_kernels import gpu
from pallas_kernels.problem import Inputs
from pallas_kernels.triton import backend, config
from pallas_kernels.triton import blocks as table
from pallas_kernels.triton.backward_dbias import backward_dbias
from pallas_kernels.triton.backward_dkv import backward_dkv
from pallas_kernels.triton.backward_dq import backward_dq
from pallas_kernels.triton.forward import forward
from pallas_kernels.triton.plan import Plan

Row = tuple[int, int, int, int]
KERNELS = [field.name for field in dataclasses.fields(config.Blocks)]


def candidates(kernel: str, itemsize: int, head_dim: int) -> list[Row]:
    """Returns what is worth trying, the likely best first."""
    if itemsize == 4:
        # No tensor cores: every product is a sum of registers, so tiles are small.
        rows = [(16, 16, 8, 1), (16, 16, 4, 1)]
        return [(32, 32, 8, 1), (32, 16, 4, 1), *rows] if head_dim <= 64 else rows
    wide = head_dim > 128
    rows: list[Row]
    if kernel in ("inference", "forward"):
        rows = [(64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2), (128, 64, 8, 2)]
        rows += [(128, 128, 8, 2), (64, 128, 4, 2)]
        if head_dim == 128:
            rows = [(128, 64, 8, 3), (64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 3)]
            rows += [(128, 128, 8, 2), (128, 32, 8, 3)]
        rows += [(64, 32, 4, 3), (64, 32, 4, 2)]
    elif kernel == "backward_dkv":
        rows = [(64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 3), (64, 128, 8, 2), (32, 64, 4, 2)]
        rows += [(32, 128, 8, 3)]
        if head_dim == 128:
            rows = [
                (32, 64, 4, 3),
                (32, 64, 4, 2),
                (32, 128, 8, 3),
                (64, 64, 8, 2),
                (32, 128, 8, 2),
            ]
            rows += [(64, 64, 4, 2)]
    else:
        rows = [(64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 4, 3)]
        if head_dim == 128:
            rows = [(64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 3), (64, 32, 4, 3), (64, 32, 4, 2)]
    if wide:
        rows = [(64, 64, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)]
    small = [(32, 32, 4, 2), (32, 16, 4, 2), (16, 32, 4, 2), (16, 16, 4, 1), (16, 16, 8, 1)]
    return [*rows, (64, 32, 4, 1), (32, 32, 8, 2), (32, 32, 4, 1), *small]


def _allowed(kernel: str, row: Row, chosen: dict[str, Row]) -> bool:
    """Returns whether a row goes with those chosen before it."""
    queries, keys = row[:2]
    if kernel == "backward_dq":
        return chosen["forward"][0] % queries == 0 and queries % keys == 0
    if kernel == "backward_dbias":
        return row[:2] == chosen["backward_dq"][:2]
    return True


def _blocks(chosen: dict[str, Row], kernel: str, row: Row) -> config.Blocks:
    """Returns the blocks chosen so far with one more; small ones for the rest."""
    rows = {name: (16, 16, 4, 1) for name in KERNELS} | chosen | {kernel: row}
    if kernel != "backward_dbias" and (kernel == "backward_dq" or "backward_dbias" not in chosen):
        rows["backward_dbias"] = rows["backward_dq"]
    return config.Blocks(**{name: config.Block(*row) for name, row in rows.items()})


def choose_static(capability: int, itemsize: int, head_dim: int) -> dict[str, Row]:
    """Returns the first candidates that compile well, packed documents included."""
    chosen: dict[str, Row] = {}
    dtype = "float32" if itemsize == 4 else "bfloat16"
    for kernel in KERNELS:
        best: tuple[int, Row] | None = None
        for row in candidates(kernel, itemsize, head_dim):
            if not _allowed(kernel, row, chosen):
                continue
            blocks, spilled = _blocks(chosen, kernel, row), 0
            for packed in (False, True):
                launches = triton_static.launches(
                    capability, head_dim, dtype, packed=packed, blocks=blocks
                )
                found = triton_static.report(launches[kernel], capability)
                spilled += found.spilled if found.programs else 10**9
                spilled += 1000 * found.serialized
            print(capability, itemsize, head_dim, kernel, row, f"spilled {spilled}", flush=True)
            if best is None or spilled < best[0]:
                best = spilled, row
            if spilled == 0:
                break
        assert best is not None
        chosen[kernel] = best[1]
    return chosen


@dataclasses.dataclass(frozen=True)
class Case:
    """One case's arrays on the GPU, and how much its time counts."""

    plan: Plan
    inputs: Inputs
    d_out: Array
    weight: float

    @classmethod
    def make(cls, case: str, shape: cases.Shape, dtype: str, weight: float) -> "Case":
        tensors = cases.tensors(shape, dtype, seed=0)
        parameters = cases.parameters(case, shape, 1024, None)
        problem, inputs = cases.call(tensors, parameters)
        return cls(backend.plan(problem), inputs, tensors[3], weight)


def _table(plan: Plan, inputs: Inputs) -> Any:
    return backend.table(plan, inputs.distance_bias, inputs.distance_slope, inputs.query.shape[1])


def _saved(case: Case, kernel: str, chosen: dict[str, Row]) -> Any:
    """Returns what a kernel of the backward pass reads that other kernels write."""
    names = KERNELS[: KERNELS.index(kernel)]
    known = {name: chosen[name] for name in names if name in chosen}
    plan = dataclasses.replace(
        case.plan, blocks=_blocks(known, "forward", known.get("forward", (64, 64, 4, 2)))
    )

    @jax.jit
    def run(inputs: Inputs, d_out: Array) -> Any:
        table = _table(plan, inputs)
        first = backend.ranges(plan, inputs, table, training=True)
        _, residuals = forward(plan, inputs, table, first, training=True)
        if kernel == "backward_dq":
            return first, residuals, d_out
        _, row_stats, *_ = backward_dq(plan, inputs, table, first, residuals, d_out)
        return first, residuals, row_stats, d_out

    return run(case.inputs, case.d_out)


def measure(
    kernel: str, rows: list[Row], chosen: dict[str, Row], every: list[Case]
) -> dict[Row, float]:
    """Returns the weighted milliseconds of a kernel with each row; failed rows left out."""
    backward = kernel.startswith("backward")
    saved = [_saved(case, kernel, chosen) if backward else None for case in every]

    def compile_one(row: Row, case: Case, before: Any) -> Callable[[], Any] | None:
        known = {name: value for name, value in chosen.items() if name != "backward_dbias"}
        if kernel == "backward_dbias":
            known["backward_dq"] = (*row[:2], 4, 1)
        plan = dataclasses.replace(case.plan, blocks=_blocks(known, kernel, row))
        training = kernel == "forward"

        def run(inputs: Inputs, before: Any) -> Any:
            table = _table(plan, inputs)
            if not backward:
                return forward(plan, inputs, table, before, training=training)
            if kernel == "backward_dq":
                return backward_dq(plan, inputs, table, *before)
            if kernel == "backward_dkv":
                return backward_dkv(plan, inputs, table, *before)
            return backward_dbias(plan, inputs, table, *before, groups=1)

        if not backward:
            before = jax.jit(
                lambda inputs: backend.ranges(plan, inputs, _table(plan, inputs), training=training)
            )(case.inputs)
        try:
            function = jax.jit(run).lower(case.inputs, before).compile()
            jax.block_until_ready(function(case.inputs, before))
        except Exception as error:
            print(f"{kernel} {row}: {str(error).splitlines()[0][:120]}", flush=True)
            return None
        return lambda: function(case.inputs, before)

    jobs = [(row, n) for row in rows for n in range(len(every))]
    with concurrent.futures.ThreadPoolExecutor(_JOBS.value) as pool:
        functions = dict(
            zip(
                jobs,
                pool.map(lambda job: compile_one(job[0], every[job[1]], saved[job[1]]), jobs),
                strict=True,
            )
        )
    times: dict[Row, float] = {}
    for row in rows:
        runs = [functions[row, n] for n in range(len(every))]
        if any(run is None for run in runs):
            continue
        each = [timing.milliseconds(run) for run in runs]
        times[row] = sum(inputs.weight * ms for inputs, ms in zip(every, each, strict=True))
        shown = " ".join(f"{ms:.3f}" for ms in each)
        print(f"{kernel} {row}: {shown} ms", flush=True)
    return times


def choose_measured(
    shape: cases.Shape, dtype: str, save: Callable[[dict[str, Row]], None]
) -> dict[str, Row]:
    """Returns the fastest candidates on this GPU; `save` gets those known so far."""
    itemsize = jnp.dtype(dtype).itemsize
    # A sparse case takes less time, and matters at least as much.
    every = [Case.make("dense", shape, dtype, 1.0), Case.make("alibi", shape, dtype, 2.0)]
    chosen: dict[str, Row] = {}

    def fastest(kernel: str, rows: list[Row]) -> dict[Row, float]:
        allowed = [row for row in rows if _allowed(kernel, row, chosen)]
        return measure(kernel, allowed, chosen, every)

    def tried(kernel: str) -> list[Row]:
        return candidates(kernel, itemsize, shape.head_dim)[: _TRIED.value]

    for kernel in ("inference", "forward"):
        times = fastest(kernel, tried(kernel))
        chosen[kernel] = min(times, key=times.__getitem__)
        save(chosen)
    # These two have tiles of the same size.
    query_times = fastest("backward_dq", tried("backward_dq"))
    chosen["backward_dq"] = min(query_times, key=query_times.__getitem__)
    sizes = {row[:2] for row in query_times}
    bias_rows = [row for row in tried("backward_dbias") if row[:2] in sizes]
    bias_times = measure("backward_dbias", bias_rows, chosen, every)
    pairs = {
        (one, other): query_times[one] + bias_times[other]
        for one in query_times
        for other in bias_times
        if one[:2] == other[:2]
    }
    chosen["backward_dq"], chosen["backward_dbias"] = min(pairs, key=pairs.__getitem__)
    save(chosen)
    times = fastest("backward_dkv", tried("backward_dkv"))
    chosen["backward_dkv"] = min(times, key=times.__getitem__)
    return chosen


def write(rows: dict[tuple[str, int, int], dict[str, Row]], path: pathlib.Path) -> None:
    """Writes the table."""
    lines = ["GPU   bytes head  " + "".join(f"{kernel:16}" for kernel in KERNELS).rstrip()]
    for key in sorted(rows):
        cells = ("{:3} {:3} {:2} {:2}".format(*rows[key][kernel]) for kernel in KERNELS)
        line = "{} {:5} {:4}  ".format(*key) + "".join(f"{cell:16}" for cell in cells)
        lines.append(line.rstrip())
    source = pathlib.Path(table.__file__).read_text()
    path.write_text(source.replace(table.TABLE, "\n" + "\n".join(lines) + "\n"))


_STATIC = flags.DEFINE_boolean("static", False, "Choose without a GPU.")
_CAPABILITIES = flags.DEFINE_list("capabilities", ["80", "89", "90"], "With --static.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "float16 is as bfloat16.")
_HEAD_DIMS = flags.DEFINE_list("head_dims", ["32", "64", "128", "256"], "Head sizes.")
_SIZES = flags.DEFINE_string("sizes", "4x16x4096", "Batch x heads x length to time with.")
_TRIED = flags.DEFINE_integer("tried", 8, "Candidates a kernel, of those that may be best.")
_JOBS = flags.DEFINE_integer("jobs", 8, "Kernels compiled at once.")
_OUTPUT = paths.define(
    "output", str(pathlib.Path(table.__file__)), "Table to update, or a new file."
)


def main(argv: list[str]) -> None:
    """Chooses, prints and writes."""
    del argv
    rows: dict[tuple[str, int, int], dict[str, Row]] = dict(table.BLOCKS)
    itemsize = jnp.dtype(_DTYPE.value).itemsize
    path = pathlib.Path(_OUTPUT.value)
    capabilities = [int(x) for x in _CAPABILITIES.value]
    if not _STATIC.value:
        capability = gpu.compute_capability()
        assert capability is not None, "no NVIDIA GPU; --static does without"
        capabilities = [capability]
    for capability in capabilities:
        for head_dim in map(int, _HEAD_DIMS.value):
            key = config.table_key(capability, itemsize, head_dim)
            before = rows.get(key, {})

            def save(chosen: dict[str, Row], key: Any = key, before: Any = before) -> None:
                merged = before | chosen
                with contextlib.suppress(AssertionError, TypeError):  # not a whole row yet
                    config.Blocks(**{name: config.Block(*row) for name, row in merged.items()})
                    rows[key] = merged
                    write(rows, path)

            if _STATIC.value:
                chosen = choose_static(capability, itemsize, head_dim)
            else:
                shape = cases.Shape.parse(f"{_SIZES.value}x{head_dim}")
                chosen = choose_measured(shape, _DTYPE.value, save)
            save(chosen)
            print(capability, head_dim, chosen, flush=True)


if __name__ == "__main__":
    app.run(main)
