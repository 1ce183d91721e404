"""An experiment as plain data: one frozen dataclass built from a config file.

The dataclasses are the schema: `defaults()` gives a config file its `ConfigDict`,
and `from_config_dict` turns what the user made of it back into checked, immutable
settings.
"""

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
from flax import traverse_util

from lazyattn.data.config import DataConfig
from lazyattn.errors import InputError, bad_value, require
from lazyattn.experiment.teaching import TeachingConfig
from lazyattn.experiment.training import OptimizerConfig, TrainingConfig
from lazyattn.model.config import RECIPES, VARIANTS, AttentionConfig, ModelConfig
from lazyattn.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything a run depends on."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    teaching: TeachingConfig = dataclasses.field(default_factory=TeachingConfig)

    def __post_init__(self):
        require(
            self.data.tokenizer is not None
            or self.data.tokenised
            or self.data.vocab_size <= self.model.vocab_size,
            "data.vocab_size",
            self.data.vocab_size,
            f"at most model.vocab_size = {self.model.vocab_size}",
        )
        require(
            self.data.batch_size % self.training.microbatches == 0,
            "data.batch_size",
            self.data.batch_size,
            f"a multiple of training.microbatches = {self.training.microbatches}",
        )

        require(
            self.teaching.frozen or not self.model.lora_rank,
            "model.lora_rank",
            self.model.lora_rank,
            "0 while teaching.frozen is False, since the matrices themselves are trained then",
        )
        require(
            not self.teaching.frozen or self.optimizer.name == "adamw",
            "optimizer.name",
            self.optimizer.name,
            "'adamw' while teaching.frozen is True, since Muon is for matrices, which are frozen",
        )
        attention = self.model.attention
        require(
            not self.teaching.frozen
            or attention.has_bias
            or attention.has_offset
            or self.model.lora_rank > 0,
            "teaching.frozen",
            True,
            f"False while model.attention.variant is {attention.variant!r} and model.lora_rank 0,"
            " since nothing would be trained",
        )
        for name, has in (("offset", attention.has_offset), ("bias", attention.has_bias)):
            steps = getattr(self.teaching, f"{name}_steps")
            require(
                not steps or has,
                f"teaching.{name}_steps",
                steps,
                f"0 while model.attention.variant is {attention.variant!r}, which has none",
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain data, fit for JSON."""
        return dataclasses.asdict(self)

    def to_flat_dict(self) -> dict[str, Any]:
        """Returns `to_dict` by dotted keys."""
        return traverse_util.flatten_dict(self.to_dict(), sep=".")

    def as_text(self) -> str:
        """Returns one line `config.KEY = VALUE` for each setting."""
        return "".join(f"config.{key} = {value!r}\n" for key, value in self.to_flat_dict().items())


# What a resumed run may do differently; all else decides what has been learned so
# far or which batch comes next, and must stay. A dot at the end means the group.
CHANGEABLE = (
    "optimizer.",
    "mesh.",
    "training.",
    "data.path",  # where shards lie; what they hold, the data iterator's state tells
    "data.sources",
    "data.num_workers",
    "data.prefetch",
    "data.verify_checksums",
    "model.remat",
    "model.loss_chunk",
    "model.attention.implementation",
)
FIXED = ("training.seed", "training.init_from", "optimizer.name", "optimizer.ema_decay")
# Left out when resuming, they are what they were.
REMEMBERED = ("training.init_from",)


def resumption_changes(
    saved: Mapping[str, Any], experiment: ExperimentConfig
) -> dict[str, tuple[Any, Any]]:
    """Returns what differs between a checkpoint's settings and those of the run resuming it.

    Args:
      saved: `ExperimentConfig.to_dict()` of the checkpoint.
      experiment: what the run is asked to be.

    Returns:
      Key -> (value saved, value now), for the keys that may change.

    Raises:
      InputError: naming the first key that may not.
    """
    before, now = from_config_dict(saved).to_flat_dict(), experiment.to_flat_dict()
    # Without a distance bias its settings say nothing; their defaults have changed before.
    unused = () if experiment.model.attention.has_bias else ("model.attention.bias_",)
    changes = {
        key: (before[key], now[key])
        for key in now
        if before[key] != now[key] and not key.startswith(unused)
    }
    for key in REMEMBERED:
        if now[key] is None:
            changes.pop(key, None)
    for key, (old, new) in changes.items():
        may_change = any(
            key == entry or (entry.endswith(".") and key.startswith(entry)) for entry in CHANGEABLE
        )
        if key in FIXED or not may_change:
            raise InputError(
                f"config.{key} is {new!r}, but the checkpoints in the workdir were made with"
                f" {old!r}; set it back or choose another --workdir."
            )
    return changes


def defaults() -> ml_collections.ConfigDict:
    """Returns the default experiment for a config file to change.

    Every key exists already, so a misspelt one is refused; a key whose default is
    None may be given a value of its annotated type.
    """
    return _placeholders(ExperimentConfig)


def with_attention(config: ml_collections.ConfigDict, names: str) -> ml_collections.ConfigDict:
    """Sets the kind of attention, and nothing else, so that runs can be compared.

    Args:
      config: what to change.
      names: recipes and variants (`lazyattn.model.config`) joined by "+", applied
        in turn, e.g. "sharp", "softmax" or "paper+lazy_no_bias".

    Returns:
      `config`.

    Raises:
      InputError: for an unknown name.
    """
    for name in names.split("+"):
        if name in RECIPES:
            config.model.attention.update(RECIPES[name])
        elif name in VARIANTS:
            config.model.attention.variant = name
        else:
            raise InputError(
                f"The attention {name!r} after the config file's colon is unknown; it must be one"
                f" of {', '.join([*RECIPES, *VARIANTS])}, or several joined by '+'."
            )
    return config


def _placeholders(cls: type) -> ml_collections.ConfigDict:
    """Returns a ConfigDict of `cls`'s defaults that knows the types behind None."""
    hints = typing.get_type_hints(cls)
    config = ml_collections.ConfigDict()
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            config[field.name] = _placeholders(hints[field.name])
        elif type(None) in (kinds := _allowed_types(hints[field.name])):
            (kind,) = (k for k in kinds if k is not type(None))
            config[field.name] = ml_collections.config_dict.placeholder(kind)
            config[field.name] = field.default
        else:
            config[field.name] = field.default
    config.lock()
    return config


def from_config_dict(config: Mapping[str, Any]) -> ExperimentConfig:
    """Returns the checked experiment.

    Raises:
      InputError: for an unknown key, a wrong type or a value out of range, naming
        the key as the command line would.
    """
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    return _build(ExperimentConfig, config, "")


def model_from_dict(values: Mapping[str, Any]) -> ModelConfig:
    """Returns a checked model from `dataclasses.asdict` of one.

    Raises:
      InputError: as `from_config_dict`.
    """
    return _build(ModelConfig, values, "model.")


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    if cls is AttentionConfig:
        values = with_bias_kind(values)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise _unknown(unknown[0], where, hints)
    arguments = {}
    for name, value in values.items():
        hint, path = hints[name], f"config.{where}{name}"
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise bad_value(path, value, "a group of settings")
            arguments[name] = _build(hint, value, f"{where}{name}.")
        else:
            arguments[name] = _checked(value, hint, path)
    return cls(**arguments)


def with_bias_kind(attention: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an attention layer's settings with a `bias_kind` where older ones have none.

    Before there was a choice the bias was a table, whose settings were always among them.
    """
    if "bias_kind" in attention or "bias_init" not in attention:
        return dict(attention)
    return {**attention, "bias_kind": "table"}


def _allowed_types(hint: Any) -> tuple[type, ...]:
    """Returns the plain types an annotation such as `int | None` admits."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return (str,)
    if origin is tuple:
        return (tuple,)
    if origin in (types.UnionType, typing.Union):
        return tuple(kind for part in typing.get_args(hint) for kind in _allowed_types(part))
    return (hint,)


def _checked(value: Any, hint: Any, path: str) -> Any:
    kinds = _allowed_types(hint)
    if float in kinds and type(value) is int:
        return float(value)
    if tuple in kinds and type(value) is list:  # JSON knows no tuples
        return tuple(value)
    if type(value) not in kinds:
        names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise bad_value(path, value, f"of type {names}")
    return value


def check_override(key: str, text: str) -> None:
    """Checks one `--config.KEY=TEXT` of the command line.

    Args:
      key: dotted path below the config, e.g. "optimizer.learning_rate".
      text: the value as typed.

    Raises:
      InputError: for an unknown key, or a value that isn't of its type.
    """
    cls: Any = ExperimentConfig
    where = ""
    for name in key.split("."):
        if not dataclasses.is_dataclass(cls):
            raise InputError(f"config.{key} is unknown; config.{where.rstrip('.')} is a value.")
        hints = typing.get_type_hints(cls)
        if name not in hints:
            raise _unknown(name, where, hints)
        cls, where = hints[name], f"{where}{name}."
    if dataclasses.is_dataclass(cls):
        raise InputError(
            f"config.{key} is a group of settings; set one of them, such as"
            f" --config.{key}.{dataclasses.fields(cls)[0].name}."
        )
    kinds = [kind for kind in _allowed_types(cls) if kind is not type(None)]
    if not any(_reads_as(text, kind) for kind in kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise bad_value(f"config.{key}", text, f"of type {names}")


def _reads_as(text: str, kind: type) -> bool:
    if kind is bool:
        return text.lower() in ("true", "false", "t", "f", "1", "0")
    try:
        return isinstance(ast.literal_eval(text) if kind is tuple else kind(text), kind)
    except (ValueError, SyntaxError):
        return False


def _unknown(name: str, where: str, known: Mapping[str, Any]) -> InputError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    group = f"config.{where}".rstrip(".")
    return InputError(f"config.{where}{name} is unknown{hint}; {group} has {', '.join(known)}.")
