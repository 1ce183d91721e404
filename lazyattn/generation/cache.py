"""The key/value cache of incremental decoding, of static shape."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lazyattn import sharding
from lazyattn.errors import InputError, require
from lazyattn.model.config import ModelConfig
from lazyattn.model.heads import head_windows
from lazyattn.quantity import quantity


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


def check_context(
    context: int,
    config: ModelConfig,
    sequence_length: int,
    *,
    name: str,
    beyond_table: bool = False,
) -> None:
    """Checks that a model knows what to do with a context of this length.

    A bias table without a tail says nothing of distances past its end. There the
    bias is 0, which a model trained on shorter rows never met. Nor will it where all
    heads have a window that ends before.

    Args:
      context: tokens a prediction may look at.
      config: the model.
      sequence_length: of the rows it was trained on.
      name: what asked for the context.
      beyond_table: allow it all the same.

    Raises:
      InputError: for a context below 1 or past the end of the table.
    """
    require(context >= 1, name, context, "at least 1")
    attention = config.attention
    if beyond_table or not attention.has_bias or attention.has_tail:
        return
    longest = max(attention.bias_width, sequence_length)
    farthest = max(window or context for window in head_windows(attention))
    if min(context, farthest) > longest:
        raise InputError(
            f"{name} is {context}, but the model's bias table has"
            f" {quantity(attention.bias_width, 'distance')} and no tail, and its rows had"
            f" {quantity(sequence_length, 'token')}; it must be at most {longest},"
            " or give --beyond_table to score farther keys with a bias of 0."
        )
