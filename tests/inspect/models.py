"""A model small enough to look at every one of its weights."""

import functools

import jax
import numpy as np

from lazyattn.model.config import AttentionConfig, ModelConfig
from lazyattn.model.parameters import init_params
from lazyattn.model.transformer import attention_weights

VOCAB = 50


@functools.cache
def model(variant="lazy", **settings):
    """Returns its config and parameters; offsets differ by head."""
    scan_layers = settings.pop("scan_layers", True)
    config = ModelConfig(
        vocab_size=VOCAB,
        width=16,
        num_layers=2,
        compute_dtype="float32",
        scan_layers=scan_layers,
        attention=AttentionConfig(
            variant=variant, num_heads=4, bias_width=32, implementation="xla", **settings
        ),
    )
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.PRNGKey(3))

    def spread(path, leaf):
        if path[-1].key != "offset":
            return leaf
        return leaf + np.linspace(-0.8, 0.3, leaf.size, dtype=np.float32).reshape(leaf.shape)

    return config, jax.tree_util.tree_map_with_path(spread, params)


def tokens(length, seed=0):
    """Returns a row of token ids."""
    return np.random.default_rng(seed).integers(VOCAB, size=length).astype(np.int32)


def weights_of(config, params, inputs, segment_ids=None):
    """Returns [layers, rows, heads, queries, keys], by the definition."""
    function = jax.jit(attention_weights, static_argnums=1)
    return np.asarray(function(params, config, inputs, segment_ids), np.float64)
