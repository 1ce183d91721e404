"""A run that starts from the weights of another: of a run, of an export or of a hub's model."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from lazyattn import buckets
from lazyattn.checkpoint.load import load_trained
from lazyattn.checkpoint.manager import FOLDER, Checkpoints
from lazyattn.checkpoint.workdir import find_tokenizer
from lazyattn.data.tokenizer import FILE_NAMES, Tokenizer
from lazyattn.distributed import together
from lazyattn.errors import InputError, bad_value, require
from lazyattn.experiment import ExperimentConfig, from_config_dict
from lazyattn.model.config import AttentionConfig, ModelConfig
from lazyattn.model.distance_bias import (
    LOG_SLOPE_RANGE,
    NAMES,
    bias_arguments,
    bias_parameters,
)
from lazyattn.model.heads import global_heads
from lazyattn.model.lora import is_lora
from lazyattn.model.parameters import (
    Params,
    init_params,
    parameter_shapes,
    stack_blocks,
    unstack_blocks,
)
from lazyattn.paths import folder as folder_of
from lazyattn.pretrained.hub import is_hub
from lazyattn.pretrained.load import PARAMS, load_model
from lazyattn.pretrained.settings import FILE, as_facts, read_settings

_WHERE = "--init_from"
# How it is computed, which changes nothing that has been learned.
_SAME = (
    *("compute_dtype", "remat", "scan_layers", "loss_chunk"),
    *("attention.implementation", "attention.skip_mass", "attention.offset_init"),
    *("attention.bias_init", "attention.bias_std"),
)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters to start from, as this run's model has them.

    Attributes:
      params: float32, on the mesh.
      said: lines on what they are.
    """

    params: Params
    said: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Read:
    """A model that was read: its settings, its parameters, and what it is called."""

    model: ModelConfig
    params: Any
    name: str


