"""Many short sequences: the sink metric, and a fixed token put at several places."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int32

from lazyattn.inspect.measure import padded
from lazyattn.inspect.statistics import layer_sums
from lazyattn.model.config import ModelConfig

LENGTH = 64
COUNT = 100
THRESHOLD = 0.3
PLACES = (0, 1, 2, 4, 8, 16, 32, 48)

_ByKey = Float[np.ndarray, "layers rows heads keys"]


@dataclasses.dataclass(frozen=True)
class SinkMetric:
    """How many heads have a sink at each position.

    Attributes:
      by_position: mean over sequences of the share of heads and layers whose mean weight
        on token k, over the queries from k on, exceeds `THRESHOLD`.
      first_weight: mean over sequences of that mean weight on the first token.
      sequences: how many there were.
    """

    by_position: Float[np.ndarray, " positions"]
    first_weight: Float[np.ndarray, "layers heads"]
    sequences: int


@dataclasses.dataclass(frozen=True)
class InsertedToken:
    """What a fixed token receives, and what the token before which it was put did.

    Attributes:
      places: positions k.
      weight: mean weight on it, over later queries and sequences.
      before: mean weight on the token that was at k, in the same sequences without it.
    """

    places: tuple[int, ...]
    weight: Float[np.ndarray, "places layers heads"]
    before: Float[np.ndarray, "places layers heads"]


def cut(
    documents: Sequence[Int32[np.ndarray, " tokens"]], count: int = COUNT
) -> list[Int32[np.ndarray, " length"]]:
    """Returns up to `count` sequences of `LENGTH` tokens, from the documents in turn."""
    found: list[Any] = []
    for document in documents:
        whole = len(document) // LENGTH
        found.extend(document[: whole * LENGTH].reshape(whole, LENGTH))
        if len(found) >= count:
            break
    return found[:count]


def sink_metric(
    params: Mapping[str, Any],
    config: ModelConfig,
    sequences: Sequence[Int32[np.ndarray, " length"]],
    *,
    length: int | None = None,
) -> SinkMetric:
    """Returns the sink metric.

    Args:
      params: the model's parameters.
      config: the model.
      sequences: token ids, all of one length.
      length: what rows are padded to; None: not at all.

    Source: Gu et al., arXiv 2410.10781, section 3.
    """
    received, _ = _received(params, config, sequences, length)
    size = received.shape[-1]
    mean = received / (size - np.arange(size))
    return SinkMetric(
        (mean > THRESHOLD).mean(axis=(0, 1, 2)), mean[..., 0].mean(axis=1), len(sequences)
    )


def inserted_token(
    params: Mapping[str, Any],
    config: ModelConfig,
    sequences: Sequence[Int32[np.ndarray, " length"]],
    token: int,
    *,
    length: int | None = None,
) -> InsertedToken:
    """Returns what a token receives that is put at each of `PLACES`.

    The rest of the sequence moves on by one place, and its last token is lost.

    Args:
      params, config, sequences, length: as in `sink_metric`.
      token: id of the token.
    """
    size = len(sequences[0])
    places = tuple(place for place in PLACES if place < size - 1)

    def later(rows: Sequence[np.ndarray]) -> Float[np.ndarray, "layers heads length"]:
        received, own = _received(params, config, rows, length)
        return (received - own).mean(axis=1) / np.maximum(size - 1 - np.arange(size), 1)

    plain = later(sequences)
    with_token = [
        later([np.insert(row, place, token)[:size].astype(np.int32) for row in sequences])
        for place in places
    ]
    return InsertedToken(
        places,
        np.stack([found[..., k] for k, found in zip(places, with_token, strict=True)]),
        np.stack([plain[..., k] for k in places]),
    )


def _received(
    params: Mapping[str, Any],
    config: ModelConfig,
    sequences: Sequence[Int32[np.ndarray, " length"]],
    length: int | None,
) -> tuple[_ByKey, _ByKey]:
    """Returns the sums of the weights on each token, and of its own query's on it."""
    inputs, segment_ids = padded(sequences, length)
    size = len(sequences[0])
    found = jax.device_get(layer_sums(params, inputs, segment_ids, config=config))
    received, own = (np.asarray(found[name], np.float64) for name in ("received", "own"))
    return received[..., :size], own[..., :size]
