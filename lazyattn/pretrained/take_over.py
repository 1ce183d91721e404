"""Settings of a run that begins as a hub's model."""

from pathlib import Path

import ml_collections

from lazyattn.data.tokenizer import FILE_NAMES
from lazyattn.errors import InputError, bad_value
from lazyattn.experiment import defaults, with_attention
from lazyattn.model.config import AttentionConfig
from lazyattn.paths import local_path
from lazyattn.pretrained import hub
from lazyattn.pretrained.settings import FILE, read_settings

# A row of these many tokens fits where the model does; longer ones are asked for.
_ROW = 4096


def take_over(name: str, attention: str = "softmax") -> ml_collections.ConfigDict:
    """Returns the settings of a run that starts from a hub's model.

    The model is the folder's, `training.init_from` the folder, and `data.tokenizer` its
    tokenizer. Rows have 4096 tokens, or as many as the model takes. The learning rate is low
    and constant after a warm-up.

    Args:
      name: the folder; behind a plus an attention as in `lazyattn.experiment.with_attention`,
        such as "sharp_table", but that norms of queries and keys are as the folder has them.
      attention: what it is without one.

    Raises:
      InputError: if it is no folder of a hub's model, or ours can't be that model.
    """
    given = name
    if not Path(name).expanduser().is_dir() and "+" in name:
        given, _, attention = name.partition("+")
    flag = "The folder behind the colon of --config"
    folder = local_path(flag, given)
    if not given or not folder.is_dir():
        raise bad_value(flag, given, "that of a hub's model, as in --config=uptrain:FOLDER")
    settings = read_settings(folder / FILE)
    if not hub.is_hub(settings):
        raise InputError(
            f"{flag} is {given!r}, but that is no model of the hub; for a run or an export of ours"
            " give --config with its own settings and --init_from."
        )
    model = hub.model_config(settings)
    config = defaults()
    plain = {name: getattr(model, name) for name in _named(config.model) if name != "attention"}
    config.model.update(plain)
    own = {name: getattr(model.attention, name) for name in _named(config.model.attention)}
    config.model.attention.update(own | {"variant": "lazy"})
    with_attention(config, attention)
    config.model.attention.qk_norm = model.attention.qk_norm
    config.model.remat = "auto"
    config.data.sequence_length = min(_ROW, hub.sequence_length(settings))
    found = [folder / file for file in FILE_NAMES if (folder / file).is_file()]
    config.data.tokenizer = str(found[0]) if found else None
    config.optimizer.learning_rate = 2e-5
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 100
    config.training.init_from = given
    # Parameters and optimizer state over all devices, whatever their number.
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config


def teach(name: str) -> ml_collections.ConfigDict:
    """Returns the settings of a run that teaches a hub's softmax model to be lazy.

    In the first half of the steps offsets and slopes are brought to where a fresh model starts;
    the learning rate falls along a cosine. Attention is measured on the way.

    Args:
      name: as in `take_over`; without an attention it is "sharp". "softmax" is the control,
        the model itself trained as long.

    Raises:
      InputError: as `take_over`.
    """
    config = take_over(name, "sharp")
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "cosine"
    config.training.steps = 2000
    config.training.inspect_every = 100
    config.training.eval_every = 100
    config.training.eval_batches = 16
    attention = AttentionConfig(variant=config.model.attention.variant)
    config.teaching.offset_steps = 1000 if attention.has_offset else 0
    config.teaching.bias_steps = 1000 if attention.has_bias else 0
    return config


def _named(config: ml_collections.ConfigDict) -> list[str]:
    return sorted(config.keys())
