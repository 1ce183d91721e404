"""Training steps side by side on one GPU, each in processes of its own; a JSON line for each.

    python -m benchmarks.step_table --runs=340m/lazy/none,340m/cudnn/none --deadline=570
    python -m benchmarks.step_table --runs=340m/lazy/full,340m/cudnn/full,340m/lazy/auto
    python -m benchmarks.step_table --runs=46m/lazy/none,46m/cudnn/none,340m/jla/none
    python -m benchmarks.step_table --runs=340m/lazy/none,46m/lazy/none --parts

A run is MODEL/ATTENTION/REMAT, and /LENGTH, /scan or /fp8 behind it where they are not the
default:

- models: 46m is that of the study, 340m and 1300m are the recipes, all of 4,096 tokens a row and
  without a scan over layers, which on a GPU costs time and memory (/scan has it);
- attentions: those of `benchmarks.train_step` (lazy, biased, softmax, cudnn, paper), and jla or
  jla_fp8: the same model in jax-linear-attention, at the best settings that its configuration names
  (memory lean VJPs, its own cross entropy with the gradient in the forward pass), softmax attention
  by whatever it chooses;
- remat: none, dots, attention, full or auto;
- fp8: ours with `training.quantization=fp8`. Its line says how many products the compiled program
  has in float8 by cuBLASLt (`__cublas$lt$matmul$f8`) and how many by Triton.

A run is a process that compiles with an empty cache and times the step, then one that compiles
again with what the first kept, unless --nowarm is given. Seconds of the two count from calling
`lower` to the end of `compile`; those to the first step count from the start of the process.
`--parts` traces the step, too (`benchmarks.step_profile`); CUDA graphs are off then, so time
without it for a table.

On an H200 a run takes about 60 s (340m), 45 s (46m), 90 s (1300m), and 20 s more with `--parts`:
estimates, not measured. With `--deadline` no run is begun that would not be over in time, and what
the file has from the same commit is left out: the same command again goes on.

The peer is read from a folder, which must not be in the environment of the project:

    pip install --no-deps --target build/jla jax-linear-attention==0.1.0 equinox==0.13.8 \\
        safetensors==0.8.0 typeguard==4.6.1 wadler_lindig==0.1.8
    python -m benchmarks.step_table --runs=340m/jla/none,340m/jla_fp8/none --peer=build/jla
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags

from benchmarks import provenance
from lazyattn import paths
from lazyattn.errors import InputError, require

# Rows of a step and the seconds that a run is expected to take.
MODELS = {"46m": (16, 45.0), "340m": (8, 60.0), "1300m": (4, 90.0)}
PEERS = ("jla", "jla_fp8")
REMATS = ("none", "dots", "attention", "full", "auto")
LENGTH = 4096
_STEPS, _ROUNDS, _TRACED = 5, 5, 3
_EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "backend",
}
# What may stand behind a run's name, in this order.
_SWITCHES = ("scan", "fp8")
_GRAPHS_OFF = "--xla_gpu_enable_command_buffer="


@dataclasses.dataclass(frozen=True)
class Run:
    """What is timed: see the module."""

    model: str
    attention: str
    remat: str
    length: int = LENGTH
    scan: bool = False
    fp8: bool = False

    @property
    def seconds(self) -> float:
        """An estimate of what it takes."""
        return MODELS[self.model][1]

    @property
    def batch(self) -> int:
        """Rows of a step: the tokens are those of rows of the default length."""
        return max(1, MODELS[self.model][0] * LENGTH // self.length)

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        more = [] if self.length == LENGTH else [str(self.length)]
        more += [name for name in _SWITCHES if getattr(self, name)]
        return "/".join([self.model, self.attention, self.remat, *more])


def parse(text: str) -> Run:
    """Returns a run from its name.

    Raises:
      InputError: for another name.
    """
    from benchmarks.train_step import KINDS

    parts = text.split("/")
    given = [name for name in _SWITCHES if name in parts]
    if given and parts[-len(given) :] == given:
        parts = parts[: -len(given)]
    length = int(parts.pop()) if parts and parts[-1].isdecimal() else LENGTH
    fine = (
        len(parts) == 3
        and parts[0] in MODELS
        and parts[1] in (*KINDS, *PEERS)
        and parts[2] in REMATS
        and length >= 2
        and not (parts[1] in PEERS and "fp8" in given)
    )
    if not fine:
        raise InputError(
            f"--runs has {text!r}, but a run must be MODEL/ATTENTION/REMAT with"
            f" {', '.join(MODELS)}; {', '.join((*KINDS, *PEERS))}; {', '.join(REMATS)}."
        )
    return Run(*parts, length=length, **dict.fromkeys(given, True))


def experiment_of(run: Run) -> Any:
    """Returns the settings of a run; its attention is left to whoever times it."""
    from benchmarks.study import settings
    from lazyattn.experiment import from_config_dict
    from lazyattn.recipes import recipe
    from lazyattn.sharding import MeshConfig

    if run.model == "46m":
        spec = settings.Spec("sharp_qk_norm_steady", 0, tokens=10**9, learning_rate=1e-3)
        experiment = settings.experiment_of(spec)
    else:
        experiment = from_config_dict(recipe(run.model, "10b", "sharp_norm"))
    return dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, remat=run.remat, scan_layers=run.scan),
        data=dataclasses.replace(experiment.data, batch_size=run.batch, sequence_length=run.length),
        training=dataclasses.replace(
            experiment.training, quantization="fp8" if run.fp8 else "none"
        ),
        mesh=MeshConfig(data=1, fsdp=1),
    )


def _timed(step: Callable[[], Any]) -> float:
    """Returns the milliseconds of a step, the median of rounds of some steps in a row."""
    import jax

    times = []
    for _ in range(_ROUNDS + 1):
        begin = time.perf_counter()
        for _ in range(_STEPS):
            result = step()
        jax.block_until_ready(result)
        times.append(1e3 * (time.perf_counter() - begin) / _STEPS)
    return statistics.median(times[1:])


def _durations() -> dict[str, float]:
    """Returns seconds that JAX traces, lowers and compiles from now on, or reads what was compiled.

    They are those of the process, the step's and the others.
    """
    import jax

    found = dict.fromkeys((f"{name}_s" for name in _EVENTS.values()), 0.0)

    def listen(name: str, seconds: float, **_: Any) -> None:
        if name in _EVENTS:
            found[f"{_EVENTS[name]}_s"] += seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    return found


def _ours(run: Run, began: float, *, warm: bool, parts: bool) -> dict[str, Any]:
    import jax
    import numpy as np

    from benchmarks import step_profile, train_step
    from lazyattn import sharding
    from lazyattn.compile.hlo import Module
    from lazyattn.model.accounting import parameter_counts

    experiment = experiment_of(run)
    mesh = sharding.make_mesh(experiment.mesh, jax.devices()[:1])
    durations = _durations()
    found: dict[str, Any] = {"start_s": time.time() - began}
    begin = time.perf_counter()
    compiled, factory = train_step.compiled_beside_state(run.attention, experiment, mesh)
    found |= {"compile_s": time.perf_counter() - begin, **durations}
    state = factory.create()
    random = np.random.default_rng(1)
    batches = [train_step.random_batch(experiment, mesh, random) for _ in range(4)]
    state, metrics = jax.block_until_ready(compiled(state, batches[0]))
    found["first_step_s"] = time.time() - began
    if warm:
        return found
    memory = compiled.memory_analysis()
    count = 0

    def step() -> Any:
        nonlocal state, metrics, count
        count += 1
        state, metrics = compiled(state, batches[count % len(batches)])
        return metrics

    ms = _timed(step)
    found |= _facts(experiment, ms, memory)
    found["parameters"] = parameter_counts(state.params)["total"]
    found["loss"] = float(metrics["loss"])
    if run.fp8:
        found["fp8_products"] = fp8_products(Module.parse(compiled.as_text() or ""))
    if parts:

        def steps() -> Any:
            return [step() for _ in range(_TRACED)]

        module = Module.parse(compiled.as_text() or "")
        work, places = step_profile.parts_of(module)
        unknown = step_profile.add_times(work, places, step_profile.trace(steps), _TRACED)
        rates = step_profile.measure_rates()
        print(step_profile.table(work, rates), file=sys.stderr)
        found["rates"] = dataclasses.asdict(rates)
        found["parts"] = {name: dataclasses.asdict(part) for name, part in work.items()}
        found["unknown_ms"] = dict(sorted(unknown.items(), key=lambda item: -item[1])[:10])
    return found


def fp8_products(module: Any) -> dict[str, int]:
    """Returns how many products of a compiled program are in float8, by who computes them.

    Args:
      module: a `lazyattn.compile.hlo.Module`; what is in a loop counts once.
    """
    found = {"cublaslt": 0, "triton": 0}
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            if '"__cublas$lt$matmul$f8"' in instruction.rest:
                found["cublaslt"] += 1
            elif instruction.opcode == "dot":
                both = [computation.instructions[name] for name in instruction.operands]
                found["triton"] += all(one.arrays[0].dtype.startswith("f8") for one in both)
    return found


def _facts(experiment: Any, ms: float, memory: Any) -> dict[str, Any]:
    """Returns rate, MFU and memory of a step, by one rule for all programs."""
    import jax

    from benchmarks.train_step import _CHIP
    from lazyattn.compile.chips import CHIPS
    from lazyattn.model.accounting import flops_per_token

    rate = 1e3 * experiment.data.batch_size * experiment.data.sequence_length / ms
    device = jax.devices()[0]
    flops = flops_per_token(experiment.model, experiment.data.sequence_length).training
    chip = _CHIP.get(device.device_kind)
    bytes_ = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "ms": ms,
        "tokens_per_second": rate,
        "mfu": None if chip is None else rate * flops / CHIPS[chip].flops,
        "gflop_per_token": flops / 1e9,
        "gib": bytes_ / 2**30,
        "peak_gib": None if peak is None else peak / 2**30,
        "device": device.device_kind,
        "jax": jax.__version__,
    }


def _theirs(run: Run, began: float, *, warm: bool) -> dict[str, Any]:
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jla.config import OptimConfig
    from jla.models.config import AttentionConfig, ModelConfig
    from jla.models.lm import build_model
    from jla.training.optimizers import optimizer_from_config
    from jla.training.step import LossConfig, build_train_step, lm_loss

    experiment = experiment_of(run)
    model, on_gpu = experiment.model, jax.default_backend() == "gpu"
    att, fp8 = model.attention, run.attention == "jla_fp8"
    config = ModelConfig(
        vocab_size=model.vocab_size,
        d_model=model.width,
        n_layers=model.num_layers,
        d_ff=model.hidden_width,
        attention=AttentionConfig(att.num_heads, att.kv_heads, model.head_dim, qk_norm=att.qk_norm),
        norm_eps=model.norm_eps,
        tie_embeddings=model.tie_embeddings,
        remat=run.remat,
        scan_layers=run.scan,
        lean_vjp=run.remat == "none",
        **({"fp8": "delayed", "fp8_fused": True} if fp8 else {}),
    )
    loss = LossConfig(impl="auto", grad_in_forward=True) if on_gpu else LossConfig()
    settings = OptimConfig(lr=experiment.optimizer.learning_rate, eps=1e-15)
    optimizer = optimizer_from_config(settings, lambda step: jnp.float32(settings.lr))
    step_fn = build_train_step(optimizer, lm_loss(loss), update_guard="select")

    def make(key: Any) -> Any:
        return eqx.filter(build_model(config, key=key), eqx.is_array)

    key = jax.random.key(0)
    shape = eqx.filter_eval_shape(build_model, config, key=key)
    arrays = jax.jit(make)(key)
    params = eqx.combine(arrays, eqx.filter(shape, lambda x: not hasattr(x, "shape")))
    opt_state = jax.jit(optimizer.init)(eqx.filter(params, eqx.is_inexact_array))
    random = np.random.default_rng(1)
    tokens = random.integers(model.vocab_size, size=(4, 1, run.batch, run.length + 1))
    batches = [
        {"input_ids": jnp.asarray(t[..., :-1], jnp.int32), "labels": jnp.asarray(t[..., 1:])}
        for t in tokens.astype(np.int32)
    ]
    total = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(params, eqx.is_inexact_array)))
    begin = time.perf_counter()
    compiled = step_fn.lower(params, opt_state, batches[0], key).compile()
    seconds = time.perf_counter() - begin
    step_fn.use_compiled(compiled)
    state = (params, opt_state)
    metrics: Any = None
    del params, opt_state, arrays

    def step(count: list[int] = [0]) -> Any:  # noqa: B006
        nonlocal state, key, metrics
        count[0] += 1
        *new, metrics, key = step_fn(*state, batches[count[0] % 4], key)
        state = (new[0], new[1])
        return metrics

    jax.block_until_ready(step())
    found: dict[str, Any] = {"compile_s": seconds, "first_step_s": time.time() - began}
    if warm:
        return found
    ms = _timed(step)
    inner = compiled
    while not hasattr(inner, "memory_analysis"):
        inner = inner.compiled
    found |= _facts(experiment, ms, inner.memory_analysis())
    return found | {"parameters": total, "loss": float(metrics["loss"])}


def _child(run: Run, options: flags.FlagValues) -> dict[str, Any]:
    """Does one process's share of a run."""
    from lazyattn import compile_cache

    compile_cache.use(pathlib.Path(options.cache), limit=-1)
    warm = options.phase == "warm"
    if run.attention in PEERS:
        return _theirs(run, options.began, warm=warm)
    return _ours(run, options.began, warm=warm, parts=options.parts and not warm)


