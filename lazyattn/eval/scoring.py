"""Log-likelihoods of many sequences of any length, in a handful of compiled shapes.

Everything that measures text goes through here: rolling perplexity, LAMBADA and the
benchmarks of lm-evaluation-harness.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32
from tqdm import tqdm

from lazyattn import sharding
from lazyattn.errors import require
from lazyattn.generation.cache import trained_cache_length
from lazyattn.model.config import ModelConfig
from lazyattn.model.transformer import Transformer, logits, output_embedding

# The shortest row; shorter sequences are padded to it.
_SHORTEST = 64


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a model says of each token of a sequence but the first.

    Attributes:
      nll: negative log-likelihood of token i + 1 given tokens 0 ... i, nats.
      greedy: whether token i + 1 is the one the model finds likeliest.
    """

    nll: Float[np.ndarray, " targets"]
    greedy: Bool[np.ndarray, " targets"]


def full_precision(config: ModelConfig) -> ModelConfig:
    """Returns the model with nothing traded for speed.

    Float32 activations, and no mass left out (`skip_mass` 0): what is skipped
    depends on the rows a token shares a tile with, and a benchmark should not.
    """
    attention = dataclasses.replace(config.attention, skip_mass=0.0)
    return dataclasses.replace(config, compute_dtype="float32", attention=attention)


def row_lengths(config: ModelConfig, context: int) -> tuple[int, ...]:
    """Returns the lengths that rows are padded to, shortest first, `context` last.

    Powers of two, so that a row is at least half full and a context of 8192 needs
    eight shapes. `lazy_length_offset` divides its offset by the length of the row,
    so its rows have one length, that of the context.
    """
    if trained_cache_length(config, context) is not None:
        return (context,)
    shorter = []
    length = _SHORTEST
    while length < context:
        shorter.append(length)
        length *= 2
    return (*shorter, context)


