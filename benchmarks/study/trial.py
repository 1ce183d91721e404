"""`python -m benchmarks.study trial`: how fast a step is with several settings, nothing trained."""

import json
import time
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks.study import data, measures, train
from benchmarks.study.programs import Compiler, Programs
from benchmarks.study.run import Options, one_device, say, set_cache
from benchmarks.study.settings import Spec, experiment_of, parse_overrides
from lazyattn.errors import bad_value
from lazyattn.experiment import ExperimentConfig

# Steps whose rows are on the device.
_STEPS = 64


def trial(options: Options, settings: Sequence[str], *, steps: int, rounds: int) -> list[Any]:
    """Times steps of freshly initialized weights; prints a line of JSON for each setting.

    Args:
      options: as for a run; the first learning rate and seed count.
      settings: each some settings with blanks between them, on top of the options' own;
        "batch=8" is the number of rows. None: the options' own alone.
      steps: in a row, between waiting for the device.
      rounds: the median of so many counts.

    Returns:
      The lines.

    Raises:
      InputError: for a bad setting, before anything is compiled.
    """
    wanted = [
        (spec, experiment_of(spec))
        for variant in options.variants
        for text in (settings or [""])
        for spec in [_spec(options, variant, text)]
    ]
    set_cache(options.cache)
    tokens = data.read(options.data)
    mesh = one_device()
    compiler = Compiler()
    stream = None
    lines = []
    try:
        for spec, experiment in wanted:
            programs = Programs(
                compiler, experiment, eos=tokens.eos, tokens=tokens.train.size, mesh=mesh
            )
            stream = programs.put(tokens.train) if stream is None else stream
            try:
                found = _time(programs, experiment, tokens, stream, steps, rounds)
            except Exception as error:  # Too much memory, say: the others are worth timing.
                found = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
            settings_of = " ".join(f"{name}={text}" for name, text in spec.overrides)
            lines.append(
                {"variant": spec.variant, "batch": spec.batch, "settings": settings_of} | found
            )
            print(json.dumps(lines[-1]), flush=True)
    finally:
        compiler.close()
    return lines


def _spec(options: Options, variant: str, text: str) -> Spec:
    overrides, batch = dict(options.overrides), options.batch
    for name, value in parse_overrides(text.split(), "--try"):
        if name == "batch":
            if not value.isdigit():
                raise bad_value("--try's batch", value, "a whole number")
            batch = int(value)
        else:
            overrides[name] = value
    tokens = _STEPS * batch * options.length
    rate, factor = options.learning_rates[0], options.log_slope_factors[0]
    seed = options.seeds[0]
    pairs = tuple(overrides.items())
    return Spec(variant, seed, tokens, rate, factor, batch, options.length, pairs)


def _time(
    programs: Programs,
    experiment: ExperimentConfig,
    tokens: data.Tokens,
    stream: jax.Array,
    steps: int,
    rounds: int,
) -> dict[str, Any]:
    start = time.perf_counter()
    create, _, step = (ask().result() for ask in (programs.create, programs.cut, programs.step))
    seconds = time.perf_counter() - start
    starts = programs.put(train.order_of(tokens, experiment).starts)
    nothing = measures.Material(0, {}, tokens.eos, None, {}, starts)  # type: ignore[arg-type]
    course = train.Course(stream, starts, nothing)
    state = create.run(0, experiment.optimizer.learning_rate)
    ms, state = train.time_steps(programs, course, state, cudnn=False, steps=steps, rounds=rounds)
    rate = experiment.data.batch_size * experiment.data.sequence_length / ms
    stats = jax.devices()[0].memory_stats() or {}
    say(f"compiled in {seconds:.1f} s, the step in {step.seconds:.1f} s")
    return {
        "ms_per_step": round(ms, 3),
        "tokens_per_second": round(1000 * rate),
        "seconds_compile": round(seconds, 1),
        "seconds_compile_step": round(step.seconds, 1),
        "gib_step": round(step.bytes / 2**30, 3),
        "gib_peak_so_far": round((stats.get("peak_bytes_in_use") or 0) / 2**30, 3),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
    }
