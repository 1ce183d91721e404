"""The compiled step on disk, so that a restart neither traces nor lowers it again.

JAX's own cache is asked by the lowered program, and to trace and lower a step takes longer than to
read what was compiled. Here it is asked by all that the step is made from: settings, mesh, source,
versions, and what the environment says to JAX and XLA. Only steps of one process are kept.
"""

import hashlib
import importlib.metadata
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from threading import get_ident

import jax
from absl import logging
from jax.experimental import serialize_executable

import lazyattn
import pallas_kernels
from lazyattn import compile_cache
from lazyattn.checkpoint.state import TrainState
from lazyattn.data.manifest import write_whole
from lazyattn.experiment import ExperimentConfig
from lazyattn.model.objective import Batch
from lazyattn.training.remat import abstract_batch
from lazyattn.training.step import TrainStep

# Steps in the folder; the one used longest ago goes first.
_NUMBER = 8
_VARIABLES = ("CUDA_", "JAX_", "LIBTPU_", "MOSAIC_", "NVIDIA_", "TF_", "TRITON_", "XLA_")
# Set by JAX when Mosaic is imported: a program started by one that has it would find nothing.
_SET_BY_JAX = ("MOSAIC_GPU_CUDA_ROOT", "MOSAIC_GPU_RUNTIME_", "MOSAIC_GPU_NVSHMEM_")

# Threads by which JAX has read a program from its own cache.
_hits: list[int] = []
jax.monitoring.register_event_listener(
    lambda event, **_: _hits.append(get_ident()) if event.endswith("/cache_hits") else None
)

Made = tuple[TrainStep, list[str]]


def read_or_make(
    make: Callable[[], Made],
    experiment: ExperimentConfig,
    mesh: jax.sharding.Mesh,
    abstract: TrainState,
    *,
    kind: str = "",
) -> Made:
    """Returns the step and lines about it: those that were kept, or those of `make`.

    Args:
      make: makes them.
      experiment: what the step is made from, as the next.
      mesh: where it runs.
      abstract: the state, with shardings.
      kind: what else tells the step from others.
    """
    folder = compile_cache.steps_folder()
    if folder is None or jax.process_count() > 1:
        return make()
    path = folder / _key(experiment, mesh, kind)
    batch = abstract_batch(experiment, mesh)
    if path.exists():
        try:
            return _read(path, mesh, abstract, batch)
        except Exception as error:  # Cut short, or of a machine like this one by name alone.
            logging.warning("a kept step could not be read: %s", error)
            path.unlink(missing_ok=True)
    _hits.clear()
    step, said = make()
    if not isinstance(step.jitted, jax.stages.Compiled):
        step = TrainStep(step.lower(abstract, batch).compile(), mesh)
    # A CPU's program that was read lacks functions when it is written again and read once more;
    # other devices' were not tried.
    if get_ident() not in _hits:
        _write(path, step.jitted, said)
    return step, said


def _key(experiment: ExperimentConfig, mesh: jax.sharding.Mesh, kind: str) -> str:
    """Returns a name for all that the step is made from."""
    devices = list(mesh.devices.flat)
    facts = {
        "kind": kind,
        "experiment": experiment.to_dict(),
        "mesh": [dict(mesh.shape), [(device.id, device.device_kind) for device in devices]],
        "platform": [devices[0].client.platform_version, sys.version],
        "versions": sorted((d.name, d.version) for d in importlib.metadata.distributions()),
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(_VARIABLES) and not name.startswith(_SET_BY_JAX)
        },
        "jax": {k: v for k, v in jax.config.values.items() if "cache" not in k},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode())
    for package in (lazyattn, pallas_kernels):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path, mesh: jax.sharding.Mesh, abstract: TrainState, batch: Batch) -> Made:
    program, names, said = pickle.loads(path.read_bytes())
    os.utime(path)
    into = jax.tree.structure(((abstract, batch), {}))
    out = jax.tree.structure((abstract, dict.fromkeys(names, 0)))
    devices = list(mesh.devices.flat)
    compiled = serialize_executable.deserialize_and_load(
        program, into, out, devices[0].client, devices
    )
    return TrainStep(compiled, mesh), said


def _write(path: Path, compiled: jax.stages.Compiled, said: list[str]) -> None:
    try:
        program, _, out = serialize_executable.serialize(compiled)
        _, metrics = jax.tree.unflatten(out, range(out.num_leaves))
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_whole(path, pickle.dumps((program, sorted(metrics), said)))
        kept = sorted(path.parent.glob("[!.]*"), key=lambda each: each.stat().st_mtime)
        for old in kept[:-_NUMBER]:
            old.unlink(missing_ok=True)
    except Exception as error:  # A platform that can't hand it out, or a full disk.
        logging.warning("the compiled step is not kept: %s", error)
