"""Times the planning of a Hopper call, by Triton kernels and in plain JAX, beside a training call.

    python -m benchmarks.planning --output=benchmarks/results/planning.jsonl

Planning is all that goes before and after the attention kernels of a forward and a backward pass:
the bias table, the ranges of tiles, the orders of work tiles, and the sums that give the gradients
of bias, slope and tau. It is timed alone, `--repeats` times in one program, so that the host has
no part in it; and as a part of the training call, which is timed with either planner.

Prints a line a shape, case and planner:

- planning: ms, alone;
- training: ms of out and all gradients with this planner;
- share: planning / training;
- launches: kernels, copies and the like that XLA launches for the planning.

`--output` gets the same as JSON lines, case by case. The case `alibi` has the shortest training
call, so planning's share is largest there.
"""

import concurrent.futures
import dataclasses
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jax import lax
from jaxtyping import Array, Int

from benchmarks import cases, timing
from lazyattn import lazy_attention, paths
from lazyattn.errors import require
from pallas_kernels import problem
from pallas_kernels.mosaic_gpu import backend, backward_dbias, backward_dq, forward
from pallas_kernels.mosaic_gpu.call import Call

_PLANNERS = ("triton", "xla")

# Its own where tests import this: other programs have flags of the same names.
FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_OWN: dict[str, Any] = {"flag_values": FLAGS}
_SHAPES = flags.DEFINE_list(
    "shapes", ["16x16x2048x64", "4x16x4096x64", "1x16x16384x64"], "As for attention.py.", **_OWN
)
_CASES = flags.DEFINE_list("cases", ["alibi"], "As for attention.py.", **_OWN)
_DOCUMENTS = flags.DEFINE_list(
    "documents", ["1", "8"], "Documents of equal length in a row.", **_OWN
)
_WIDTH = flags.DEFINE_integer("width", 1024, "Bias table.", **_OWN)
_REPEATS = flags.DEFINE_integer("repeats", 10, "Times a program plans.", lower_bound=1, **_OWN)
_CALLS = flags.DEFINE_integer("calls", 20, "Training calls in a row.", lower_bound=1, **_OWN)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Times each is timed; the median counts.", **_OWN)
_JOBS = flags.DEFINE_integer("jobs", 12, "Programs compiled at once.", lower_bound=1, **_OWN)
_OUTPUT = paths.define("output", None, "File for JSON lines; None: only print.", **_OWN)


@dataclasses.dataclass
class Line:
    """What was found of one planner; times in milliseconds, as (median, least, greatest)."""

    shape: str
    case: str
    documents: int
    planner: str
    launches: int = 0
    planning: tuple[float, float, float] = (0.0, 0.0, 0.0)
    training: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def share(self) -> float:
        """Part of the training call that is planning."""
        return self.planning[0] / self.training[0] if self.training[0] else 0.0

    def __str__(self) -> str:
        cells = [self.shape, self.case, str(self.documents), self.planner, str(self.launches)]
        cells += [f"{self.planning[0]:.4f}", f"{self.training[0]:.3f}", f"{self.share:.3f}"]
        return "| " + " | ".join(cells) + " |"


HEAD = (
    "| shape | case | documents | planner | launches | planning, ms | training, ms | share |\n"
    "|---|---|---|---|---|---|---|---|"
)


def segment_ids(shape: cases.Shape, documents: int) -> Int[Array, "batch length"] | None:
    """Returns rows of so many documents of equal length; None: one."""
    if documents == 1:
        return None
    place = jnp.arange(shape.length, dtype=jnp.int32)
    return jnp.broadcast_to(place // (shape.length // documents), (shape.batch, shape.length))


def training(planner: str) -> Callable[..., Any]:
    """Returns a function of (tensors, parameters, segment ids): out and all gradients."""

    def run(tensors: Any, parameters: dict[str, Array], ids: Array | None) -> Any:
        query, key, value, d_out = tensors

        def attention(query, key, value, parameters):
            settings = {"segment_ids": ids, "implementation": "mosaic_gpu"}
            with problem.options(planner=planner):
                return lazy_attention(query, key, value, **parameters, **settings)

        out, vjp = jax.vjp(attention, query, key, value, parameters)
        return out, vjp(d_out)

    return run


class Planning:
    """The planning alone, of calls of one shape and case, by one planner.

    Its functions take tensors, parameters and segment ids.
    """

    def __init__(self, planner: str):
        self.planner = planner

    def _call(self, tensors: Any, parameters: Any, ids: Array | None) -> Call:
        with problem.options(planner=self.planner):
            facts, inputs = cases.call(tensors, parameters, segment_ids=ids)
        plan, length = backend.plan(facts), inputs.query.shape[1]
        table = backend.table(plan, inputs.distance_bias, inputs.distance_slope, length)
        return Call(plan, inputs, table)

    def leftovers(self, tensors: Any, parameters: Any, ids: Array | None) -> tuple[Any, ...]:
        """Returns what the attention kernels leave: live, of_offset, sums, tail_sums."""
        call, d_out = self._call(tensors, parameters, ids), tensors[3]
        arrays = call.plan, call.inputs, call.table
        visits = backend.ranges(*arrays, training=False)
        _, residuals = backend.forward(*arrays, visits, training=True)
        ranges = backend.key_ranges(call, visits, residuals.live)
        order = ranges.tile_order[0]
        _, rows, *sums = backward_dq.backward_dq(call, residuals, visits, order, d_out)
        of_bias = backend.gradients_of_keys(call, rows, visits, ranges, d_out)[2]
        if of_bias is None:
            of_bias = backward_dbias.backward_dbias(call, rows, ranges, d_out)
        return residuals.live, sums[0], of_bias, sums[1]

    def once(self, tensors: Any, parameters: Any, ids: Array | None, leftovers: Any) -> Any:
        """Returns all that a training call plans."""
        live, of_offset, sums, tail_sums = leftovers
        call = self._call(tensors, parameters, ids)
        visits = backend.ranges(call.plan, call.inputs, call.table, training=False)
        planner = backend.planner(call.plan)
        orders = planner.tile_orders(visits.work, call.group, [forward.order(call, True)])
        # As between forward and backward pass, whose orders are made apart.
        visits = lax.optimization_barrier(visits)
        ranges = backend.key_ranges(call, visits, live)
        gradients = backend.gradients_of_parameters(call, 1, of_offset, sums, tail_sums)
        return call.table, visits, orders, ranges, gradients

    def many(self, *args: Any) -> Any:
        """Plans `--repeats` times, each time anew."""

        def step(n: Any, found: Any) -> Any:
            # Without the barrier XLA would see that every turn finds the same.
            given, _ = lax.optimization_barrier((args, found))
            return self.once(*given)

        found = jax.eval_shape(self.once, *args)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found)
        return lax.fori_loop(0, _REPEATS.value, step, nothing)


