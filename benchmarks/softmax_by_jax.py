"""A model of softmax attention that calls JAX's own, cuDNN's on a GPU, instead of our op."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jaxtyping import Array, Float

from lazyattn.errors import require
from lazyattn.model import sharded_attention


def attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    **rest: Any,
) -> Float[Array, "batch length heads head_dim"]:
    """Stands in for `lazy_attention` in a model of softmax attention and whole rows.

    `segment_ids` are left out of account: every row of this benchmark is one document.

    Raises:
      InputError: if the call wants more than that.
    """
    for name in ("distance_bias", "distance_slope", "offset", "query_start", "chunk_starts"):
        require(rest.get(name) is None, f"cudnn's {name}", "given", "left out")
    on_gpu = jax.default_backend() == "gpu"
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=True, implementation="cudnn" if on_gpu else "xla"
    )


@contextlib.contextmanager
def instead_of_ours() -> Iterator[None]:
    """Within it, models are traced with `attention` in place of the op."""
    ours = sharded_attention.lazy_attention
    # Tracings made with one attention must not be taken for those with the other.
    jax.clear_caches()
    sharded_attention.lazy_attention = attention
    try:
        yield
    finally:
        sharded_attention.lazy_attention = ours
        jax.clear_caches()
