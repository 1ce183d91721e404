"""A state whose program was begun on a thread is the state."""

import dataclasses

import jax
import numpy as np

from lazyattn import sharding
from lazyattn.checkpoint.state import make_state_factory
from lazyattn.experiment import from_config_dict
from lazyattn.sharding import MeshConfig
from lazyattn.training.optimizer import make_optimizer
from tests.training import tiny


def test_a_state_that_was_begun_is_the_same(tmp_path):
    config = tiny.get_config(tiny.write_text(tmp_path))
    config.model.num_layers = 1
    experiment = from_config_dict(config)
    experiment = dataclasses.replace(experiment, mesh=MeshConfig(data=1, fsdp=1))
    mesh = sharding.make_mesh(experiment.mesh, jax.devices()[:1])
    optimizer = make_optimizer(experiment.optimizer, experiment.training.steps)
    factory = make_state_factory(experiment, mesh, optimizer)
    expected = factory.create()
    factory.begin()
    begun = factory.create()
    jax.tree.map(np.testing.assert_array_equal, begun, expected)
    # Weights from elsewhere are taken all the same, and what was begun is not taken twice.
    factory.begin()
    taken = factory.create(jax.tree.map(lambda x: x + 1, expected.params))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y + 1), taken.params, begun.params)
