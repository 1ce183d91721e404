"""Weak scaling of the train step: as many tokens a device on one device and on all.

    python -m benchmarks.scaling                        # all GPUs of one process
    python -m benchmarks.scaling --coordinator=localhost:9999 --process_count=2 --process_id=0 &
    python -m benchmarks.scaling --coordinator=localhost:9999 --process_count=2 --process_id=1

The second way, started with CUDA_VISIBLE_DEVICES=0 and =1, has a process a GPU, as a
cluster has. Efficiency is the time of a step on one device over that on all, where each
mesh axis in turn has all devices and the batch grows with their number. Steps follow one
another as in training; the batch is the same every time, and lies on the devices. It is
the same for every axis, too, however many processes there are: so should be the losses.
"""

import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from lazyattn import distributed, paths, sharding
from lazyattn.checkpoint.state import StateFactory
from lazyattn.errors import InputError, require
from lazyattn.experiment.training import OptimizerConfig
from lazyattn.model.config import AttentionConfig, ModelConfig
from lazyattn.model.objective import Batch, make_loss_fn
from lazyattn.model.parameters import init_params, partition_specs
from lazyattn.training.optimizer import make_optimizer, make_schedule
from lazyattn.training.step import make_train_step


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags; not at import, since other programs have some of the same names."""
    where: dict[str, Any] = {"flag_values": values}
    axes = list(sharding.MESH_AXES)
    flags.DEFINE_list("axes", axes, "Mesh axes to measure.", **where)
    flags.DEFINE_integer("rows", 8, "Rows a device.", **where)
    flags.DEFINE_integer("length", 4096, "Tokens a row.", **where)
    flags.DEFINE_integer("width", 1024, "Width of the model.", **where)
    flags.DEFINE_integer("layers", 24, "Layers.", **where)
    flags.DEFINE_integer("heads", 16, "Heads.", **where)
    flags.DEFINE_integer("vocab", 32_000, "Tokens of the vocabulary.", **where)
    flags.DEFINE_string("remat", "full", "As model.remat.", **where)
    flags.DEFINE_string("variant", "lazy", "As model.attention.variant.", **where)
    flags.DEFINE_integer("steps", 10, "Steps a round.", **where)
    flags.DEFINE_integer("rounds", 5, "Rounds, of which the median counts.", **where)
    paths.define("output", None, "File to add a JSON line a measurement to.", **where)
    distributed.define(values)


def _model(options: flags.FlagValues) -> ModelConfig:
    return ModelConfig(
        vocab_size=options.vocab,
        width=options.width,
        num_layers=options.layers,
        remat=options.remat,
        attention=AttentionConfig(variant=options.variant, num_heads=options.heads),
    )


def _batch(options: flags.FlagValues, mesh: jax.sharding.Mesh) -> Batch:
    """Returns random tokens in documents of about a quarter of a row, over the mesh."""
    random = np.random.default_rng(0)
    shape = options.rows * mesh.size, options.length
    inputs, targets = random.integers(options.vocab, size=(2, *shape))
    starts = random.random(shape) < 4 / options.length
    index = np.arange(options.length)
    data = {
        "inputs": inputs,
        "targets": targets,
        "segment_ids": 1 + np.cumsum(starts, axis=1),
        "positions": index - np.maximum.accumulate(np.where(starts, index, 0), axis=1),
    }
    data = {name: array.astype(np.int32) for name, array in data.items()}
    if mesh.size == 1:  # other processes have a mesh of their own
        place = jax.sharding.NamedSharding(mesh, sharding.spec("batch", "length"))
        return jax.device_put(data, place)
    share = sharding.batch_share(mesh)
    mine = {name: np.split(array, share.count)[share.index] for name, array in data.items()}
    return sharding.shard_batch(mine, mesh)


def measure(options: flags.FlagValues, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Returns the median time of a step, the extremes, and the last loss.

    `first_seconds` is what it takes to compile, initialise and take a round of steps.
    """
    start = time.perf_counter()
    model, schedule = _model(options), OptimizerConfig()
    optimizer = make_optimizer(schedule, 1000)
    factory = StateFactory(
        lambda key: init_params(model, key), partition_specs(model), optimizer, mesh, 0
    )
    step = make_train_step(
        make_loss_fn(model),
        optimizer,
        make_schedule(schedule, 1000),
        mesh=mesh,
        shardings=factory.shardings,
    )
    state, batch = factory.create(), _batch(options, mesh)
    times = []
    for _ in range(options.rounds + 1):
        for _ in range(options.steps):
            state, metrics = step(state, batch)
        loss = float(metrics["loss"])  # on the host: all steps are done
        now = time.perf_counter()
        times.append(now - start)
        start = now
    first, *rest = times
    require(bool(np.isfinite(loss)), "the loss", loss, "finite")
    rest = [1e3 * seconds / options.steps for seconds in rest]
    return {
        "ms": float(np.median(rest)),
        "least": min(rest),
        "greatest": max(rest),
        "first_seconds": first,
        "loss": loss,
    }


def _say(options: flags.FlagValues, record: dict[str, Any]) -> None:
    if jax.process_index():
        return
    print(json.dumps(record), flush=True)
    if options.output:
        with open(options.output, "a") as file:
            file.write(json.dumps(record) + "\n")


def _check(options: flags.FlagValues) -> None:
    for axis in options.axes:
        require(
            axis in sharding.MESH_AXES, "--axes", axis, "one of " + ", ".join(sharding.MESH_AXES)
        )
    for name in ("rows", "length", "steps", "rounds"):
        require(options[name].value >= 1, "--" + name, options[name].value, "at least 1")
    _model(options)
    if options.output:
        pathlib.Path(options.output).absolute().parent.mkdir(parents=True, exist_ok=True)


def _run(options: flags.FlagValues) -> int:
    """Returns the exit status: 1 if something could not be measured."""
    _check(options)
    distributed.initialize(options)
    names = ("rows", "length", "width", "layers", "heads", "variant", "remat", "steps", "rounds")
    common = {
        "device": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "jax": jax.__version__,
        **{name: options[name].value for name in names},
    }
    one, failed = None, False
    for axis in (None, *options.axes):
        record: dict[str, Any] = {**common, "devices": 1}
        mesh = sharding.make_mesh(sharding.MeshConfig(), jax.local_devices()[:1])
        if axis is not None:
            distributed.wait_for_all(axis)
            sizes = {**dict.fromkeys(sharding.MESH_AXES, 1), axis: jax.device_count()}
            mesh = sharding.make_mesh(sharding.MeshConfig(**sizes))
            record |= {"devices": mesh.size, "axis": axis}
        try:
            record |= measure(options, mesh)
            tokens = options.rows * options.length * mesh.size
            record["tokens_per_second"] = 1e3 * tokens / record["ms"]
            if axis is None:
                one = record["ms"]
            elif one is not None:
                record["efficiency"] = one / record["ms"]
        except Exception as error:  # The other axes may work.
            line = (str(error).splitlines() or [""])[0][:200]
            record["error"] = f"{type(error).__name__}: {line}"
            failed = True
        _say(options, record)
    return int(failed)


def main(argv: Sequence[str]) -> int:
    """Measures one device, then each axis; returns the exit status."""
    del argv
    logging.set_verbosity(logging.WARNING)
    try:
        return _run(flags.FLAGS)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    define()
    app.run(main)
