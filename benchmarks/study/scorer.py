"""One program per row length that says of every token what it costs and whether it is foreseen."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from benchmarks.study.data import packed
from lazyattn.model.config import ModelConfig
from lazyattn.model.parameters import stack_blocks
from lazyattn.model.transformer import Transformer, logits, output_embedding

# Tokens of a batch to score, and positions whose logits are held at once.
BATCH_TOKENS = 65_536
_CHUNK = 8192


def rows(length: int) -> int:
    """Returns how many rows of a length are scored at once."""
    return max(1, BATCH_TOKENS // length)


def score(
    params: Mapping[str, Any],
    tokens: Int[Array, "rows tokens"],
    *,
    config: ModelConfig,
    eos: int,
) -> tuple[Float[Array, "rows targets"], Bool[Array, "rows targets"], Int[Array, "rows targets"]]:
    """Scores rows, documents apart, as in training.

    Args:
      params: the model's parameters.
      tokens: rows of one token more than the length.
      config: the model.
      eos: ends a document.

    Returns:
      nll: of the token after each position, nats; 0 where it follows the end of a document.
      hit: whether it is the likeliest.
      context: tokens of its document that the position sees, itself among them; 0 where the
        target doesn't count.
    """
    if not config.scan_layers:  # one layer compiles faster than all
        params, config = stack_blocks(params), dataclasses.replace(config, scan_layers=True)
    batch = packed(tokens, eos)
    counts = batch["segment_ids"] > 0
    hidden: Any = Transformer(config).apply(
        {"params": params},
        batch["inputs"],
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
    )
    table = output_embedding(params, config)
    size = math.gcd(counts.size, _CHUNK)

    def chunk(part: tuple[Array, Array]) -> tuple[Array, Array]:
        scores = logits(part[0], table)
        own = jnp.take_along_axis(scores, part[1][:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(scores, axis=-1) - own, jnp.argmax(scores, axis=-1) == part[1]

    parts = hidden.reshape(-1, size, hidden.shape[-1]), batch["targets"].reshape(-1, size)
    nll, hit = (x.reshape(counts.shape) for x in jax.lax.map(chunk, parts))
    context = jnp.where(counts, batch["positions"] + 1, 0)
    return jnp.where(counts, nll, 0), hit, context
