"""The training loss as a function of parameters and a batch."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lazyattn.model.config import ModelConfig
from lazyattn.model.loss import LossSums, cross_entropy
from lazyattn.model.transformer import Transformer, output_embedding

Params = Any
# inputs, targets, segment_ids and positions.
Batch = Mapping[str, Int[Array, "batch length"]]
LossFn = Callable[[Params, Batch], LossSums]


def counted(batch: Batch) -> Bool[Array, "batch length"]:
    """Returns which targets count: all but padding."""
    return batch["segment_ids"] > 0


def make_loss_fn(config: ModelConfig, z_loss: float = 0.0) -> LossFn:
    """Returns the model's next-token loss, summed over counted targets.

    Args:
      config: the model.
      z_loss: weight of log(Z)^2 in the sum that is differentiated.
    """
    model = Transformer(config)

    def loss_fn(params: Params, batch: Batch) -> LossSums:
        hidden: Any = model.apply(
            {"params": params},
            batch["inputs"],
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
        )
        # Profiles find it by this name.
        with jax.named_scope("loss"):
            return cross_entropy(
                hidden,
                output_embedding(params, config),
                batch["targets"],
                counted(batch).astype(jnp.float32),
                chunk=config.loss_positions,
                z_loss=z_loss,
            )

    return loss_fn
