"""A config of a few thousand parameters on a few hundred words, for whole runs."""

import dataclasses
import random

import ml_collections

from lazyattn.experiment import ExperimentConfig, defaults, from_config_dict

TEXT = "attention may look at nothing when no word is worth the weight of a glance"


def write_text(folder):
    """Writes a folder of small documents; the same every time."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(60):
        text = " ".join(draw.choices(TEXT.split(), k=draw.randint(20, 60)))
        (folder / f"{number:03d}.txt").write_text(text + ".\n")
    return folder


def get_config(source="") -> ml_collections.ConfigDict:
    """Returns the config; `source` is the folder of text."""
    config = defaults()
    config.model.vocab_size = 280
    config.model.width = 16
    config.model.num_layers = 1
    config.model.mlp_width = 16
    config.model.tie_embeddings = True
    config.model.compute_dtype = "float32"
    config.model.attention.num_heads = 2
    config.model.attention.bias_width = 8
    # The quickest to trace; which backend a run has by itself is for others to test.
    config.model.attention.implementation = "xla"
    config.data.source = str(source)
    config.data.vocab_size = 280
    config.data.sequence_length = 16
    config.data.batch_size = 4
    config.data.validation_fraction = 0.2
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 5
    config.training.steps = 120
    config.training.log_every = 10
    config.training.checkpoint_every = 4
    return config


def experiment(source="", **changes) -> ExperimentConfig:
    """Returns the settings of `get_config`, some changed: training__steps=2."""
    config = get_config(source)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return from_config_dict(config)


def train(*arguments, summary=True, **settings):
    """Trains as `--mode=train` does, with its hooks."""
    from lazyattn.hooks import HOOKS
    from lazyattn.training import main

    hooks = HOOKS if summary else dataclasses.replace(HOOKS, summary=None)
    return main.train(*arguments, hooks=hooks, **settings)
