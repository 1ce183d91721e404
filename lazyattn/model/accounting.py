"""Counting parameters, and the FLOPs that model FLOPs utilisation is measured by."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from lazyattn.model import lora
from lazyattn.model.config import ModelConfig
from lazyattn.model.heads import head_windows

# Which group a parameter belongs to, by the last part of its path that is listed.
_GROUPS = {
    "embedding": "embedding",
    "unembedding": "embedding",
    "distance_bias": "distance_bias",
    "distance_slope": "distance_bias",
    "distance_delta": "distance_bias",
    "distance_log_slope": "distance_bias",
    "offset": "offset",
    "scale": "norm",
    "query": "attention",
    "key": "attention",
    "value": "attention",
    "output": "attention",
    "output_gate": "attention",
    "query_bias": "attention",
    "key_bias": "attention",
    "value_bias": "attention",
    "gate": "mlp",
    "up": "mlp",
    "down": "mlp",
}


def parameter_group(path: tuple[Any, ...]) -> str:
    """Returns the group of a parameter, given its key path in the tree.

    One of embedding, attention (matrices, and biases of projections), mlp (matrices),
    norm, distance_bias (tables and slopes, of either kind), offset and lora.
    """
    name = path[-1].key
    return "lora" if lora.is_lora(name) else _GROUPS[name]


def parameter_counts(params: Mapping[str, Any]) -> dict[str, int]:
    """Returns the number of parameters in each group, and their "total".

    Args:
      params: arrays or `jax.ShapeDtypeStruct`s, as `parameter_shapes(config)` gives.
    """
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        group = parameter_group(path)
        counts[group] = counts.get(group, 0) + math.prod(leaf.shape)
    return counts | {"total": sum(counts.values())}


@dataclasses.dataclass(frozen=True)
class FlopsPerToken:
    """Floating-point operations of matrix products, per token, a multiply-add being two.

    Attributes:
      weights: products with parameters, forward.
      attention: queries with keys and weights with values, forward, over visible
        (causal) pairs only.
    """

    weights: float
    attention: float

    @property
    def forward(self) -> float:
        """A forward pass."""
        return self.weights + self.attention

    @property
    def training(self) -> float:
        """A forward and a backward pass; recomputation (remat) is not counted."""
        return 3 * self.forward


def flops_per_token(config: ModelConfig, length: int) -> FlopsPerToken:
    """Returns what one token of a row of one document costs, on average.

    What softmax attention (with the same window) would need is counted whatever the
    variant: tiles that Lazy Attention skips count as done, so that utilisation (MFU)
    compares by tokens a second. The embedding look-up is not a product and counts nothing.

    Args:
      config: the model.
      length: tokens a row; a token sees (length + 1) / 2 keys on average, fewer with a
        window.

    Source: Chowdhery et al., arXiv 2204.02311, appendix B, with causal attention
    counted as half.
    """
    att = config.attention
    query_sized = 3 if att.output_gate else 2
    heads = query_sized * att.num_heads + 2 * att.kv_heads
    projections = config.width * config.head_dim * heads
    mlp = 3 * config.width * config.hidden_width
    weights = config.num_layers * (projections + mlp) + config.vocab_size * config.width
    seen = sum(_mean_keys(length, window) for window in head_windows(att))
    pairs = config.num_layers * config.head_dim * seen
    return FlopsPerToken(weights=2.0 * weights, attention=4.0 * pairs)


def _mean_keys(length: int, window: int | None) -> float:
    """Returns how many keys a token sees on average."""
    window = length if window is None else min(window, length)
    return window - window * (window - 1) / (2 * length)