class Scorer:
    """Scores sequences on a mesh; a row holds one sequence and padding after it.

    Nothing before the padding can see it, and no row sees another, so that a score
    depends on its own sequence alone, up to the rounding of float32.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        config: ModelConfig,
        mesh: jax.sharding.Mesh,
        *,
        batch_tokens: int = 16_384,
        exact: bool = True,
    ):
        """Prepares the compiled function.

        Args:
          params: the model's parameters, laid out on `mesh`.
          config: the model.
          mesh: where it runs; rows are split over its batch axes.
          batch_tokens: tokens of a batch, at least one row for each part of it.
          exact: score in `full_precision`; False: with the model's own compute dtype
            and `skip_mass`.

        Raises:
          InputError: for batch_tokens below 1.
        """
        require(batch_tokens >= 1, "batch_tokens", batch_tokens, "at least 1")
        self.config = full_precision(config) if exact else config
        self._params = params
        self._mesh = mesh
        self._batch_tokens = batch_tokens
        self.precision = "highest" if exact else None
        # Whole on every process, as is what it is given.
        everywhere = jax.sharding.NamedSharding(mesh, sharding.spec())
        self._score: Any = jax.jit(
            functools.partial(score_tokens, self.config), out_shardings=everywhere
        )

    def update(self, params: Mapping[str, Any]) -> None:
        """Puts other parameters of the same model in place; nothing is compiled again."""
        self._params = params

    @property
    def compilations(self) -> int:
        """Shapes compiled so far."""
        return self._score._cache_size()

    def rows(self, length: int) -> int:
        """Returns how many rows of this length a batch has."""
        shards = sharding.num_shards(self._mesh, "batch")
        return max(1, self._batch_tokens // (length * shards)) * shards

    def __call__(
        self,
        sequences: Sequence[Sequence[int] | Int[np.ndarray, " tokens"]],
        *,
        context: int,
        label: str = "",
    ) -> list[Scores]:
        """Returns the scores of each sequence, in the order given.

        The longest are scored first, so that a batch too big for the device is found
        at once. Where the sequences of one length don't fill a batch, shorter ones do.

        Args:
          sequences: token ids, each of 2 to `context` + 1 tokens.
          context: tokens that a prediction may look at.
          label: what the progress bar calls this; "": no bar.

        Raises:
          InputError: for a sequence too short or too long, or a token that the model
            doesn't have.
        """
        arrays = [np.asarray(sequence, np.int32) for sequence in sequences]
        self._check(arrays, context)
        order = sorted(range(len(arrays)), key=lambda i: -arrays[i].size)
        found: dict[int, Scores] = {}
        with progress(label, sum(array.size - 1 for array in arrays)) as bar:
            batches = self._batches(arrays, order, context)
            for members, nll, greedy in _one_ahead(batches, self._run):
                for row, index in enumerate(members):
                    targets = arrays[index].size - 1
                    found[index] = Scores(nll[row, :targets], greedy[row, :targets])
                bar.update(sum(arrays[index].size - 1 for index in members))
        return [found[index] for index in range(len(arrays))]

    def score_rows(
        self, tokens: Int32[np.ndarray, "rows tokens"], label: str = ""
    ) -> tuple[Float[np.ndarray, "rows targets"], Bool[np.ndarray, "rows targets"]]:
        """Returns nll and greediness of every token but the first of rows of one length.

        Args:
          tokens: token ids, at least 2 a row, none of them padding.
          label: as above.

        Raises:
          InputError: as above.
        """
        scores = self(list(tokens), context=tokens.shape[1] - 1, label=label)
        return np.stack([s.nll for s in scores]), np.stack([s.greedy for s in scores])

    def _check(self, arrays: list[Int32[np.ndarray, " tokens"]], context: int) -> None:
        require(context >= 1, "context", context, "at least 1")
        for array in arrays:
            require(
                2 <= array.size <= context + 1,
                "the tokens of a sequence to score",
                array.size,
                f"from 2 to {context + 1}, one more than the context",
            )
            for worst in (int(array.min()), int(array.max())):
                require(
                    0 <= worst < self.config.vocab_size,
                    "a token to score",
                    worst,
                    f"from 0 to {self.config.vocab_size - 1}",
                )

    def _batches(
        self, arrays: list[Int32[np.ndarray, " tokens"]], order: list[int], context: int
    ) -> Iterator[tuple[list[int], Int32[np.ndarray, "rows tokens"]]]:
        """Yields which sequences are in a batch, and the batch."""
        lengths = row_lengths(self.config, context)
        while order:
            longest = arrays[order[0]].size - 1
            length = next(length for length in lengths if length >= longest)
            rows = self.rows(length)
            members, order = order[:rows], order[rows:]
            batch = np.zeros((rows, length + 1), np.int32)
            for row, index in zip(batch, members, strict=False):
                row[: arrays[index].size] = arrays[index]
            yield members, batch

    def _run(self, batch: Int32[np.ndarray, "rows tokens"]) -> tuple[Array, Array]:
        """Returns nll and greedy of a batch, on their way."""
        with jax.set_mesh(self._mesh), jax.default_matmul_precision(self.precision):
            # One token more than the length, which may be split as well, later.
            rows = jax.sharding.NamedSharding(self._mesh, sharding.spec("batch", None))
            tokens = jax.make_array_from_callback(batch.shape, rows, lambda part: batch[part])
            return self._score(self._params, tokens)


def progress(label: str, tokens: int, file: TextIO | None = None) -> tqdm:
    """Returns a bar for people who watch a terminal; without a label there is none.

    Args:
      label: what is going on.
      tokens: what there is to do.
      file: where to draw; None: standard error.
    """
    how: dict[str, Any] = {"leave": False, "disable": None if label else True, "file": file}
    return tqdm(desc=label, total=tokens, unit=" tokens", unit_scale=True, **how)


def _one_ahead(
    batches: Iterable[tuple[list[int], Int32[np.ndarray, "rows tokens"]]],
    run: Callable[[Int32[np.ndarray, "rows tokens"]], tuple[Array, Array]],
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Yields members and results; a batch is fetched when the next is on its way."""
    waiting: tuple[list[int], tuple[Array, Array]] | None = None
    for members, batch in batches:
        started = members, run(batch)
        if waiting is not None:
            yield waiting[0], *jax.device_get(waiting[1])
        waiting = started
    if waiting is not None:
        yield waiting[0], *jax.device_get(waiting[1])


def score_tokens(
    config: ModelConfig, params: Mapping[str, Any], tokens: Int[Array, "rows tokens"]
) -> tuple[Float[Array, "rows targets"], Bool[Array, "rows targets"]]:
    """Returns nll and greediness of every token but the first of each row, to be jitted.

    The logits of at most `config.loss_positions` tokens are held at a time.

    Args:
      config: the model.
      params: its parameters.
      tokens: one document a row; padding may come after it.

    Returns:
      The negative log-likelihood of token i + 1 given tokens 0 ... i, nats, float32; and
      whether it is the likeliest.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    hidden: Any = Transformer(config).apply({"params": params}, inputs)
    table = output_embedding(params, config)
    rows, length = targets.shape
    size = min(length, max(1, config.loss_positions // rows))
    number = -(-length // size)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, number * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, number, size, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(rows, number * size)[:, :length]

    def chunk(part: tuple[Array, Array]) -> tuple[Array, Array]:
        scores = logits(part[0], table)
        hit = jnp.arange(config.vocab_size) == part[1][..., None]
        nll = jax.nn.logsumexp(scores, axis=-1) - jnp.where(hit, scores, 0).sum(axis=-1)
        return nll, jnp.argmax(scores, axis=-1) == part[1]

    nll, greedy = jax.lax.map(chunk, (cut(hidden), cut(targets)))
    return join(nll), join(greedy)