@dataclasses.dataclass(frozen=True)
class Source:
    """What `training.init_from` names: looked at, but no weight is read.

    Attributes:
      experiment: of the run that starts from it.
      tokenizer: its own; None: none came with it.
      load: reads the model, on the devices of a mesh.
    """

    experiment: ExperimentConfig
    tokenizer: Tokenizer | None
    load: Callable[[jax.sharding.Mesh], _Read]

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Checks that the data is tokenized as the model's was.

        Raises:
          InputError: if it is not: no embedding would mean what it meant.
        """
        if self.tokenizer is not None and not self.tokenizer.same_ids(tokenizer):
            raise InputError(
                f"{_WHERE} has another tokenizer than this run's data; prepare the data with it, or"
                " give its file as --config.data.tokenizer."
            )

    def read(self, mesh: jax.sharding.Mesh, shardings: Any) -> Weights:
        """Returns the weights.

        A distance bias of another width or kind comes out as the same function of the distance.
        Where they have no distance bias or no offset and this run's model has, it starts as if it
        had none.

        Raises:
          InputError: if they can't be read, or the model's slopes can't be this run's.
        """
        experiment, source = self.experiment, self.load(mesh)
        model = source.model
        _check(model, experiment)
        params = _fitted(source.params, model, experiment, shardings)
        lines = [f"starting from the weights of {source.name}, with a fresh optimizer"]
        before, now = (_flat(config) for config in (model, experiment.model))
        lines += _new_parts(model.attention, experiment.model.attention)
        lines += _unfinished(experiment)
        lines += [
            f"  config.model.{key}: {before[key]!r} there, {value!r} here"
            for key, value in now.items()
            if before[key] != value and key not in _SAME
        ]
        return Weights(params, tuple(lines))


def find_weights(experiment: ExperimentConfig) -> Source:
    """Looks at what `training.init_from` names, on all processes together.

    That is the folder of a run (its newest checkpoint is taken), of one of its checkpoints,
    `RUN/checkpoints/STEP`, of an export, or of a hub's model.

    Raises:
      InputError: if there are no weights, or they are not of this model; the first parameter
        that does not fit is named. A model in the authors' naming says what it is only when it
        is read.
    """
    folder = together(_WHERE, lambda: _folder(experiment))
    is_step = _is_step(folder)
    if not is_step and not (folder / FOLDER).is_dir():
        settings = read_settings(folder / FILE)
        if is_hub(settings) or (folder / PARAMS).is_dir():  # all is known without its tensors
            _check(as_facts(settings).model, experiment)
        file = find_tokenizer(folder)

        def read(mesh: jax.sharding.Mesh) -> _Read:
            model = load_model(folder, mesh)
            return _Read(model.config, model.params, str(folder))

        return Source(experiment, None if file is None else Tokenizer.load(file), read)

    run, step = (folder.parents[1], int(folder.name)) if is_step else (folder, None)
    saved = _settings_of_run(run, step, experiment)
    _check(dataclasses.replace(saved.model, lora_rank=0), experiment)

    def restore(mesh: jax.sharding.Mesh) -> _Read:
        model = load_trained(run, saved, step)
        return _Read(model.experiment.model, model.params, f"step {model.step} of {run}")

    file = find_tokenizer(run) or run / FILE_NAMES[0]
    return Source(experiment, Tokenizer.load(file), restore)


def _is_step(folder: Path) -> bool:
    return folder.parent.name == FOLDER and folder.name.isdecimal()


def _folder(experiment: ExperimentConfig) -> Path:
    """Returns the folder with the weights.

    Raises:
      InputError: if it has none, or can't be read.
    """
    where = str(experiment.training.init_from)
    buckets.check_readable(_WHERE, where)
    folder = folder_of(_WHERE, where)
    if _is_step(folder) or (folder / FOLDER).is_dir() or (folder / FILE).is_file():
        return folder
    raise bad_value(
        _WHERE,
        where,
        "the folder of a run with a checkpoint, RUN/checkpoints/STEP, an export or a folder of"
        " a hub's model",
    )


def _check(model: ModelConfig, experiment: ExperimentConfig) -> None:
    _check_shapes(model, experiment.model)
    check_teaching(experiment, model.attention)


def check_teaching(experiment: ExperimentConfig, source: AttentionConfig | None) -> None:
    """Checks that what `teaching` ramps starts at 0, and that whom it follows is there.

    Args:
      experiment: of the run that starts.
      source: of the weights it starts from; None: from fresh ones.

    Raises:
      InputError: if it does not.
    """
    new = (False, False) if source is None else _is_new(source, experiment.model.attention)
    require(
        not experiment.teaching.distill or (source is not None and source.variant == "softmax"),
        "config.teaching.distill",
        experiment.teaching.distill,
        f"0 unless the weights of {_WHERE} are a softmax model's, which is followed",
    )
    for name, what, is_new in (
        ("bias_steps", "a distance bias", new[0]),
        ("offset_steps", "offsets", new[1]),
    ):
        steps = getattr(experiment.teaching, name)
        if steps and not is_new:
            where = "the weights of a fresh model" if source is None else f"those of {_WHERE}"
            raise bad_value(
                f"config.teaching.{name}", steps, f"0, since {where} have {what} already"
            )


def _new_parts(source: AttentionConfig, target: AttentionConfig) -> list[str]:
    """Returns a line on what this run's model has and theirs had not, if anything."""
    bias, offset = _is_new(source, target)
    found = ["no distance bias"] * bias + ["offsets of 0"] * offset
    return [f"  it starts with {' and '.join(found)}, which is what they are"] if found else []


def _unfinished(experiment: ExperimentConfig) -> list[str]:
    """Returns a line for each ramp that the run does not take to its end."""
    steps, teaching = experiment.training.steps, experiment.teaching
    return [
        f"  config.teaching.{name} is {ramp}, but training.steps {steps}:"
        " this run ends before what rises is all there"
        for name, ramp in (
            ("offset_steps", teaching.offset_steps),
            ("bias_steps", teaching.bias_steps),
        )
        if ramp > steps
    ]


