"""Retrieval by distance: copying a passage, and repeating a pass key, from so far back.

Rows are made here and scored by whoever calls, so that one compiled forward program per
length serves copying, pass keys and loss by position alike. Row r of `length` predictions has
length + 1 tokens; `mask[r, i]` says whether the prediction of token i + 1 is scored.

A *distance* is the same in both: from a token that is to be repeated back to its first
occurrence, so that it is what attention has to reach across.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from lazyattn.errors import InputError, bad_value, require
from lazyattn.eval.estimates import Estimate, estimate

# What is measured where nobody asks for something else.
DISTANCES = (96, 512, 1024, 2048, 3800)
SPAN = 64
ROWS = 64
DIGITS = 5

# Negative log-likelihood in nats, and whether the token is the likeliest one, of every token
# but the first of each row.
Score = Callable[
    [Int32[np.ndarray, "rows tokens"]],
    tuple[Float[np.ndarray, "rows targets"], Bool[np.ndarray, "rows targets"]],
]
Stream = Int[np.ndarray, " tokens"]

_BEFORE = " The pass key is"
_AFTER = ". Remember it."
_QUESTION = " What is the pass key? The pass key is"
# Without a tokenizer: random tokens that a key comes after.
_MARKER = 4
# As many as an int64 holds.
_MOST_DIGITS = 18


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special tokens."""


class Rows(NamedTuple):
    """Rows to score.

    Attributes:
      tokens: int32, one more than there are predictions.
      mask: which predictions are scored.
    """

    tokens: Int32[np.ndarray, "rows tokens"]
    mask: Bool[np.ndarray, "rows targets"]


@dataclasses.dataclass(frozen=True)
class Copied(Estimate):
    """What a copied token costs, nats.

    Attributes:
      saved: how much less that is than in the same rows with nothing to copy from. Rows differ
        less in this than in what they cost, so that its standard error is the one to go by.
        None: not measured.
    """

    saved: Estimate | None = None


@dataclasses.dataclass(frozen=True)
class PassKeys:
    """How well pass keys are repeated.

    Attributes:
      right: share of rows all of whose key tokens are the likeliest, given the key tokens
        before: what greedy decoding gives.
      nats: negative log-likelihood of a key token, nats.
    """

    right: Estimate
    nats: Estimate


def check_stream(stream: Stream, length: int, span: int = SPAN) -> None:
    """Checks that a text is long enough for rows of it, and a passage of another place.

    Args:
      stream, length, span: as in `copy_rows`.

    Raises:
      InputError: if it isn't.
    """
    least = length + 1 + span
    if len(stream) < least:
        raise InputError(
            f"The text has {len(stream):,} tokens, but it must have at least {least:,} for rows of"
            f" {length:,}."
        )


def farthest_copy(length: int, span: int = SPAN, *, bos: int | None = None) -> int:
    """Returns the longest distance of `copy_rows`; below `span`: none fits.

    Args:
      length, span, bos: as there.
    """
    return length + 1 - (bos is not None) - span


def default_distances(length: int, span: int = SPAN, *, bos: int | None = None) -> tuple[int, ...]:
    """Returns those of `DISTANCES` that a row has room for, and the farthest that it has.

    The farthest is left out where it is hardly farther than the one before, by a tenth.

    Args:
      length, span, bos: as in `copy_rows`.

    Raises:
      InputError: where the row is too short for two spans.
    """
    farthest = farthest_copy(length, span, bos=bos)
    _check_span(span, length, bos)
    found = [distance for distance in DISTANCES if span <= distance <= farthest]
    if not found or farthest > 1.1 * found[-1]:
        found.append(farthest)
    return tuple(found)


