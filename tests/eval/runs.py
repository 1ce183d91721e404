"""The folder of a run that was never trained: what a checkpoint needs, in a moment."""

import dataclasses

import jax
import numpy as np

from lazyattn.checkpoint.manager import Checkpoints
from lazyattn.checkpoint.state import make_state_factory
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.experiment import from_config_dict
from lazyattn.sharding import make_mesh
from lazyattn.training.optimizer import make_optimizer
from tests.model.tiny import make_params
from tests.training import tiny


def make_run(folder, **changes):
    """Returns the folder of a run of `tests.training.tiny`, after step 1."""
    config = tiny.get_config(tiny.write_text(folder / "text"))
    config.model.attention.implementation = None  # what a model has that comes from an export
    config.update_from_flattened_dict(changes)
    experiment = from_config_dict(config)
    mesh = make_mesh(experiment.mesh, jax.devices()[:1])
    optimizer = make_optimizer(experiment.optimizer, experiment.training.steps)
    abstract = make_state_factory(experiment, mesh, optimizer).abstract
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    params = jax.tree.map(np.asarray, make_params(experiment.model))
    state = dataclasses.replace(state, params=params, step=np.asarray(1, np.int32))
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract))
    with Checkpoints(folder / "run") as checkpoints:
        checkpoints.save(1, state, {"step": 1}, experiment.to_dict())
        checkpoints.wait()
    Tokenizer.train([tiny.TEXT], 280).save(folder / "run" / "tokenizer.json")
    return folder / "run"
