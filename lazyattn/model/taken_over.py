"""The softmax model that a lazy one was made of, and what came new."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import traverse_util

from lazyattn.model.config import ModelConfig
from lazyattn.model.distance_bias import NAMES
from lazyattn.model.lora import is_lora

_NEW = frozenset({"offset"} | {name for both in NAMES.values() for name in both})


def is_new(path: tuple[str, ...]) -> bool:
    """Returns whether the softmax model has no parameter at this path: all else is its own."""
    return path[-1] in _NEW or is_lora(path[-1])


def softmax_twin(config: ModelConfig) -> ModelConfig:
    """Returns the softmax model."""
    attention = dataclasses.replace(config.attention, variant="softmax")
    return dataclasses.replace(config, attention=attention, lora_rank=0)


def twin_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns its parameters among those of the lazy model, or any tree with these names."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: x for path, x in flat.items() if not is_new(path)})


def frozen_twin(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the lazy model's parameters, of which only those that are new get gradients."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict(
        {path: x if is_new(path) else jax.lax.stop_gradient(x) for path, x in flat.items()}
    )
