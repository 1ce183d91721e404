import dataclasses
import shutil

import jax.numpy as jnp
import pytest

from lazyattn import sharding
from lazyattn.checkpoint.manager import Checkpoints
from lazyattn.checkpoint.state import make_state_factory
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.experiment import from_config_dict
from lazyattn.training.optimizer import make_optimizer
from tests.training import tiny


def make_run(folder, source, variant, **settings):
    """Makes the folder of a run whose model has not learned anything yet."""
    config = tiny.get_config(source)
    config.model.num_layers = 2
    config.model.attention.variant = variant
    config.model.attention.implementation = "xla"
    config.data.sequence_length = 80
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in settings.items()})
    experiment = from_config_dict(config)
    folder.mkdir()
    texts = [path.read_text() for path in sorted(source.iterdir())]
    Tokenizer.train(texts, config.data.vocab_size).save(folder / "tokenizer.json")
    optimizer = make_optimizer(experiment.optimizer, experiment.training.steps)
    mesh = sharding.make_mesh(experiment.mesh)
    state = make_state_factory(experiment, mesh, optimizer).create()
    state = dataclasses.replace(state, step=jnp.int32(7))
    with Checkpoints(folder, keep=1, keep_every=0) as checkpoints:
        checkpoints.save(7, state, {}, experiment.to_dict())
        checkpoints.wait()
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return tiny.write_text(tmp_path_factory.mktemp("inspection") / "text")


@pytest.fixture(scope="session")
def lazy_run(text):
    return make_run(text.parent / "lazy", text, "lazy")


@pytest.fixture(scope="session")
def softmax_run(text):
    return make_run(text.parent / "softmax", text, "softmax")


def make_report(run, against, text, name):
    from lazyattn.inspect.flags import InspectionOptions
    from lazyattn.inspect.main import inspect

    output = text.parent / name
    options = InspectionOptions(against=str(against), text=str(text), rows=2, output=str(output))
    return inspect(run, options=options)


@pytest.fixture(scope="session")
def report(text, lazy_run, softmax_run):
    """The folder of a report on both."""
    return make_report(lazy_run, softmax_run, text, "report")


@pytest.fixture(scope="session")
def twin_report(text, lazy_run):
    """The folder of a report on a run and its copy, for which nothing more is compiled."""
    twin = shutil.copytree(lazy_run, text.parent / "twin")
    return make_report(lazy_run, twin, text, "twin_report")