def copy_rows(
    stream: Stream,
    length: int,
    distance: int | None,
    *,
    span: int = SPAN,
    rows: int,
    seed: int,
    bos: int | None = None,
) -> Rows:
    """Returns rows of text whose last `span` tokens repeat those `distance` tokens before them.

    The repeated tokens are text of another place in the stream, planted at both, so that
    neither can be guessed from what stands around it. All but the first of the repetition are
    scored: nothing says before it that something is about to be repeated. The same seed gives
    the same text and the same spans at every distance, so that distances can be compared.

    Args:
      stream: ids of a text, best without marks of documents. It is read as a circle.
      length: predictions of a row.
      distance: between the repeated tokens; None: they are planted at the end alone, which
        gives what they cost where there is nothing to copy from.
      span: tokens repeated, at least 2.
      rows: how many.
      seed: of the places drawn.
      bos: token that a row begins with; None: text from the first token on.

    Raises:
      InputError: for a span, distance or number of rows out of range, or too short a stream.
    """
    _check_span(span, length, bos)
    require(rows >= 1, "rows", rows, "at least 1")
    farthest = farthest_copy(length, span, bos=bos)
    require(
        distance is None or span <= distance <= farthest,
        "distance",
        distance,
        f"from {span}, the tokens repeated, to {farthest} in rows of {length}",
    )
    rng = np.random.default_rng([seed, 0])
    text, starts = _text(stream, length, rows, rng, bos, spare=span)
    # Anywhere but in the text of the row itself.
    away = rng.integers(0, len(stream) - (length + 1) - span + 1, size=rows)
    places = (starts + length + 1 + away)[:, None] + np.arange(span)
    passages = np.take(stream, places, mode="wrap").astype(np.int32)
    text[:, -span:] = passages
    if distance is not None:
        first = length + 1 - span - distance
        text[:, first : first + span] = passages
    mask = np.zeros((rows, length), bool)
    mask[:, length - span + 1 :] = True
    return Rows(text, mask)


def passkey_distances(
    stream: Stream,
    length: int,
    *,
    tokenizer: Encoder | None = None,
    digits: int = DIGITS,
    rows: int,
    seed: int,
    bos: int | None = None,
) -> tuple[int, int]:
    """Returns the shortest and the longest distance of `passkey_rows`, of the same arguments.

    No distance fits where the first is the greater.
    """
    return _limits(_sentences(stream, tokenizer, digits, rows, seed), length, bos)


def passkey_rows(
    stream: Stream,
    length: int,
    distance: int,
    *,
    tokenizer: Encoder | None = None,
    digits: int = DIGITS,
    rows: int,
    seed: int,
    bos: int | None = None,
) -> Rows:
    """Returns rows of text with a random key in it, and at the end a question and the key.

    The key's tokens in the answer, which are scored, stand `distance` tokens after those in the
    text. The same seed gives the same text and keys at every distance.

    Args:
      stream: as in `copy_rows`.
      length: predictions of a row.
      distance: from the key in the answer back to the key in the text.
      tokenizer: the text is "The pass key is 48213. Remember it." and the question "What is the
        pass key? The pass key is"; None: the key comes after a marker of four random ids in
        both places, and its tokens are drawn from the ids in the stream.
      digits: of a key, the first of them no 0; without a tokenizer, tokens of a key.
      rows, seed, bos: as in `copy_rows`.

    Raises:
      InputError: for a number out of range, or too short a stream.
    """
    require(rows >= 1, "rows", rows, "at least 1")
    require(1 <= digits <= _MOST_DIGITS, "digits", digits, f"from 1 to {_MOST_DIGITS}")
    sentences = _sentences(stream, tokenizer, digits, rows, seed)
    nearest, farthest = _limits(sentences, length, bos)
    if nearest > farthest:
        raise bad_value(
            "length", length, f"at least {length + nearest - farthest}, to have room for a pass key"
        )
    require(
        nearest <= distance <= farthest,
        "distance",
        distance,
        f"from {nearest} to {farthest} for pass keys in rows of {length}",
    )
    text, _ = _text(stream, length, rows, np.random.default_rng([seed, 1]), bos)
    mask = np.zeros((rows, length), bool)
    for row, scored, sentence in zip(text, mask, sentences, strict=True):
        key = len(sentence.key)
        answer = length + 1 - key
        told = [*sentence.before, *sentence.key, *sentence.after]
        first = answer - distance - len(sentence.before)
        row[first : first + len(told)] = told
        row[answer - len(sentence.question) :] = [*sentence.question, *sentence.key]
        scored[length - key :] = True
    return Rows(text, mask)


