"""The key/value cache of incremental decoding, of static shape."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lazyattn import sharding
from lazyattn.errors import require
from lazyattn.model.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far, one document a row.

    Row b holds tokens 0 ... lengths[b] - 1; what lies beyond is never seen, since
    it comes after every query, and is overwritten in turn. Shortening `lengths`
    therefore forgets tokens.

    Attributes:
      keys: rotated keys, compute dtype.
      values: values, compute dtype.
      lengths: int32, tokens held in each row.
    """

    keys: Float[Array, "layers batch cache_length kv_heads head_dim"]
    values: Float[Array, "layers batch cache_length kv_heads head_dim"]
    lengths: Int[Array, " batch"]


def init_cache(config: ModelConfig, batch: int, cache_length: int) -> KVCache:
    """Returns an empty cache.

    Args:
      config: the model.
      batch: rows.
      cache_length: tokens each row has room for.

    Raises:
      InputError: for a length below 1.
    """
    require(cache_length >= 1, "cache_length", cache_length, "at least 1")
    shape = (
        config.num_layers,
        batch,
        cache_length,
        config.attention.kv_heads,
        config.head_dim,
    )
    empty = jnp.zeros(shape, config.compute_dtype)
    empty = sharding.constrain(empty, "layers", "batch", None, "kv_heads", "head_dim")
    return KVCache(empty, empty, jnp.zeros(batch, jnp.int32))


def trained_cache_length(config: ModelConfig, sequence_length: int) -> int | None:
    """Returns the only length of cache that decodes as the model was trained; None: any.

    `lazy_length_offset` divides its offset by the number of keys a row has room for.

    Args:
      config: the model.
      sequence_length: of the rows it was trained on.
    """
    return sequence_length if config.attention.variant == "lazy_length_offset" else None
