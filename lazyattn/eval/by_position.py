"""Loss by position in the row: what more context is worth to a model."""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from lazyattn.errors import require
from lazyattn.eval.estimates import Estimate, estimate


def position_edges(length: int, first: int = 16) -> tuple[int, ...]:
    """Returns 0, then powers of two times `first` below `length`, then `length`.

    Args:
      length: predictions of a row.
      first: end of the first bucket.

    Raises:
      InputError: for a length or first edge below 1.
    """
    require(length >= 1, "length", length, "at least 1")
    require(first >= 1, "first", first, "at least 1")
    edges = [0]
    edge = first
    while edge < length:
        edges.append(edge)
        edge *= 2
    return (*edges, length)


def by_position(
    nll: Float[np.ndarray, "rows length"],
    edges: Sequence[int],
    mask: Bool[np.ndarray, "rows length"] | None = None,
) -> dict[tuple[int, int], Estimate]:
    """Returns the mean negative log-likelihood by buckets of position, nats a token.

    Position p of a row is the prediction of its token p + 1 from tokens 0 ... p.

    Args:
      nll: of each prediction, nats.
      edges: where buckets begin, rising, and where the last one ends, as of `position_edges`.
      mask: which predictions count; None: all.

    Returns:
      (first position, position after the last) -> mean and standard error over rows; a bucket
      without any prediction that counts has a mean of NaN.

    Raises:
      InputError: for edges that don't rise from 0 or more to at most the length.
    """
    length = nll.shape[1]
    pairs = list(itertools.pairwise(edges))
    require(
        bool(pairs)
        and edges[0] >= 0
        and edges[-1] <= length
        and all(start < stop for start, stop in pairs),
        "edges",
        tuple(edges),
        f"two or more rising numbers from 0 to at most {length}",
    )
    mask = np.ones(nll.shape, bool) if mask is None else mask
    return {
        (start, stop): estimate(nll[:, start:stop], mask[:, start:stop]) for start, stop in pairs
    }


def document_rows(
    documents: Sequence[Int[np.ndarray, " tokens"]], length: int, rows: int
) -> tuple[Int32[np.ndarray, "rows tokens"], Bool[np.ndarray, "rows targets"]]:
    """Returns rows of one document each, so that a position says how much text comes before.

    A document longer than a row is cut into several, each of which begins with the document's
    first token, the beginning-of-document token. The rows with the most tokens are taken; of
    those that are full, if there are more than `rows`, some at equal steps.

    Args:
      documents: token ids, each with the beginning-of-document token first.
      length: predictions of a row.
      rows: how many at most.

    Returns:
      Tokens, length + 1 a row, zeros where a document ends before; and which predictions are
      of a document's tokens.

    Raises:
      InputError: for a document without a token after its first, or no document.
    """
    require(bool(documents), "the number of documents", 0, "at least 1")
    pieces = []
    for document in documents:
        require(len(document) >= 2, "the tokens of a document", len(document), "at least 2")
        for start in range(1, len(document), length):
            pieces.append(np.concatenate([document[:1], document[start : start + length]]))
    full = [piece for piece in pieces if len(piece) == length + 1]
    if len(full) > rows:
        taken = [full[place * len(full) // rows] for place in range(rows)]
    else:
        taken = sorted(pieces, key=len, reverse=True)[:rows]
    tokens = np.zeros((len(taken), length + 1), np.int32)
    mask = np.zeros((len(taken), length), bool)
    for row, scored, piece in zip(tokens, mask, taken, strict=True):
        row[: len(piece)] = piece
        scored[: len(piece) - 1] = True
    return tokens, mask