def launches(text: str) -> int:
    """Returns how many instructions of an optimized program's entry launch something."""
    entry = text[text.index("\nENTRY ") :]
    found = re.findall(r"^  (?:ROOT )?%?\S+ = .*? ([a-z][a-z0-9-]*)\(", entry, re.MULTILINE)
    free = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "iota")
    return sum(name not in free for name in found)


def measure(case: str, documents: int, shapes: list[cases.Shape]) -> list[Line]:
    """Compiles the programs of one case at all shapes, then times them."""
    jobs: list[tuple[Line, str, Any, tuple[Any, ...]]] = []
    lines = []
    for shape in shapes:
        parameters = cases.parameters(case, shape, _WIDTH.value)
        ids = segment_ids(shape, documents)
        args = (cases.tensors(shape, "bfloat16", seed=0), parameters, ids)
        for planner in _PLANNERS:
            line = Line(str(shape), case, documents, planner)
            lines.append(line)
            plans = Planning(planner)
            kinds = jax.eval_shape(plans.leftovers, *args)
            leftovers = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kinds)
            jobs.append((line, "once", plans.once, (*args, leftovers)))
            jobs.append((line, "planning", plans.many, (*args, leftovers)))
            jobs.append((line, "training", training(planner), args))

    def compiled(job: tuple[Line, str, Any, tuple[Any, ...]]) -> Any:
        line, name, function, args = job
        program = jax.jit(function).lower(*args).compile()
        if name == "once":
            line.launches = launches(program.as_text())
        return program

    with concurrent.futures.ThreadPoolExecutor(_JOBS.value) as pool:
        programs = list(pool.map(compiled, jobs))
    for shape in shapes:
        runs = {}
        for (line, name, _, args), program in zip(jobs, programs, strict=True):
            if line.shape == str(shape) and name != "once":
                jax.block_until_ready(program(*args))
                runs[name, line.planner] = lambda program=program, args=args: program(*args)
        for name in ("planning", "training"):
            calls = _CALLS.value if name == "training" else 3
            chosen = {planner: runs[name, planner] for planner in _PLANNERS}
            times = timing.rounds_of(chosen, calls=calls, rounds=_ROUNDS.value)
            for line in lines:
                if line.shape == str(shape):
                    repeats = _REPEATS.value if name == "planning" else 1
                    took = times[line.planner]
                    setattr(line, name, tuple(x / repeats for x in took))
        for line in lines:
            if line.shape == str(shape):
                print(line, flush=True)
    return lines


def main(argv: list[str]) -> None:
    """Measures every case and writes what came out."""
    del argv
    for name in _CASES.value:
        allowed = [x for x in cases.CASES if x != "learned"]
        require(name in allowed, "--cases", name, "one of " + ", ".join(allowed))
    shapes = [cases.Shape.parse(text) for text in _SHAPES.value]
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    print(", ".join(about.values()), f"W = {_WIDTH.value}", flush=True)
    print(HEAD, flush=True)
    for case in _CASES.value:
        for documents in _DOCUMENTS.value:
            lines = measure(case, int(documents), shapes)
            if _OUTPUT.value:
                with pathlib.Path(_OUTPUT.value).open("a") as file:
                    for line in lines:
                        found = about | dataclasses.asdict(line) | {"share": line.share}
                        file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    app.run(main)