def measure_copy(
    score: Score,
    stream: Stream,
    length: int,
    distances: Sequence[int | None],
    *,
    span: int = SPAN,
    rows: int,
    seed: int,
    bos: int | None = None,
) -> dict[int | None, Copied]:
    """Returns what a repeated token costs at each distance, nats.

    Args:
      score: the model; rows have length + 1 tokens.
      distances: as `copy_rows` takes. With None among them, which is nothing to copy from,
        what the others save is measured too.
      stream, length, span, rows, seed, bos: as in `copy_rows`, which says what is raised.
    """
    nats: dict[int | None, np.ndarray] = {}
    for distance in distances:
        made = copy_rows(stream, length, distance, span=span, rows=rows, seed=seed, bos=bos)
        nll, _ = score(made.tokens)
        nats[distance] = np.asarray(nll)[made.mask].reshape(rows, span - 1)
    every = np.ones((rows, span - 1), bool)
    # The same seed has planted the same passages, so that rows can be compared.
    saved: dict[int | None, Estimate] = {
        distance: estimate(nats[None] - cost, every)
        for distance, cost in nats.items()
        if distance is not None and None in nats
    }
    return {
        distance: Copied(**vars(estimate(cost, every)), saved=saved.get(distance))
        for distance, cost in nats.items()
    }


def measure_passkey(
    score: Score,
    stream: Stream,
    length: int,
    distances: Sequence[int],
    *,
    tokenizer: Encoder | None = None,
    digits: int = DIGITS,
    rows: int,
    seed: int,
    bos: int | None = None,
) -> dict[int, PassKeys]:
    """Returns how well pass keys are repeated at each distance.

    Args:
      score: the model; rows have length + 1 tokens.
      distances: as `passkey_rows` takes.
      stream, length, tokenizer, digits, rows, seed, bos: as in `passkey_rows`, which says what
        is raised.
    """
    found: dict[int, PassKeys] = {}
    for distance in distances:
        made = passkey_rows(
            stream,
            length,
            distance,
            tokenizer=tokenizer,
            digits=digits,
            rows=rows,
            seed=seed,
            bos=bos,
        )
        nll, hit = score(made.tokens)
        right = (hit | ~made.mask).all(axis=1, keepdims=True)
        found[distance] = PassKeys(estimate(right, np.ones_like(right)), estimate(nll, made.mask))
    return found


def _check_span(span: int, length: int, bos: int | None) -> None:
    require(span >= 2, "span", span, "at least 2")
    if farthest_copy(length, span, bos=bos) < span:
        room = length + 1 - (bos is not None)
        raise bad_value(
            "span", span, f"at most {room // 2}, since rows of {length} must have room for two"
        )


def _text(
    stream: Stream,
    length: int,
    rows: int,
    rng: np.random.Generator,
    bos: int | None,
    spare: int = 0,
) -> tuple[Int32[np.ndarray, "rows tokens"], Int[np.ndarray, " rows"]]:
    """Returns rows of length + 1 tokens, and where in the stream they begin."""
    check_stream(stream, length, spare)
    starts = rng.integers(0, len(stream), size=rows)
    text = np.take(stream, starts[:, None] + np.arange(length + 1), mode="wrap").astype(np.int32)
    if bos is not None:
        text[:, 0] = bos
    return text, starts


class _Sentence(NamedTuple):
    before: list[int]
    key: list[int]
    after: list[int]
    question: list[int]


def _sentences(
    stream: Stream, tokenizer: Encoder | None, digits: int, rows: int, seed: int
) -> list[_Sentence]:
    rng = np.random.default_rng([seed, 2])
    if tokenizer is None:
        ids = np.unique(stream)
        drawn = rng.choice(ids, size=(rows, _MARKER + digits)).tolist()
        return [_Sentence(row[:_MARKER], row[_MARKER:], [], row[:_MARKER]) for row in drawn]
    keys = rng.integers(10 ** (digits - 1), 10**digits, size=rows)
    before, question = tokenizer.encode(_BEFORE), tokenizer.encode(_QUESTION)
    after = tokenizer.encode(_AFTER)
    return [
        _Sentence(before, _continued(tokenizer, before, _BEFORE, f" {key}"), after, question)
        for key in keys
    ]


def _continued(tokenizer: Encoder, ids: list[int], text: str, more: str) -> list[int]:
    """Returns the ids of `more` after `text`, whose ids are `ids`."""
    whole = tokenizer.encode(text + more)
    if len(whole) > len(ids) and whole[: len(ids)] == ids:
        return whole[len(ids) :]
    return tokenizer.encode(more)  # it merges with what comes before


def _limits(sentences: Sequence[_Sentence], length: int, bos: int | None) -> tuple[int, int]:
    nearest = max(len(s.key) + len(s.after) + len(s.question) for s in sentences)
    farthest = min(length + 1 - len(s.key) - len(s.before) - (bos is not None) for s in sentences)
    return nearest, farthest
