"""Choosing the next token from its logits."""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lazyattn.allowed import POSITIVE, SHARE, Allowed, check_settings

_NOT_NEGATIVE = Allowed(lambda value: value >= 0, "0 or positive")
# Positions are int32.
_TOKENS = Allowed(lambda n: 1 <= n <= 2**30, "from 1 to 2**30")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How a continuation is drawn.

    Attributes:
      max_new_tokens: tokens to add at most.
      temperature: divides the logits; 0 always takes the likeliest token.
      top_p: draw from the smallest set of likeliest tokens whose probabilities, at
        this temperature, sum to at least this much; 1: from all.
      top_k: draw from so many of the likeliest tokens; 0: from all.
      min_p: draw from tokens that are at least so many times as likely as the
        likeliest, at this temperature; 0: from all.
      repetition_penalty: what a token's logit is divided by if it is positive, and
        multiplied by if not, once the token is in the row; 1: nothing.

    A token must pass all of `top_k`, `top_p` and `min_p`, each of which looks at the
    whole distribution. Ties at the edge are kept.
    """

    max_new_tokens: Annotated[int, _TOKENS] = 64
    temperature: Annotated[float, _NOT_NEGATIVE] = 1.0
    top_p: Annotated[float, Allowed(lambda p: 0 < p <= 1, "above 0 and at most 1")] = 1.0
    top_k: Annotated[int, _NOT_NEGATIVE] = 0
    min_p: Annotated[float, SHARE] = 0.0
    repetition_penalty: Annotated[float, POSITIVE] = 1.0

    def __post_init__(self):
        check_settings(self, "")


def next_token(
    logits: Float[Array, "batch vocab"],
    keys: Array,
    config: SamplingConfig,
    seen: Bool[Array, "batch vocab"] | None = None,
) -> Int[Array, " batch"]:
    """Returns the next token of each row, int32.

    Args:
      logits: float32.
      keys: one PRNG key a row, so that a row's draw does not depend on the others.
      config: how to draw.
      seen: tokens each row holds, for the penalty; None: there is none.
    """
    if seen is not None and config.repetition_penalty != 1:
        # Keskar et al., arXiv 1909.05858, section 4.1, for logits of either sign.
        penalty = config.repetition_penalty
        penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen, penalized, logits)
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / config.temperature
    kept = jnp.ones(logits.shape, bool)
    if 0 < config.top_k < logits.shape[1]:
        lowest = jax.lax.top_k(logits, config.top_k)[0][:, -1:]
        kept &= logits >= lowest
    if config.top_p < 1:
        kept &= _nucleus(logits, config.top_p)
    if config.min_p > 0:
        # Nguyen et al., arXiv 2407.01082, section 3.
        kept &= logits >= logits.max(axis=-1, keepdims=True) + math.log(config.min_p)
    logits = jnp.where(kept, logits, -jnp.inf)
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
