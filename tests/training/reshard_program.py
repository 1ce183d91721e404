"""Saves a state on one mesh of 8 devices, restores it on others, compares bit by bit.

python -m tests.training.reshard_program FOLDER
"""

import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from lazyattn import sharding
from lazyattn.checkpoint.manager import Checkpoints
from lazyattn.checkpoint.state import make_state_factory
from lazyattn.experiment import from_config_dict
from lazyattn.training.optimizer import make_optimizer
from tests.training import tiny

MESHES = {
    "one": (dict(data=1), 1),
    "data": (dict(data=8), 8),
    "fsdp": (dict(data=1, fsdp=8), 8),
    "mixed": (dict(data=2, fsdp=2, tensor=2), 8),
    "rows": (dict(data=1, sequence=4), 4),
}


# Moments of some of the parameters alone, in two dtypes, and an average of the parameters.
MUON = {"name": "muon", "mu_dtype": "bfloat16", "ema_decay": 0.9}


def factory(mesh_name, **settings):
    sizes, count = MESHES[mesh_name]
    mesh = sharding.make_mesh(sharding.MeshConfig(**sizes), jax.devices()[:count])
    config = tiny.get_config()
    config.optimizer.update(settings)
    experiment = from_config_dict(config)
    optimizer = make_optimizer(experiment.optimizer, experiment.training.steps)
    return make_state_factory(experiment, mesh, optimizer)


def main(folder):
    adamw = {name: factory(name) for name in MESHES}
    muon = {name: factory(name, **MUON) for name in MESHES}
    for saved_on, factories in (("fsdp", adamw), ("one", adamw), ("mixed", muon)):
        state = factories[saved_on].create()
        # Moments and counters that aren't zero, and unlike each other.
        leaves, tree = jax.tree.flatten(state)
        random = np.random.default_rng(0)
        filled = [
            (100 * random.normal(size=x.shape)).astype(x.dtype) if x.ndim else x.dtype.type(7)
            for x in leaves
        ]
        state = jax.tree.unflatten(
            tree, [jax.device_put(new, x.sharding) for new, x in zip(filled, leaves, strict=True)]
        )
        with Checkpoints(folder / saved_on) as checkpoints:
            checkpoints.save(7, state, None, {})
            assert checkpoints.wait() is None
            for restored_on, other in factories.items():
                found = checkpoints.restore(other.abstract).state
                assert jax.tree.map(lambda x: x.sharding, found) == other.shardings
                jax.tree.map(np.testing.assert_array_equal, found, state)
                split = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(found))
                print(saved_on, restored_on, len(leaves), split, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
