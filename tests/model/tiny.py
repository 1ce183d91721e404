"""A model small enough to compile in a second or two, and inputs for it."""

import jax
import jax.numpy as jnp
import numpy as np

from lazyattn.model.config import AttentionConfig, ModelConfig
from lazyattn.model.heads import initial_slopes
from lazyattn.model.parameters import parameter_shapes

VOCAB = 31


def make_config(variant="lazy", *, attention=None, **settings):
    """Returns a two-layer model with grouped-query heads and a table shorter than rows."""
    attention = {
        "variant": variant,
        "num_heads": 4,
        "num_kv_heads": 2,
        "bias_width": 6,
        "implementation": "xla",
        **(attention or {}),
    }
    settings = {
        "vocab_size": VOCAB,
        "width": 16,
        "num_layers": 2,
        "mlp_width": 24,
        "compute_dtype": "float32",
        "loss_chunk": 8,
        **settings,
    }
    return ModelConfig(attention=AttentionConfig(**attention), **settings)


def make_params(config, seed=0):
    """Returns parameters about as large as initial ones, but none of them a constant.

    Made by numpy: compiling JAX's generators takes longer than a whole test.
    """
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        noise = rng.normal(size=leaf.shape)
        match path[-1].key:
            case "distance_delta":
                return 0.1 * noise
            case "distance_log_slope":
                return np.log(0.3) + 0.3 * noise
            case "distance_bias":
                return 0.1 * noise - 0.3 * np.arange(leaf.shape[-1])
            case "distance_slope":
                return 0.3 + 0.1 * noise
            case "offset":
                return -0.5 + 0.1 * noise
            case "scale":
                return 1 + 0.1 * noise
        return noise * config.width**-0.5

    filled = jax.tree_util.tree_map_with_path(fill, parameter_shapes(config))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), filled)


def make_batch(seed=0, rows=2, length=11):
    """Returns inputs, targets, and segment ids of several documents and padding."""
    rng = np.random.default_rng(seed)
    inputs, targets = rng.integers(VOCAB, size=(2, rows, length))
    segment_ids = 1 + np.cumsum(rng.random((rows, length)) < 0.3, axis=1)
    segment_ids[-1, length - 2 :] = 0
    batch = {"inputs": inputs, "targets": targets, "segment_ids": segment_ids}
    return {name: jnp.asarray(array, jnp.int32) for name, array in batch.items()}


def dealt_slopes(heads, kv_heads, slope_shards=1):
    """Returns which slope each head of a layer without global heads starts with."""
    return initial_slopes(
        AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, slope_shards=slope_shards)
    )
