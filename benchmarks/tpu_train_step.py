"""Compiles the 340M model's sharded train step for a TPU slice, without one.

    python -m benchmarks.tpu_train_step --topology=v5p:2x2x1

prints the memory a device needs and exits with status 1 if it has less. The batch is the
recipe's 524,288 tokens at length 4096.
"""

import dataclasses
import inspect
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks.tpu_compiler import Compiler
from lazyattn import sharding
from lazyattn.model.config import ModelConfig
from lazyattn.model.parameters import init_params, partition_specs
from lazyattn.training.objective import make_loss_fn
from lazyattn.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from lazyattn.training.state import StateFactory
from lazyattn.training.step import make_train_step
from pallas_kernels.tpu import support

_TOKENS, _LENGTH, _STEPS = 524_288, 4096, 20_480

# Bytes of a device's memory; a device is a chip, but for 7x half of one.
HBM = {"v4": 32e9, "v5e": 16e9, "v5p": 95e9, "v6e": 32e9, "7x": 96e9}


def main(argv: list[str]) -> None:
    """Prints one line and exits."""
    del argv
    devices = Compiler(dump=False).devices(flags.FLAGS.topology)
    generation = support.generation_of(devices[0].device_kind)
    assert generation is not None
    with support.pretend_generation(generation):
        fits = compile_step(devices, generation)
    sys.exit(int(not fits))


def compile_step(devices: Sequence[Any], generation: str) -> bool:
    """Compiles, prints the line, and returns whether all is well."""
    options = flags.FLAGS
    fsdp = len(devices) // options.tensor
    mesh = sharding.make_mesh(
        sharding.MeshConfig(data=1, fsdp=fsdp, tensor=options.tensor), devices
    )
    model = ModelConfig(remat=options.remat)
    model = dataclasses.replace(
        model, attention=dataclasses.replace(model.attention, implementation="tpu")
    )
    config = OptimizerConfig()
    optimizer = make_optimizer(config, _STEPS)
    factory = StateFactory(
        lambda key: init_params(model, key), partition_specs(model), optimizer, mesh, 0
    )
    run = make_train_step(
        make_loss_fn(model, 0.0),
        optimizer,
        make_schedule(config, _STEPS),
        mesh=mesh,
        shardings=factory.shardings,
        microbatches=options.microbatches,
    )
    step = inspect.getclosurevars(run).nonlocals["compiled"]
    rows = jax.ShapeDtypeStruct(
        (_TOKENS // _LENGTH, _LENGTH),
        jnp.int32,
        sharding=jax.sharding.NamedSharding(mesh, sharding.spec("batch", "length")),
    )
    batch = {"inputs": rows, "targets": rows, "segment_ids": rows, "positions": rows}
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = step.lower(factory.abstract, batch).compile()
    seconds = time.perf_counter() - start
    kernels = compiled.as_text().count("tpu_custom_call")
    memory = compiled.memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    need = arguments + temporary
    print(
        f"{options.topology}, {len(devices)} devices, fsdp {fsdp}, tensor {options.tensor},"
        f" {options.microbatches} microbatches, remat {options.remat}: {kernels} kernels,"
        f" {arguments / 1e9:.1f} GB of state and batch + {temporary / 1e9:.1f} GB of temporaries"
        f" of {HBM[generation] / 1e9:.0f} GB a device; {seconds:.0f} s to compile"
    )
    return kernels > 0 and need <= HBM[generation]


if __name__ == "__main__":
    flags.DEFINE_string("topology", "v5p:2x2x1", "What to compile for.")
    flags.DEFINE_integer("tensor", 1, "Devices that share the heads; the rest is fsdp.")
    flags.DEFINE_integer("microbatches", 4, "Parts of a batch.")
    flags.DEFINE_string("remat", "none", "none, dots or full.")
    app.run(main)
