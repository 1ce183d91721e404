"""Choosing the next token from its logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lazyattn.errors import require


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How a continuation is drawn.

    Attributes:
      max_new_tokens: tokens to add at most.
      temperature: divides the logits; 0 always takes the likeliest token.
      top_p: draw from the smallest set of likeliest tokens whose probabilities, at
        this temperature, sum to at least this much; 1: from all.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self):
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        require(self.temperature >= 0, "temperature", self.temperature, "0 or positive")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")


def next_token(
    logits: Float[Array, "batch vocab"], keys: Array, config: SamplingConfig
) -> Int[Array, " batch"]:
    """Returns the next token of each row, int32.

    Args:
      logits: float32.
      keys: one PRNG key a row, so that a row's draw does not depend on the others.
      config: how to draw.
    """
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / config.temperature
    if config.top_p < 1:
        logits = jnp.where(_nucleus(logits, config.top_p), logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _nucleus(logits: Float[Array, "batch vocab"], top_p: float) -> Bool[Array, "batch vocab"]:
    """Returns the tokens of the nucleus (Holtzman et al., arXiv 1904.09751, section 3.1).

    A token belongs if those likelier than it have less than `top_p` together; the
    likeliest therefore always does. Tokens as likely as the last one belong too.
    """
    ranked = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    lowest = jnp.min(jnp.where(before < top_p, ranked, jnp.inf), axis=-1, keepdims=True)
    return logits >= lowest
