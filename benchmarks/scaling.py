"""Weak scaling of the train step: as many tokens a device on one device and on all.

    python -m benchmarks.scaling                        # all GPUs of one process
    python -m benchmarks.scaling --coordinator=localhost:9999 --process_count=2 --process_id=0 &
    python -m benchmarks.scaling --coordinator=localhost:9999 --process_count=2 --process_id=1

The second way, started with CUDA_VISIBLE_DEVICES=0 and =1, has a process a GPU, as a
cluster has. Efficiency is the time of a step on one device over that on all, where each
mesh axis in turn has all devices and the batch grows with their number. Steps follow one
another as in training; the batch is the same every time, and lies on the devices.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from lazyattn import distributed, sharding
from lazyattn.model.config import AttentionConfig, ModelConfig
from lazyattn.model.parameters import init_params, partition_specs
from lazyattn.training.config import OptimizerConfig
from lazyattn.training.objective import make_loss_fn
from lazyattn.training.optimizer import make_optimizer, make_schedule
from lazyattn.training.state import StateFactory
from lazyattn.training.step import make_train_step

_AXES = flags.DEFINE_list("axes", ["data", "fsdp", "tensor", "sequence"], "Mesh axes to measure.")
_ROWS = flags.DEFINE_integer("rows", 8, "Rows a device.")
_LENGTH = flags.DEFINE_integer("length", 4096, "Tokens a row.")
_WIDTH = flags.DEFINE_integer("width", 1024, "Width of the model.")
_LAYERS = flags.DEFINE_integer("layers", 24, "Layers.")
_HEADS = flags.DEFINE_integer("heads", 16, "Heads.")
_VOCAB = flags.DEFINE_integer("vocab", 32_000, "Tokens of the vocabulary.")
_REMAT = flags.DEFINE_enum("remat", "full", ["none", "dots", "full"], "As model.remat.")
_VARIANT = flags.DEFINE_string("variant", "lazy", "As model.attention.variant.")
_STEPS = flags.DEFINE_integer("steps", 10, "Steps a round.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds, of which the median counts.")
_OUTPUT = flags.DEFINE_string("output", None, "File to add a JSON line a measurement to.")
distributed.define()


def _model() -> ModelConfig:
    return ModelConfig(
        vocab_size=_VOCAB.value,
        width=_WIDTH.value,
        num_layers=_LAYERS.value,
        remat=_REMAT.value,
        attention=AttentionConfig(variant=_VARIANT.value, num_heads=_HEADS.value),
    )


def _batch(mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Returns random tokens in documents of about a quarter of a row, over the mesh."""
    share = sharding.batch_share(mesh) if mesh.size > 1 else sharding.BatchShare(0, 1)
    rows = _ROWS.value * mesh.size // share.count
    random = np.random.default_rng(share.index)
    inputs, targets = random.integers(_VOCAB.value, size=(2, rows, _LENGTH.value))
    starts = random.random((rows, _LENGTH.value)) < 4 / _LENGTH.value
    index = np.arange(_LENGTH.value)
    data = {
        "inputs": inputs,
        "targets": targets,
        "segment_ids": 1 + np.cumsum(starts, axis=1),
        "positions": index - np.maximum.accumulate(np.where(starts, index, 0), axis=1),
    }
    data = {name: array.astype(np.int32) for name, array in data.items()}
    if mesh.size > 1:
        return sharding.shard_batch(data, mesh)
    return jax.device_put(data, jax.sharding.NamedSharding(mesh, sharding.spec("batch", "length")))


def milliseconds(mesh: jax.sharding.Mesh) -> float:
    """Returns the median time of a step."""
    model, schedule = _model(), OptimizerConfig()
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
    state, batch = factory.create(), _batch(mesh)
    times = []
    for turn in range(_ROUNDS.value + 1):
        start = time.perf_counter()
        for _ in range(_STEPS.value):
            state, metrics = step(state, batch)
        loss = float(metrics["loss"])  # on the host: all steps are done
        if turn:  # the first compiles
            times.append(1e3 * (time.perf_counter() - start) / _STEPS.value)
    assert np.isfinite(loss), loss
    return float(np.median(times))


def _say(record: dict[str, Any]) -> None:
    if jax.process_index():
        return
    print(json.dumps(record), flush=True)
    if _OUTPUT.value:
        with open(_OUTPUT.value, "a") as file:
            file.write(json.dumps(record) + "\n")


def main(argv: Sequence[str]) -> None:
    """Measures one device, then each axis."""
    del argv
    distributed.initialize()
    devices = jax.device_count()
    common = {
        "device": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "jax": jax.__version__,
        **{
            name: flags.FLAGS[name].value
            for name in ("rows", "length", "width", "layers", "heads", "variant", "remat")
        },
    }
    one = milliseconds(sharding.make_mesh(sharding.MeshConfig(), jax.local_devices()[:1]))
    tokens = _ROWS.value * _LENGTH.value
    _say({**common, "devices": 1, "ms": one, "tokens_per_second": 1e3 * tokens / one})
    for axis in _AXES.value:
        distributed.wait_for_all(axis)
        sizes = {**dict.fromkeys(sharding.MESH_AXES, 1), axis: devices}
        found = milliseconds(sharding.make_mesh(sharding.MeshConfig(**sizes)))
        _say(
            {
                **common,
                "devices": devices,
                "axis": axis,
                "ms": found,
                "tokens_per_second": 1e3 * tokens * devices / found,
                "efficiency": one / found,
            }
        )


if __name__ == "__main__":
    app.run(main)
