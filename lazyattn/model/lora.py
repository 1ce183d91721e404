"""Low-rank changes of a frozen model's matrices (LoRA): names, and how they are merged.

A matrix W of n inputs becomes W + (alpha / rank) A B with A [inputs, rank] and B [rank, outputs].
A starts random and B at 0, so that the model starts as what it is. W itself gets no gradient.

Source: Hu et al., arXiv 2106.09685.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float

from lazyattn.model.config import ModelConfig

A, B = "_lora_a", "_lora_b"


def is_lora(name: str) -> bool:
    """Returns whether a parameter of this name is one of the two."""
    return name.endswith((A, B))


def scaled(b: Float[Array, "..."], config: ModelConfig) -> Float[Array, "..."]:
    """Returns B times what all of a model's changes are multiplied with."""
    return b * (config.lora_alpha / config.lora_rank)


def merged(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Returns the parameters of the same function with `lora_rank` 0.

    Args:
      params: of the model, scanned or not.
      config: the model.
    """
    flat = traverse_util.flatten_dict(params)
    found = {path: x for path, x in flat.items() if not is_lora(path[-1])}
    for path, a in flat.items():
        if path[-1].endswith(A):
            name = path[-1].removesuffix(A)
            matrix, b = found[(*path[:-1], name)], flat[(*path[:-1], name + B)]
            layers = a.shape[0] if path[0] == "blocks" else 1
            rank = config.lora_rank
            product = jnp.matmul(
                a.reshape(layers, -1, rank),
                scaled(b, config).reshape(layers, rank, -1),
                precision="highest",
            )
            found[(*path[:-1], name)] = matrix + product.reshape(matrix.shape)
    return traverse_util.unflatten_dict(found)
