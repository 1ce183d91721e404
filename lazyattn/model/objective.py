"""The training loss as a function of parameters and a batch."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lazyattn.model.config import ModelConfig
from lazyattn.model.distill import divergence
from lazyattn.model.loss import LossSums, cross_entropy
from lazyattn.model.taken_over import frozen_twin, softmax_twin, twin_params
from lazyattn.model.transformer import Transformer, output_embedding

Params = Any
# inputs, targets, segment_ids and positions.
Batch = Mapping[str, Int[Array, "batch length"]]
LossFn = Callable[..., LossSums]


def counted(batch: Batch) -> Bool[Array, "batch length"]:
    """Returns which targets count: all but padding."""
    return batch["segment_ids"] > 0


def make_loss_fn(
    config: ModelConfig,
    z_loss: float = 0.0,
    *,
    distill: float = 0.0,
    frozen: bool = False,
    quantization: str = "none",
) -> LossFn:
    """Returns the model's next-token loss, summed over counted targets.

    Args:
      config: the model.
      z_loss: weight of log(Z)^2 in the sum that is differentiated.
      distill: share that the divergence from the softmax twin has in that sum. The function
        then takes the twin's parameters, too; None: they are among the model's own.
      frozen: only what the twin has not gets gradients.
      quantization: of the model's products with matrices, as `Transformer` takes it; the twin's
        have none.
    """
    twin = softmax_twin(config)

    def hidden_of(model: Transformer, params: Params, batch: Batch) -> Any:
        return model.apply(
            {"params": params},
            batch["inputs"],
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
        )

    def next_token(params: Params, batch: Batch) -> tuple[LossSums, Any]:
        if frozen:
            params = frozen_twin(params)
        hidden = hidden_of(Transformer(config, quantization), params, batch)
        # Profiles find it by this name.
        with jax.named_scope("loss"):
            sums = cross_entropy(
                hidden,
                output_embedding(params, config),
                batch["targets"],
                counted(batch).astype(jnp.float32),
                chunk=config.loss_positions,
                z_loss=z_loss,
            )
        return sums, hidden

    def distilled(params: Params, batch: Batch, teacher: Params | None = None) -> LossSums:
        sums, hidden = next_token(params, batch)
        theirs = jax.lax.stop_gradient(twin_params(params) if teacher is None else teacher)
        table = output_embedding(params, config)
        with jax.named_scope("distillation"):
            apart = divergence(
                hidden,
                jax.lax.stop_gradient(table) if frozen else table,
                hidden_of(Transformer(twin), theirs, batch),
                output_embedding(theirs, twin),
                counted(batch).astype(jnp.float32),
                chunk=config.loss_positions,
            )
        objective = (1 - distill) * sums.objective + distill * apart
        return dataclasses.replace(sums, objective=objective)

    return distilled if distill else lambda params, batch: next_token(params, batch)[0]
