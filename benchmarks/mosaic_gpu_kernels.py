"""Times each of the Hopper kernels, with several tunings, on the cases of attention.py.

    python -m benchmarks.mosaic_gpu_kernels --shapes=4x16x4096x64 --cases=dense,alibi

Prints one line a kernel, case and tuning: milliseconds, and what a tile of 64 queries x 64
keys that is not negligible costs in clocks of one SM. What is best belongs into
pallas_kernels/mosaic_gpu/config.py. MOSAIC_GPU_DUMP_PTXAS=1 adds registers and spills.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import cases, timing
from pallas_kernels.mosaic_gpu import backend, backward_dbias, backward_dq
from pallas_kernels.mosaic_gpu.call import Call
from pallas_kernels.mosaic_gpu.config import Tuning
from pallas_kernels.mosaic_gpu.plan import BLOCK, Plan
from pallas_kernels.problem import Inputs

KERNELS = (
    "inference",
    "forward",
    "backward_dq",
    "backward_dkv",
    "backward_dv",
    "backward_dbias",
)

_SHAPES = flags.DEFINE_list("shapes", ["4x16x4096x64"], "As for attention.py.")
_CASES = flags.DEFINE_list("cases", ["dense", "alibi"], "As for attention.py.")
_KERNELS = flags.DEFINE_list("kernels", list(KERNELS), "Which to time.")
_WIDTH = flags.DEFINE_integer("width", 1024, "Bias table.")
_CANDIDATES = flags.DEFINE_boolean("candidates", True, "Try other tunings than the config's.")
_OFFSET = flags.DEFINE_boolean("offset", True, "Elastic-Softmax; else softmax.")
_JOBS = flags.DEFINE_integer("jobs", 12, "Programs compiled at once.")
_CALLS = flags.DEFINE_integer("calls", 10, "Calls in a row.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Times each is timed; the median counts.")

# Of an H100 SXM; the clock is what it ran at while this was measured.
_SMS, _GIGAHERTZ = 132, 1.98


def candidates(kernel: str, head_dim: int, chosen: Any) -> Iterator[Any]:
    """Returns tunings worth trying, the config's `chosen` first."""
    yield chosen
    if not _CANDIDATES.value:
        return
    found: list[Any] = []
    small = head_dim == 64
    if kernel in ("inference", "forward"):
        for groups, stages in ((2, 3), (3, 3), (3, 4)):
            tuning = Tuning(warpgroups=groups, stages=stages, in_registers=small)
            found += [tuning, dataclasses.replace(tuning, ahead=True)]
    elif kernel == "backward_dbias":
        found += [Tuning(stages=4 if small else 2), Tuning(warpgroups=3, stages=3)]
    else:
        for groups, stages, registers in ((2, 4, True), (2, 2, False), (3, 3, False)):
            if small or not registers:
                found.append(Tuning(warpgroups=groups, stages=stages, in_registers=registers))
    yield from (tuning for tuning in found if tuning != chosen)


@dataclasses.dataclass
class Job:
    """One kernel, with one tuning, on one case."""

    case: str
    kernel: str
    tuning: Any
    run: Callable[[], Any] | None = None


def _inputs(case: str, shape: cases.Shape) -> tuple[Plan, Inputs, Any]:
    tensors = cases.tensors(shape, "bfloat16", seed=0)
    parameters = cases.parameters(case, shape, _WIDTH.value, None)
    if not _OFFSET.value:
        del parameters["offset"]
    problem, inputs = cases.call(tensors, parameters)
    return backend.plan(problem), inputs, tensors[3]


def _table(plan: Plan, inputs: Inputs) -> Any:
    return backend.table(plan, inputs.distance_bias, inputs.distance_slope, inputs.query.shape[1])


def measure(shape: cases.Shape) -> None:
    """Times everything at one shape and prints it."""
    jobs: list[tuple[Job, Plan, Inputs, Any]] = []
    tiles: dict[str, tuple[float, float]] = {}
    for case in _CASES.value:
        plan, inputs, d_out = _inputs(case, shape)

        @jax.jit
        def before(inputs, d_out, plan=plan):
            table = _table(plan, inputs)
            visits = backend.ranges(plan, inputs, table, training=False)
            _, residuals = backend.forward(plan, inputs, table, visits, training=True)
            call = Call(plan, inputs, table)
            ranges = backend.key_ranges(call, visits, residuals.live)
            _, rows, *_ = backward_dq.backward_dq(
                call, residuals, visits, ranges.tile_order[0], d_out
            )
            live = visits.first if residuals.live is None else residuals.live
            return residuals, rows, visits, live, d_out, table

        saved = before(inputs, d_out)
        block = jnp.arange(saved[2].first.shape[-1])
        every = shape.batch * shape.heads * (block + 1).sum()
        visited, live = ((block + 1 - x).sum() for x in (saved[2].first, saved[3]))
        print(f"{shape} {case}: visited {visited / every:.3f}, live {live / every:.3f}")
        tiles[case] = (float(visited), float(live))
        for kernel in _KERNELS.value:
            if getattr(plan.tunings, kernel) is None:
                continue  # dK's kernel does its work.
            for tuning in candidates(kernel, shape.head_dim, getattr(plan.tunings, kernel)):
                tunings = dataclasses.replace(plan.tunings, **{kernel: tuning})
                job = Job(case, kernel, tuning)
                jobs.append((job, dataclasses.replace(plan, tunings=tunings), inputs, saved))

    def compiled(item: tuple[Job, Plan, Inputs, Any]) -> None:
        job, plan, inputs, saved = item

        def run(inputs, saved):
            residuals, rows, visits, _, d_out, table = saved
            if job.kernel in ("inference", "forward"):
                training = job.kernel == "forward"
                return backend.forward(plan, inputs, table, visits, training=training)[0]
            call = Call(plan, inputs, table)
            ranges = backend.key_ranges(call, visits, residuals.live)
            if job.kernel == "backward_dq":
                order = ranges.tile_order[0]
                return backward_dq.backward_dq(call, residuals, visits, order, d_out)
            if job.kernel in ("backward_dkv", "backward_dv"):
                # Both, where there are two.
                return backend.gradients_of_keys(call, rows, visits, ranges, d_out)
            return backward_dbias.backward_dbias(call, rows, ranges, d_out)

        try:
            program = jax.jit(run).lower(inputs, saved).compile()
            jax.block_until_ready(program(inputs, saved))
            job.run = lambda: program(inputs, saved)
        except Exception as error:
            print(job.case, job.kernel, job.tuning, str(error).splitlines()[0][:150], flush=True)

    with concurrent.futures.ThreadPoolExecutor(_JOBS.value) as pool:
        list(pool.map(compiled, jobs))
    for job, *_ in jobs:
        if job.run is None:
            continue
        ms = timing.milliseconds(job.run, calls=_CALLS.value, rounds=_ROUNDS.value)
        clocks = ms * 1e6 * _GIGAHERTZ * _SMS / tiles[job.case][0]
        fields = dataclasses.asdict(job.tuning)
        said = " ".join(f"{name}={value}" for name, value in fields.items())
        print(
            f"{job.case:6s} {job.kernel:15s} {ms:7.3f} ms {clocks:6.0f} clocks  {said}", flush=True
        )


def main(argv: list[str]) -> None:
    """Measures every shape."""
    del argv
    print(jax.devices()[0].device_kind, "tiles of", BLOCK)
    for text in _SHAPES.value:
        measure(cases.Shape.parse(text))


if __name__ == "__main__":
    app.run(main)
