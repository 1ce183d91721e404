"""Loss by position in the row: what more context is worth to a model."""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from lazyattn.errors import require
from lazyattn.evaluation.estimates import Estimate, estimate


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