def measure(
    run: Run, *, parts: bool, peer: str | None, limit: float, warm: bool = True
) -> dict[str, Any]:
    """Returns a run's line; it starts the processes, which see the GPU one after the other.

    Args:
      run: what is timed.
      parts: trace it, too.
      peer: folder of the peer's packages.
      limit: seconds that they may take.
      warm: start the second, too.
    """
    found: dict[str, Any] = {}
    end = time.monotonic() + limit
    environment = dict(os.environ)
    if parts:
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {_GRAPHS_OFF}"
    if run.attention in PEERS and peer is not None:
        before = environment.get("PYTHONPATH", "")
        folder = str(pathlib.Path(peer).absolute())
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (before, folder)))
    with tempfile.TemporaryDirectory() as cache:
        for phase in ("cold", "warm") if warm else ("cold",):
            left = max(1.0, end - time.monotonic())
            command = [
                *(sys.executable, "-m", "benchmarks.step_table", f"--runs={run.name}"),
                *(f"--phase={phase}", f"--cache={cache}", f"--began={time.time()}"),
                *(["--parts"] if parts else []),
            ]
            try:
                done = subprocess.run(
                    command, env=environment, capture_output=True, text=True, timeout=left
                )
            except subprocess.TimeoutExpired:
                return found | {"error": f"{phase}: more than {left:.0f} s"}
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
                return found | {"error": f"{phase}: {lines[-1][:300]}"}
            if parts and phase == "cold":
                print(done.stderr[done.stderr.find("| part |") :], flush=True)
            one = json.loads(done.stdout.strip().splitlines()[-1])
            for name, value in one.items():
                seconds = name.removesuffix("_s")
                found[name if seconds == name else f"{seconds}_{phase}_s"] = value
    return found


