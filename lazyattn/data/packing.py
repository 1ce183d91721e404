"""Documents to rows of one length: where each (input, target) pair goes.

A document of tokens [bos, a, b, eos] gives the pairs (bos, a), (a, b), (b, eos), so
no target is another document's token. Packing places runs of pairs, called pieces;
a piece becomes a segment of a row, and attention does not cross segments.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Int, Int32

from lazyattn.errors import require

FIELDS = ("inputs", "targets", "segment_ids", "positions")

Rows = dict[str, Int32[np.ndarray, "rows length"]]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Documents laid end to end.

    Attributes:
      ids: [tokens], every document as `[bos] + ids + [eos]`.
      lengths: [documents], tokens of each, its two special tokens included.
    """

    ids: Int32[np.ndarray, " tokens"]
    lengths: Int[np.ndarray, " documents"]

    def __post_init__(self):
        require(
            int(self.lengths.sum()) == self.ids.size and bool((self.lengths >= 2).all()),
            "Tokens.lengths",
            self.lengths,
            f"2 or more for every document and {self.ids.size} in all",
        )


def join(documents: Iterable[Sequence[int]], bos_id: int, eos_id: int) -> Tokens:
    """Returns documents, each a list of ids without special tokens, end to end."""
    parts = [np.asarray([bos_id, *ids, eos_id], np.int32) for ids in documents]
    lengths = np.asarray([part.size for part in parts], np.int64)
    return Tokens(np.concatenate([np.zeros(0, np.int32), *parts]), lengths)


def pack_split(tokens: Tokens, length: int, pad_id: int = 0) -> Rows:
    """Packs by laying all pairs end to end and cutting at row ends.

    Only the last row has padding. What a cut leaves of a document starts the next
    row as a segment of its own, with positions from 0.

    Args:
      tokens: the documents.
      length: pairs a row.
      pad_id: the id in `inputs` and `targets` where `segment_ids` is 0.

    Returns:
      `FIELDS`, each int32 [rows, length]. `segment_ids` counts 1, 2, ... within a
      row and is 0 for padding, which comes last; `positions` restart at 0 in each
      segment and are 0 in padding.
    """
    pairs = tokens.lengths - 1
    starts = _starts(pairs)
    total = int(pairs.sum())
    cuts = np.arange(0, total, length)
    begin = np.unique(np.concatenate([starts, cuts]))
    sizes = np.diff(begin, append=total)
    return _place(tokens, begin, sizes, begin, length, pad_id)


def pack_first_fit(tokens: Tokens, length: int, pad_id: int = 0) -> Rows:
    """Packs by putting each document into the first row with room for all of it.

    A document of more than `length` pairs is first cut into pieces of `length` and a
    rest. Rows may end in padding; a document that fits into a row is never cut.

    Args, Returns: as `pack_split`.
    """
    pairs = tokens.lengths - 1
    document, cut = cut_pieces(pairs, length)
    begin = _starts(pairs)[document] + cut
    sizes = np.minimum(pairs[document] - cut, length)
    return _place(tokens, begin, sizes, first_fit_places(sizes, length), length, pad_id)


PACKERS: dict[str, Callable[[Tokens, int, int], Rows]] = {
    "split": pack_split,
    "first_fit": pack_first_fit,
}


def cut_pieces(
    pairs: Int[np.ndarray, " documents"], length: int
) -> tuple[Int[np.ndarray, " pieces"], Int[np.ndarray, " pieces"]]:
    """Cuts documents of more than `length` pairs into pieces of `length` and a rest.

    Returns:
      Each piece's document, and how many of its pairs come before the piece.
    """
    pieces = -(-pairs // length)  # a document
    document = np.repeat(np.arange(pairs.size), pieces)
    cut = (np.arange(document.size) - np.repeat(_starts(pieces), pieces)) * length
    return document, cut


def _starts(sizes: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    return np.cumsum(sizes) - sizes


def first_fit_places(sizes: Int[np.ndarray, " pieces"], length: int) -> Int[np.ndarray, " pieces"]:
    """Returns where in the rows laid end to end each piece goes by first fit.

    A binary tree over the rows holds the most room below each node, so that the
    first row with enough is found in log2(rows) steps, and n pieces take n log n.
    """
    leaves = 1 << max(int(sizes.size) - 1, 0).bit_length()  # as many rows as pieces at most
    room = [length] * (2 * leaves)
    places = np.empty(sizes.size, np.int64)
    for piece, size in enumerate(sizes.tolist()):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < size:
                node += 1
        places[piece] = (node - leaves) * length + length - room[node]
        room[node] -= size
        while node > 1:
            node //= 2
            most = max(room[2 * node], room[2 * node + 1])
            if room[node] == most:
                break
            room[node] = most
    return places


def _place(
    tokens: Tokens,
    begin: Int[np.ndarray, " pieces"],
    sizes: Int[np.ndarray, " pieces"],
    places: Int[np.ndarray, " pieces"],
    length: int,
    pad_id: int,
) -> Rows:
    """Returns the rows that hold pieces at given places.

    Args:
      tokens: the documents.
      begin: each piece's first pair, counted over the pairs of all documents.
      sizes: its number of pairs.
      places: where its first pair goes in the rows laid end to end. No piece may
        cross a row's end.
      length: pairs a row.
      pad_id: the id of padding.
    """
    rows = int((places + sizes).max(initial=0) + length - 1) // length
    # Pair k of document d has its input at token k + d, its target one further.
    documents = np.repeat(np.arange(tokens.lengths.size), tokens.lengths - 1)
    positions = np.arange(documents.size) - np.repeat(_starts(sizes), sizes)
    pair = np.repeat(begin, sizes) + positions
    token = pair + documents[pair]
    target_place = np.repeat(places, sizes) + positions

    # Pieces of a row in order of place: 1, 2, ...
    order = np.argsort(places, kind="stable")
    row = places[order] // length
    first = np.searchsorted(row, row, side="left")
    segments = np.empty(places.size, np.int32)
    segments[order] = np.arange(places.size) - first + 1

    packed = {name: np.zeros(rows * length, np.int32) for name in FIELDS}
    packed["inputs"][:] = packed["targets"][:] = pad_id
    packed["inputs"][target_place] = tokens.ids[token]
    packed["targets"][target_place] = tokens.ids[token + 1]
    packed["segment_ids"][target_place] = np.repeat(segments, sizes)
    packed["positions"][target_place] = positions
    return {name: array.reshape(rows, length) for name, array in packed.items()}