def _is_new(source: AttentionConfig, target: AttentionConfig) -> tuple[bool, bool]:
    """Returns whether the target alone has a distance bias, and whether it alone has offsets."""
    return (
        target.has_bias and not source.has_bias,
        target.has_offset and not source.has_offset,
    )


def _flat(model: ModelConfig) -> dict[str, Any]:
    plain = dataclasses.asdict(model)
    plain["mlp_width"] = model.hidden_width
    plain["attention"] |= {
        "num_kv_heads": model.attention.kv_heads,
        "head_dim": model.head_dim,
        "bias_tail": model.attention.has_tail,
    }
    return traverse_util.flatten_dict(plain, sep=".")


def _settings_of_run(run: Path, step: int | None, experiment: ExperimentConfig) -> ExperimentConfig:
    """Returns a run's settings, on this run's devices."""
    with Checkpoints(run, read_only=True) as checkpoints:
        if not checkpoints.steps() or (step is not None and step not in checkpoints.steps()):
            raise bad_value(
                _WHERE, str(experiment.training.init_from), "a run with a checkpoint, or one of its"
            )
        found = checkpoints.newest_experiment(step)
    if found is None:
        raise InputError(f"{_WHERE}: no checkpoint in {run / FOLDER} has settings to be read.")
    return dataclasses.replace(from_config_dict(found[1]), mesh=experiment.mesh)


def _check_shapes(source: ModelConfig, target: ModelConfig) -> None:
    """Compares all parameters but those of the bias by name and shape, then the bias."""
    names = {name for both in NAMES.values() for name in both}

    def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
        scanned = dataclasses.replace(config, scan_layers=True)
        flat = traverse_util.flatten_dict(parameter_shapes(scanned), sep="/")
        return {k: x.shape for k, x in flat.items() if k.split("/")[-1] not in names}

    theirs, ours = shapes(source), shapes(dataclasses.replace(target, lora_rank=0))
    if _is_new(source.attention, target.attention)[1]:
        offset = "blocks/attention/offset"
        theirs[offset] = ours[offset]
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise InputError(
                f"{_WHERE}: the parameter {name} is {_shape(theirs.get(name))} there, but"
                f" {_shape(ours.get(name))} in this run's model; give the settings it was made with"
                " (config.json there has them)."
            )
    require(
        source.scale_embedding == target.scale_embedding,
        "model.scale_embedding",
        target.scale_embedding,
        f"{source.scale_embedding}, as in {_WHERE}",
    )
    _check_bias(source.attention, target.attention)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {list(shape)}"


def _check_bias(source: AttentionConfig, target: AttentionConfig) -> None:
    """Refuses what can't be the same function of the distance."""
    where = "model.attention."
    if source.has_bias and not target.has_bias:
        raise InputError(
            f"{_WHERE}: the parameter {NAMES[source.bias_kind][0]} of the distance bias is there,"
            f" but {where}variant = {target.variant!r} has none."
        )
    if not source.has_bias:
        return
    if not np.array_equal(global_heads(source), global_heads(target)):
        raise bad_value(
            where + "global_share",
            target.global_share,
            f"such that the same heads are global as in {_WHERE} ({source.global_share:g}, with"
            f" slope_shards = {source.slope_shards})",
        )
    if source.has_tail != target.has_tail:
        tail = "goes on past its table" if source.has_tail else "is 0 past its table"
        asked = "bias_tail=True" if source.has_tail else "bias_kind='table' and bias_tail=False"
        raise InputError(
            f"{_WHERE}: the distance bias there {tail}, so this run's must too; set {where}{asked}."
        )
    if target.bias_width < source.bias_width:
        raise bad_value(
            where + "bias_width",
            target.bias_width,
            f"at least {source.bias_width}, the width of distance_delta or distance_bias in"
            f" {_WHERE}",
        )


