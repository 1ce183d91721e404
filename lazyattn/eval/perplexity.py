"""Validation loss, perplexity and bits per byte."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from lazyattn import sharding
from lazyattn.data.pipeline import Batch as HostBatch
from lazyattn.data.pipeline import TrainingData, validation_batches
from lazyattn.distributed import one_at_a_time
from lazyattn.experiment import ExperimentConfig
from lazyattn.model.config import ModelConfig
from lazyattn.model.objective import Batch, LossFn, counted, make_loss_fn
from lazyattn.quantity import quantity

# Batches that may be on their way before the sums of the first of them are waited for.
_AHEAD = 8


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well a model predicts some text.

    Attributes:
      loss: mean negative log-likelihood of a counted target token, nats.
      bits_per_byte: all the tokens' negative log-likelihood in bits over the bytes
        of UTF-8 they stand for. Comparable between tokenizers. End-of-document
        tokens cost bits and stand for no bytes.
      tokens: counted target tokens.
      bytes: bytes they stand for.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


class Evaluator:
    """Measures a model's perplexity; compiled once."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: jax.sharding.Mesh,
        param_shardings: Any,
        bytes_per_token: Int32[np.ndarray, " vocab"],
        *,
        loss_fn: LossFn | None = None,
    ):
        """Prepares the compiled function.

        Args:
          config: the model.
          mesh: where it runs.
          param_shardings: the parameters' `NamedSharding`s.
          bytes_per_token: `Tokenizer.bytes_per_token`.
          loss_fn: the loss; None: the model's.
        """
        loss_fn = make_loss_fn(config) if loss_fn is None else loss_fn
        everywhere = jax.sharding.NamedSharding(mesh, sharding.spec())
        rows = jax.sharding.NamedSharding(mesh, sharding.spec("batch", "length"))
        self._mesh = mesh
        self._sums: Callable[..., tuple[Array, Array, Array]] = jax.jit(
            functools.partial(_sums, loss_fn, jnp.asarray(bytes_per_token)),
            in_shardings=(param_shardings, rows),
            out_shardings=everywhere,
        )

    def __call__(
        self,
        params: Any,
        batches: Iterable[Mapping[str, Int[np.ndarray, "rows length"]]],
    ) -> Perplexity:
        """Returns the perplexity over all batches (this process's share of each).

        Raises:
          ValueError: if no target is counted.
        """
        with jax.set_mesh(self._mesh):
            sums: list[tuple[Array, Array, Array]] = []
            for batch in batches:
                rows = sharding.shard_batch(batch, self._mesh)
                sums.append(one_at_a_time(self._sums(params, rows)))
                # A split may be far larger than the memory of a device.
                if len(sums) >= _AHEAD:
                    jax.block_until_ready(sums[-_AHEAD])
        host = jax.device_get(sums)
        nll = sum(float(part[0]) for part in host)
        tokens = sum(int(part[1]) for part in host)
        size = sum(int(part[2]) for part in host)
        if not tokens:
            raise ValueError("there is no target token to evaluate on")
        bits = nll / math.log(2)
        return Perplexity(nll / tokens, bits / size if size else math.inf, tokens, size)


def _sums(
    loss_fn: LossFn, bytes_per_token: Int[Array, " vocab"], params: Any, batch: Batch
) -> tuple[Float[Array, ""], Int[Array, ""], Int[Array, ""]]:
    """Returns the nll, tokens and bytes of a batch."""
    mask = counted(batch)
    size = jnp.where(mask, bytes_per_token[batch["targets"]], 0)
    return loss_fn(params, batch).nll, jnp.sum(mask), jnp.sum(size)


def coverage(tokens: int, batches: int = 0) -> str:
    """Returns the words for what a figure of the validation split is over.

    Args:
      tokens: tokens that counted.
      batches: the first ones were taken; 0: all.
    """
    part = f"the first {quantity(batches, 'batch', 'batches')} of the" if batches else "the whole"
    return f"over {quantity(tokens, 'token')}, {part} validation split"


def validation_rows(
    experiment: ExperimentConfig,
    prepared: TrainingData,
    mesh: jax.sharding.Mesh,
    batches: int = 0,
) -> Iterator[HostBatch]:
    """Returns this process's share of the validation batches.

    Args:
      experiment: the settings.
      prepared: the data.
      mesh: where the batches go.
      batches: the first ones to take; 0: the whole split.
    """
    share = sharding.batch_share(mesh)
    every = validation_batches(
        prepared, experiment.data, process_index=share.index, process_count=share.count
    )
    return itertools.islice(every, batches or None)