def _commit() -> str | None:
    """Returns the commit that is measured, with + where files differ from it."""
    try:
        git = ["git", "-C", str(pathlib.Path(__file__).parent)]
        name = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
    except OSError:
        return None
    if name.returncode:
        return None
    return name.stdout.strip() + ("+" if changed.stdout else "")


def _done(output: pathlib.Path, commit: str | None, parts: bool) -> set[str]:
    if commit is None or not output.exists():
        return set()
    lines = map(json.loads, output.read_text().splitlines())
    return {
        line["run"]
        for line in lines
        if line["commit"] == commit and "error" not in line and ("parts" in line) >= parts
    }


def _run(options: flags.FlagValues) -> None:
    runs = [parse(text) for text in options.runs]
    require(bool(runs), "--runs", "", "a list of runs")
    require(options.deadline > 0, "--deadline", options.deadline, "positive")
    if options.phase is not None:
        print(json.dumps(_child(runs[0], options)))
        return
    output, commit = pathlib.Path(options.output), options.commit or _commit()
    output.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    for run in runs:
        if run.name in _done(output, commit, options.parts):
            print(f"{run.name}: {output} has it")
            continue
        left = options.deadline - (time.monotonic() - begin)
        if left < run.seconds + (20 if options.parts else 0):
            print(f"{run.name}: not begun, {left:.0f} s are left")
            continue
        found = measure(run, parts=options.parts, peer=options.peer, limit=left, warm=options.warm)
        line = {
            "run": run.name,
            "program": "jla 0.1.0" if run.attention in PEERS else "lazyattn",
            **{name: getattr(run, name) for name in ("model", "attention", "remat", "scan", "fp8")},
            **{"length": run.length, "batch": run.batch, "command_buffers": not options.parts},
            **found,
            "commit": commit,
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            **provenance.made_by("benchmarks.step_table"),
        }
        with output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(_summary(line), flush=True)


