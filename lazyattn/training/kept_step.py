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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import get_ident
from typing import Any

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
from pallas_kernels import gpu

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


class KeptStep:
    """The step that was kept for such a run, read on a thread while other work goes on."""

    def __init__(
        self,
        experiment: ExperimentConfig,
        mesh: jax.sharding.Mesh,
        *,
        kind: str = "",
    ):
        """Begins to read.

        Args:
          experiment: what the step is made from, as the next.
          mesh: where it runs.
          kind: what else tells the step from others.
        """
        self._mesh = mesh
        self._batch = abstract_batch(experiment, mesh)
        self._folder = compile_cache.steps_folder() if jax.process_count() == 1 else None
        if self._folder is None:
            return
        facts = _facts(experiment, mesh, kind)
        self._pool = ThreadPoolExecutor(1, "kept_step")
        self._found = self._pool.submit(self._find, self._folder, facts)

    def or_made(self, make: Callable[[], Made], abstract: TrainState) -> Made:
        """Returns the step and lines about it: those that were kept, or those of `make`.

        What was made is written on the thread. The process does not end before that is done.

        Args:
          make: makes them.
          abstract: the state, with shardings.
        """
        if self._folder is None:
            return make()
        path, found = self._found.result()
        if found is not None:
            self._pool.shutdown()
            return found
        _hits.clear()
        step, said = make()
        if not isinstance(step.jitted, jax.stages.Compiled):
            step = TrainStep(step.lower(abstract, self._batch).compile(), self._mesh)
        # A CPU's program that was read lacks functions when it is written again and read once
        # more; other devices' were not tried.
        if get_ident() not in _hits:
            self._pool.submit(_write, path, step.jitted, said)
        self._pool.shutdown(wait=False)
        return step, said

    def _find(self, folder: Path, facts: dict[str, Any]) -> tuple[Path, Made | None]:
        path = folder / _name(facts)
        if not path.exists():
            return path, None
        try:
            return path, _read(path, self._mesh, self._batch)
        except Exception as error:  # Cut short, or of a machine like this one by name alone.
            logging.warning("a kept step could not be read: %s", error)
            path.unlink(missing_ok=True)
            return path, None


def _facts(experiment: ExperimentConfig, mesh: jax.sharding.Mesh, kind: str) -> dict[str, Any]:
    """Returns what a step is made from, besides source and versions."""
    devices = list(mesh.devices.flat)
    return {
        "kind": kind,
        "experiment": experiment.to_dict(),
        "mesh": [dict(mesh.shape), [(device.id, device.device_kind) for device in devices]],
        "platform": [devices[0].client.platform_version, sys.version],
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(_VARIABLES) and not name.startswith(_SET_BY_JAX)
        },
        "jax": {k: v for k, v in jax.config.values.items() if "cache" not in k},
    }


def _name(facts: dict[str, Any]) -> str:
    """Returns a name for all that a step is made from."""
    versions = sorted((d.name, d.version) for d in importlib.metadata.distributions())
    whole = {**facts, "versions": versions}
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True, default=repr).encode())
    for package in (lazyattn, pallas_kernels):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path, mesh: jax.sharding.Mesh, batch: Batch) -> Made:
    program, results, said = pickle.loads(path.read_bytes())
    os.utime(path)
    state, _ = results
    into, out = jax.tree.structure(((state, batch), {})), jax.tree.structure(results)
    devices = list(mesh.devices.flat)
    if devices[0].platform == "gpu":
        gpu.import_runtime()
    compiled = serialize_executable.deserialize_and_load(
        program, into, out, devices[0].client, devices
    )
    return TrainStep(compiled, mesh), said


def _write(path: Path, compiled: jax.stages.Compiled, said: list[str]) -> None:
    try:
        program, _, out = serialize_executable.serialize(compiled)
        # A structure can't be pickled, but what has it can: state and metrics.
        results = jax.tree.unflatten(out, range(out.num_leaves))
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_whole(path, pickle.dumps((program, results, said)))
        kept = sorted(path.parent.glob("[!.]*"), key=lambda each: each.stat().st_mtime)
        for old in kept[:-_NUMBER]:
            old.unlink(missing_ok=True)
    except Exception as error:  # A platform that can't hand it out, or a full disk.
        logging.warning("the compiled step is not kept: %s", error)
