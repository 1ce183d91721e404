"""How far a model's next-token probabilities are from those of the model it is to follow."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lazyattn import sharding


def divergence(
    hidden: Float[Array, "batch length width"],
    embedding: Float[Array, "vocab width"],
    teacher_hidden: Float[Array, "batch length width"],
    teacher_embedding: Float[Array, "vocab width"],
    weights: Float[Array, "batch length"],
    *,
    chunk: int,
) -> Float[Array, ""]:
    """Returns the sum over positions of weight times KL(teacher || model), in nats.

    Logits exist for one chunk of positions at a time, and are made again in the backward pass.

    Args:
      hidden: the model's final hidden states.
      embedding: its output embedding, float32.
      teacher_hidden, teacher_embedding: the same of the model to follow; no gradient.
      weights: how much each position counts.
      chunk: positions whose logits are held at once, at least one of every row.

    Source: Hinton et al., arXiv 1503.02531, at a temperature of 1.
    """
    batch, length = hidden.shape[:2]
    number = -(-length // max(1, chunk // batch))
    size = -(-length // number)
    # Whole rows of the tables, once, not for each chunk.
    tables = [sharding.constrain(x, "vocab", None) for x in (embedding, teacher_embedding)]

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, number * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, number, size, *x.shape[2:]), 1, 0)

    def log_probabilities(h: Array, table: Array) -> Float[Array, "batch size vocab"]:
        logits = jnp.einsum(
            "bcw,vw->bcv", h, table.astype(h.dtype), preferred_element_type=jnp.float32
        )
        return jax.nn.log_softmax(sharding.constrain(logits, "batch", None, "vocab"))

    @jax.checkpoint
    def step(total: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
        h, teacher_h, w = part
        ours = log_probabilities(h, tables[0])
        theirs = jax.lax.stop_gradient(log_probabilities(teacher_h, tables[1]))
        apart = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
        return total + jnp.sum(w * apart), None

    parts = cut(hidden), cut(jax.lax.stop_gradient(teacher_hidden)), cut(weights)
    return jax.lax.scan(step, jnp.zeros((), jnp.float32), parts)[0]
