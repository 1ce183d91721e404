"""Documents to rows of one length: where each (input, target) pair goes.

A document of tokens [a, b] gives the pairs (bos, a), (a, b), (b, eos), so no target is
another document's token. Packing places runs of pairs, called pieces; a piece becomes a
segment of a row, and attention does not cross segments.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, Int32

FIELDS = ("inputs", "targets", "segment_ids", "positions")

Rows = dict[str, Int32[np.ndarray, "rows length"]]


@dataclasses.dataclass(frozen=True)
class Format:
    """How documents become rows.

    Attributes:
      length: pairs a row.
      packing, long_documents: as in `DataConfig`.
      bos_id, eos_id: put before and after each document.
      pad_id: `inputs` and `targets` of padding.
    """

    length: int
    packing: str
    long_documents: str
    bos_id: int
    eos_id: int
    pad_id: int

    def pairs(self, tokens: Int[np.ndarray, " documents"]) -> Int[np.ndarray, " documents"]:
        """Returns how many (input, target) pairs documents of given lengths give."""
        return np.minimum(tokens + 1, self.length if self.long_documents == "truncate" else 2**62)

    def join(
        self, documents: Sequence[Int[np.ndarray, " tokens"]]
    ) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " documents"]]:
        """Returns the targets of documents end to end, and where each begins."""
        sizes = self.pairs(np.asarray([ids.size for ids in documents]))
        parts = [part for ids in documents for part in self._targets(ids)]
        return np.concatenate(parts), np.cumsum(sizes) - sizes

    def empty(self, rows: int) -> Rows:
        """Returns rows of padding."""
        value = {"inputs": self.pad_id, "targets": self.pad_id}
        return {name: np.full((rows, self.length), value.get(name, 0), np.int32) for name in FIELDS}

    def _targets(self, ids: Int[np.ndarray, " tokens"]) -> list[Int[np.ndarray, " part"]]:
        """Returns the targets of a document in parts: its tokens and its end, or fewer."""
        if self.long_documents == "truncate" and ids.size >= self.length:
            return [ids[: self.length]]
        return [ids, np.asarray([self.eos_id], ids.dtype)]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Some rows: which pieces they hold.

    Attributes:
      targets: [pairs] of the documents, end to end. A pair's input is the target
        before it, or `bos` where a document starts.
      begin, sizes: of each piece in `targets`, in the order of rows and places.
      starts: whether it begins a document.
      bounds: [rows + 1], each row's first piece.
    """

    targets: Int[np.ndarray, " pairs"]
    begin: Int[np.ndarray, " pieces"]
    sizes: Int[np.ndarray, " pieces"]
    starts: Bool[np.ndarray, " pieces"]
    bounds: Int[np.ndarray, " bounds"]

    def __len__(self) -> int:
        """Returns how many rows there are."""
        return self.bounds.size - 1

    def fill(self, rows: Rows, row: int, number: int, format: Format) -> None:
        """Writes the row of a number into `rows[...][row]`.

        `segment_ids` count 1, 2, ... and are 0 for padding, which comes last;
        `positions` restart at 0 in each segment and are 0 in padding.
        """
        pieces = slice(self.bounds[number], self.bounds[number + 1])
        begin, sizes, starts = self.begin[pieces], self.sizes[pieces], self.starts[pieces]
        places = np.cumsum(sizes) - sizes
        used = int(places[-1] + sizes[-1])
        pair = np.repeat(begin - places, sizes) + np.arange(used)
        rows["targets"][row, :used] = self.targets[pair]
        rows["inputs"][row, :used] = self.targets[pair - 1]
        rows["inputs"][row, places[starts]] = format.bos_id
        rows["segment_ids"][row, :used] = np.repeat(np.arange(1, sizes.size + 1), sizes)
        rows["positions"][row, :used] = np.arange(used) - np.repeat(places, sizes)
        for name, padding in (
            ("targets", format.pad_id),
            ("inputs", format.pad_id),
            ("segment_ids", 0),
            ("positions", 0),
        ):
            rows[name][row, used:] = padding


def plan_all(documents: Sequence[Int[np.ndarray, " tokens"]], format: Format) -> Plan:
    """Returns the rows of some documents by themselves; the last may end in padding."""
    targets, starts = format.join(documents)
    if format.packing == "split":
        cuts = np.append(np.arange(0, targets.size, format.length), targets.size)
        return plan_split(targets, starts, cuts)
    return plan_first_fit(targets, starts, format.length)


def plan_split(
    targets: Int[np.ndarray, " pairs"],
    starts: Int[np.ndarray, " documents"],
    cuts: Int[np.ndarray, " bounds"],
) -> Plan:
    """Lays all pairs end to end and cuts them at row ends.

    What a cut leaves of a document starts the next row as a segment of its own.

    Args:
      targets, starts: as `Format.join` returns them.
      cuts: [rows + 1], where the rows begin in `targets`, and where the last one ends.
    """
    within = starts[(starts > cuts[0]) & (starts < cuts[-1])]
    begin = np.unique(np.concatenate([within, cuts]))
    return Plan(
        targets,
        begin[:-1],
        np.diff(begin),
        np.isin(begin[:-1], starts),
        np.searchsorted(begin[:-1], cuts),
    )


def plan_first_fit(
    targets: Int[np.ndarray, " pairs"], starts: Int[np.ndarray, " documents"], length: int
) -> Plan:
    """Puts each document into the first row with room for all of it.

    A document of more than `length` pairs is first cut into pieces of `length` and a
    rest. Rows may end in padding; a document that fits into a row is never cut.

    Args:
      targets, starts: as `Format.join` returns them.
      length: pairs a row.
    """
    lengths = np.diff(starts, append=targets.size)
    owner, cut = _cut_pieces(lengths, length)
    sizes = np.minimum(lengths[owner] - cut, length)
    places = _first_fit_places(sizes, length)
    order = np.argsort(places, kind="stable")
    row = places[order] // length
    bounds = np.searchsorted(row, np.arange(int(row[-1]) + 2))
    return Plan(targets, (starts[owner] + cut)[order], sizes[order], cut[order] == 0, bounds)


def _cut_pieces(
    pairs: Int[np.ndarray, " documents"], length: int
) -> tuple[Int[np.ndarray, " pieces"], Int[np.ndarray, " pieces"]]:
    """Cuts documents of more than `length` pairs into pieces of `length` and a rest.

    Returns:
      Each piece's document, and how many of its pairs come before the piece.
    """
    pieces = -(-pairs // length)  # a document
    document = np.repeat(np.arange(pairs.size), pieces)
    cut = (np.arange(document.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * length
    return document, cut


def _first_fit_places(sizes: Int[np.ndarray, " pieces"], length: int) -> Int[np.ndarray, " pieces"]:
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