def _fitted(
    params: Any, source: ModelConfig, experiment: ExperimentConfig, shardings: Any
) -> Params:
    """Returns the parameters as the run's model has them, on its devices."""
    target = experiment.model

    def convert(params: Any) -> tuple[Params, Array]:
        if not source.scan_layers:
            params = stack_blocks(params)
        layer = params["blocks"]["attention"]
        bias, falls = converted_bias(layer, source.attention, target.attention)
        names = {name for both in NAMES.values() for name in both}
        if _is_new(source.attention, target.attention)[1]:
            bias["offset"] = jnp.zeros(layer["output"].shape[:2])
        layer = {name: leaf for name, leaf in layer.items() if name not in names} | bias
        params = {**params, "blocks": {**params["blocks"], "attention": layer}}
        params = params if target.scan_layers else unstack_blocks(params)
        return (_with_lora(params, experiment) if target.lora_rank else params), falls

    everywhere = jax.sharding.NamedSharding(
        jax.tree.leaves(shardings)[0].mesh, jax.sharding.PartitionSpec()
    )
    fitted, falls = jax.jit(convert, out_shardings=(shardings, everywhere))(params)
    if not falls:
        raise InputError(
            f"{_WHERE}: the slope of a head's distance bias there rises or is flat, which"
            " model.attention.bias_kind = 'decay' can't be; set it to 'table' (recipe sharp_table)."
        )
    return fitted


def _with_lora(params: Params, experiment: ExperimentConfig) -> Params:
    """Returns the parameters and LoRA's, as a fresh model of the run's seed has them."""
    key, _ = jax.random.split(jax.random.PRNGKey(experiment.training.seed))
    fresh = traverse_util.flatten_dict(init_params(experiment.model, key))
    more = {path: x for path, x in fresh.items() if is_lora(path[-1])}
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(params) | more)


def converted_bias(
    layer: Mapping[str, Any], source: AttentionConfig, target: AttentionConfig
) -> tuple[dict[str, Float[Array, "..."]], Array]:
    """Returns a layer's bias as the target learns it: the same function of the distance.

    Args:
      layer: attention parameters of the source, with or without an axis of layers.
      source: of these.
      target: as wide or wider, with a tail if the source has one. Any, if the source has no
        bias: it then is 0, but for the slope of a "decay", which can't be: that is the
        smallest there is, too small for any context.

    Returns:
      The bias's parameters, and whether every slope can be the target's.
    """
    if not source.has_bias:
        leading = layer["output"].shape[:-3]
        found = {
            name: jnp.zeros((*leading, *one.shape)) for name, one in bias_parameters(target).items()
        }
        if target.has_bias and target.bias_kind == "decay":
            found[NAMES["decay"][1]] += LOG_SLOPE_RANGE[0]
        return found, jnp.array(True)
    more = target.bias_width - source.bias_width
    table_name, slope_name = NAMES[target.bias_kind]
    function = bias_arguments(layer, source)
    table = function["distance_bias"]
    ends = [(0, 0)] * (table.ndim - 1) + [(0, more)]
    if not source.has_tail:
        return {table_name: jnp.pad(table, ends)}, jnp.array(True)
    slope, apart = function["distance_slope"], global_heads(source)
    if source.bias_kind == target.bias_kind == "decay":
        # Not through the table: theta and delta stay what they are, to the bit.
        delta = jnp.asarray(layer[table_name])
        if more and source.num_global_heads:  # past its last entry such a head's bias is 0
            delta = jnp.where(apart[:, None], table, delta)
        wide = jnp.pad(delta, ends, mode="edge")
        return {table_name: wide, slope_name: jnp.asarray(layer[slope_name])}, jnp.array(True)
    beyond = jnp.arange(1, more + 1, dtype=table.dtype)
    wide = jnp.concatenate([table, table[..., -1:] - slope[..., None] * beyond], axis=-1)
    if target.bias_kind == "table":
        return {table_name: wide, slope_name: slope}, jnp.array(True)
    falls = jnp.all((slope > np.exp(LOG_SLOPE_RANGE[0])) | apart)
    theta = jnp.where(apart, 0.0, jnp.log(jnp.where(apart | (slope <= 0), 1.0, slope)))
    distance = jnp.arange(target.bias_width, dtype=table.dtype)
    return {table_name: wide + slope[..., None] * distance, slope_name: theta}, falls