def _summary(line: dict[str, Any]) -> str:
    if "error" in line:
        return f"{line['run']}: {line['error']}"
    mfu = "" if line["mfu"] is None else f", MFU {line['mfu']:.1%}"
    seconds = (
        f"{phase} compiled in {line[f'compile_{phase}_s']:.1f} s,"
        f" first step after {line[f'first_step_{phase}_s']:.1f} s"
        for phase in ("cold", "warm")
        if f"compile_{phase}_s" in line
    )
    rate = f"{line['run']}: {line['tokens_per_second']:,.0f} tokens/s{mfu}, {line['gib']:.1f} GiB"
    return "; ".join([rate, *seconds])


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags."""
    where: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_list("runs", [], "What to time: MODEL/ATTENTION/REMAT,...", **where)
    flags.DEFINE_bool("parts", False, "Trace the steps, too; no CUDA graphs then.", **where)
    flags.DEFINE_bool("warm", True, "Compile again with the cache of the first time.", **where)
    flags.DEFINE_float("deadline", 3600.0, "Seconds in which all must be done.", **where)
    flags.DEFINE_string("commit", None, "What is measured, where there is no git.", **where)
    paths.define("peer", None, "Folder with the packages of jla.", values)
    paths.define("output", "benchmarks/results/h200_step.jsonl", "File of lines.", values)
    # Of the processes that this program starts.
    flags.DEFINE_string("phase", None, "cold or warm.", **where)
    flags.DEFINE_float("began", 0.0, "When the process was started.", **where)
    paths.define("cache", None, "Folder of the compilation cache.", values)


def main(argv: Sequence[str]) -> int:
    """Times what is asked for; returns the exit status."""
    del argv
    try:
        _run(flags.FLAGS)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    define()
    app.run(main)
