"""How evenly attention's work falls on devices, foretold from biases alone.

A head's work is the tiles it visits, and those follow from its bias: a steep one makes
far tiles negligible. `pallas_kernels/visit.py` decides that for every call from the real
queries and keys; here all of them are taken to have one length, so that it can be told
before there are any.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from pallas_kernels.visit import NEAR, RUN

# Score bounds above this make a tile visited in any case; guards exp against overflow.
_CERTAIN = 20.0


def visited_tiles(
    bias: Float[np.ndarray, "heads length"],
    all_visible: Bool[np.ndarray, " heads"],
    *,
    score_bound: float,
    skip_mass: float,
    tile: int,
    windows: Sequence[int | None] | None = None,
) -> Int[np.ndarray, "heads query_tiles"]:
    """Returns how many key tiles each query tile of a row of one document visits.

    Args:
      bias: b(x) of every distance 0 <= x < length.
      all_visible: heads that skip nothing (tau >= 0).
      score_bound: max |q| max |k| / sqrt(d), in nats, above a query's scores with its own and
        with near keys less the bias.
      skip_mass: as in `lazy_attention`.
      tile: queries, and keys, of a tile.
      windows: keys that each head sees at most, None where all; None: all heads see all.
    """
    heads, length = bias.shape
    tiles = -(-length // tile)
    padded = np.pad(
        bias.astype(np.float64),
        ((0, 0), (0, tiles * tile - length)),
        constant_values=-np.inf,
    )
    largest = padded.reshape(heads, tiles, tile).max(axis=-1)
    # A tile that lies d tiles off the diagonal has distances of cells d - 1 and d.
    largest[:, 1:] = np.maximum(largest[:, 1:], largest[:, :-1])
    mass = tile * np.exp(np.minimum(score_bound + largest - bias[:, :1], _CERTAIN))
    # sums[:, d]: mass of the tiles nearer than d. Query tile i has tiles 0 ... i.
    sums = np.concatenate([np.zeros((heads, 1)), np.cumsum(mass, axis=1)], axis=1)
    causal = np.broadcast_to(np.arange(1, tiles + 1), (heads, tiles))
    if windows is not None:
        most = [tiles if window is None else 1 + -(-(window - 1) // tile) for window in windows]
        causal = np.minimum(causal, np.asarray(most)[:, None])
    if skip_mass == 0:
        return causal.copy()
    # Masses are relative to a row's own score; near keys add to what they are a part of.
    least = skip_mass * np.exp(_near_sum(bias, windows, tile) - bias[:, :1])
    visited = np.stack(
        [
            # The nearest tiles after which no more than skip_mass is left.
            np.searchsorted(total, total[1:] - left * (1 + 1e-12))
            for total, left in zip(sums, least, strict=True)
        ]
    )
    visited = np.clip(visited, 1, causal)
    return np.where(all_visible[:, None], causal, visited)


def _near_sum(
    bias: Float[np.ndarray, "heads length"], windows: Sequence[int | None] | None, tile: int
) -> Float[np.ndarray, "heads query_tiles"]:
    """Returns what is known of a row's log-sum-exp where scores are 0: the least of each tile."""
    heads, length = bias.shape
    row = np.arange(length)
    found = np.repeat(bias[:, :1].astype(np.float64), length, axis=1)
    means = np.lib.stride_tricks.sliding_window_view(
        np.pad(bias, ((0, 0), (0, NEAR)), mode="edge"), NEAR, axis=1
    ).mean(axis=-1)
    most = np.array([length if one is None else one for one in windows or [None] * heads])
    for start in range(-RUN, RUN, NEAR):
        first = row // RUN * RUN + start
        nearest = row - first - (NEAR - 1)
        counts = (nearest > 0) & (first >= 0) & (nearest + NEAR <= most[:, None])
        score = means[:, np.clip(nearest, 0, length)] + np.log(NEAR)
        found = np.logaddexp(found, np.where(counts, score, -np.inf))
    padded = np.pad(found, ((0, 0), (0, -length % tile)), constant_values=np.inf)
    return padded.reshape(heads, -1, tile).min(axis=-1)


@dataclasses.dataclass(frozen=True)
class Imbalance:
    """Work of the most loaded device over the mean of all, less 1.

    Attributes:
      heads: among shares of the heads.
      sequence: among shares of the length, each an early and a late chunk.
      contiguous: what it would be with contiguous shares of the length.
    """

    heads: float
    sequence: float
    contiguous: float


def imbalance(
    visited: Int[np.ndarray, "heads query_tiles"], *, head_shards: int, sequence_shards: int
) -> Imbalance:
    """Returns how unevenly tiles fall on devices.

    Args:
      visited: of `visited_tiles`; heads in the order of the model, query tiles a
        multiple of twice `sequence_shards`.
      head_shards: contiguous shares of the heads.
      sequence_shards: shares of the length.
    """

    def excess(shares: np.ndarray) -> float:
        return float(shares.max() / shares.mean() - 1)

    by_head = visited.reshape(head_shards, -1).sum(axis=1)
    chunks = visited.sum(axis=0).reshape(2 * sequence_shards, -1).sum(axis=1)
    return Imbalance(
        heads=excess(by_head),
        sequence=excess(chunks[:sequence_shards] + chunks[sequence_shards:][::-1]),
        contiguous=excess(chunks.reshape(sequence_shards, 2).sum(axis=1)),
    )
