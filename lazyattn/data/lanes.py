"""Lanes: one endless stream of packed rows for each row of a batch.

Lane r of B takes places r, r + B, r + 2B, ... of the documents' endless order, packs
them by itself and fills row r of every batch. No lane knows of another, so whoever
reads it, and with whom, its rows are the same; and where it stands is two integers.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Int

from lazyattn.data.mixture import DocumentOrder
from lazyattn.data.packing import Rows, cut_pieces, first_fit_places

# Rows planned at once. First-fit chooses among so many; which rows come out depends on
# it, so it belongs to the order that a seed stands for. For "split" it only sets how
# many documents are read at a time.
WINDOW = {"split": 32, "first_fit": 128}

_FIRST_READ = 16  # documents; from then on their mean length tells how many


class Documents(Protocol):
    """Tokenised documents that can be read in any order."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Sequence[Int[np.ndarray, " tokens"]]:
        """Returns documents without special tokens, in the order asked for."""


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

    def target_tokens(self, ids: Int[np.ndarray, " tokens"]) -> list[Int[np.ndarray, " part"]]:
        """Returns the targets of a document in parts: its tokens and its end, or fewer."""
        if self.long_documents == "truncate" and ids.size >= self.length:
            return [ids[: self.length]]
        return [ids, np.asarray([self.eos_id], ids.dtype)]

    def pairs(self, tokens: Int[np.ndarray, " documents"]) -> Int[np.ndarray, " documents"]:
        """Returns how many (input, target) pairs documents of given lengths give."""
        return np.minimum(tokens + 1, self.length if self.long_documents == "truncate" else 2**62)


@dataclasses.dataclass(frozen=True)
class _Block:
    """Some rows of a lane, planned.

    Attributes:
      targets: [pairs] of the block's documents, end to end. A pair's input is the
        target before it, or `bos` where a document starts.
      begin, sizes: of each piece in `targets`, in the order of rows and places.
      starts: whether it begins a document.
      rows: [rows + 1], each row's first piece.
      after: [rows, 2], where the lane stands after each row.
    """

    targets: Int[np.ndarray, " pairs"]
    begin: Int[np.ndarray, " pieces"]
    sizes: Int[np.ndarray, " pieces"]
    starts: Bool[np.ndarray, " pieces"]
    rows: Int[np.ndarray, " bounds"]
    after: Int[np.ndarray, "rows 2"]


class Lane:
    """The rows of one lane, from where it stands on.

    It stands at two integers, `cursor`. For "split": how many of its documents are
    used up, and how many pairs of the next. For "first_fit": how many documents came
    before the window it is in, and how many rows of that window are used up.
    """

    def __init__(
        self,
        documents: Documents,
        order: DocumentOrder,
        format: Format,
        *,
        lane: int,
        lanes: int,
        cursor: tuple[int, int] = (0, 0),
    ):
        """Stands at a cursor; nothing is read yet.

        Args:
          documents: where to read.
          order: their order.
          format: how they become rows.
          lane: this lane.
          lanes: how many there are.
          cursor: what `cursor` was.
        """
        self._format = format
        self._plan = _PLANS[format.packing]
        self._share = (lane + 1) / lanes
        self._reader = _Reader(documents, order, format, lane, lanes)
        self._block: _Block | None = None
        self._row = 0
        self.cursor = cursor

    def fill(self, rows: Rows, row: int) -> None:
        """Writes the next row into `rows[...][row]`, and moves on."""
        if self._block is None or self._row == self._block.after.shape[0]:
            self._block, self._row = self._next_block()
        _fill(rows, row, self._block, self._row, self._format)
        self.cursor = tuple(self._block.after[self._row].tolist())
        self._row += 1

    def move_to(self, cursor: tuple[int, int]) -> None:
        """Makes the lane stand at what `cursor` was."""
        self._block = None
        self.cursor = cursor

    def _next_block(self) -> tuple[_Block, int]:
        document, offset = self.cursor
        rows = WINDOW[self._format.packing]
        # Lest all lanes read at the same step, the first window is smaller by lane.
        if document == 0 or (self._block is None and self._format.packing == "split"):
            rows = max(1, round(rows * self._share))
        self._reader.go_to(document)
        return self._plan(self._reader, document, offset, rows * self._format.length, self._format)


@dataclasses.dataclass(frozen=True)
class PackingReport:
    """How well some documents of a source pack.

    Attributes:
      documents: documents looked at.
      rows: rows they fill.
      efficiency: share of the rows' places that hold a pair, up to 1.
      cut_off: share of the documents' pairs that `long_documents` drops.
    """

    documents: int
    rows: int
    efficiency: float
    cut_off: float


def measure_packing(
    documents: Documents, order: DocumentOrder, format: Format, windows: int = 2
) -> PackingReport:
    """Packs the first documents of an order and says how well that went.

    Args:
      documents: where to read.
      order: their order.
      format: how they become rows.
      windows: how many times `WINDOW` rows to pack.
    """
    reader = _Reader(documents, order, format, lane=0, lanes=1)
    cursor, rows, filled = (0, 0), 0, 0
    for _ in range(windows):
        reader.go_to(cursor[0])
        pairs = WINDOW[format.packing] * format.length
        block, _ = _PLANS[format.packing](reader, *cursor, pairs, format)
        rows += block.after.shape[0]
        filled += int(block.sizes.sum())
        cursor = tuple(block.after[-1].tolist())
    read, kept, whole = reader.read_so_far.tolist()
    return PackingReport(read, rows, filled / (rows * format.length), 1 - kept / whole)


class _Reader:
    """A lane's documents one after the other, read many at a time."""

    def __init__(
        self, documents: Documents, order: DocumentOrder, format: Format, lane: int, lanes: int
    ):
        self._documents = documents
        self._order = order
        self._format = format
        self._lane = lane
        self._lanes = lanes
        self._next = 0  # the lane's number of the first document in `_ahead`
        self._ahead: deque[Int[np.ndarray, " tokens"]] = deque()
        self.read_so_far = np.zeros(3, np.int64)  # documents, their pairs, all if none were cut

    def go_to(self, document: int) -> None:
        """Makes a document the next; costs nothing if it is, or is read already."""
        while self._ahead and self._next < document:
            self._ahead.popleft()
            self._next += 1
        if self._next != document:
            self._ahead.clear()
            self._next = document

    def take(self, pairs: int) -> list[Int[np.ndarray, " tokens"]]:
        """Returns the next documents, as many as it takes to have so many pairs."""
        taken = []
        while pairs > 0:
            if not self._ahead:
                self._read_ahead(pairs)
            ids = self._ahead.popleft()
            self._next += 1
            taken.append(ids)
            pairs -= int(self._format.pairs(np.asarray(ids.size)))
        return taken

    def put_back(self, ids: Int[np.ndarray, " tokens"]) -> None:
        """Makes the document taken last the next again."""
        self._ahead.appendleft(ids)
        self._next -= 1

    def _read_ahead(self, pairs: int) -> None:
        read, kept, _ = self.read_so_far.tolist()
        number = 1 + pairs * read // kept if read else _FIRST_READ
        numbers = range(self._next, self._next + number)
        found = self._documents.read([self._order[self._lane + n * self._lanes] for n in numbers])
        self._ahead.extend(found)
        sizes = np.asarray([ids.size for ids in found])
        self.read_so_far += [number, self._format.pairs(sizes).sum(), (sizes + 1).sum()]


def _plan_split(
    reader: _Reader, document: int, offset: int, pairs: int, format: Format
) -> tuple[_Block, int]:
    """Plans rows that are full, from a pair of a document on."""
    taken = reader.take(offset + pairs)
    targets, starts = _join(taken, format)
    length = format.length
    rows = (targets.size - offset) // length
    ends = offset + length * np.arange(rows + 1)
    begin = np.unique(np.concatenate([starts[(starts > offset) & (starts < ends[-1])], ends]))
    sizes = np.diff(begin)
    begin = begin[:-1]
    bounds = np.append(starts, targets.size)
    used = np.searchsorted(bounds, ends[1:], side="right") - 1
    after = np.stack([document + used, ends[1:] - bounds[used]], axis=1)
    if used[-1] < len(taken):
        reader.put_back(taken[-1])
    return _Block(
        targets, begin, sizes, np.isin(begin, starts), np.searchsorted(begin, ends), after
    ), 0


def _plan_first_fit(
    reader: _Reader, document: int, used: int, pairs: int, format: Format
) -> tuple[_Block, int]:
    """Plans the window that begins with a document, of which some rows are used up."""
    taken = reader.take(pairs)
    targets, starts = _join(taken, format)
    length = format.length
    lengths = np.diff(starts, append=targets.size)
    owner, cut = cut_pieces(lengths, length)
    begin = starts[owner] + cut
    sizes = np.minimum(lengths[owner] - cut, length)
    places = first_fit_places(sizes, length)
    order = np.argsort(places, kind="stable")
    row = places[order] // length
    rows = int(row[-1]) + 1
    after = np.stack([np.full(rows, document), np.arange(1, rows + 1)], axis=1)
    after[-1] = document + len(taken), 0
    bounds = np.searchsorted(row, np.arange(rows + 1))
    return _Block(targets, begin[order], sizes[order], cut[order] == 0, bounds, after), used


_PLANS: dict[str, Callable[[_Reader, int, int, int, Format], tuple[_Block, int]]] = {
    "split": _plan_split,
    "first_fit": _plan_first_fit,
}


def _join(
    documents: Sequence[Int[np.ndarray, " tokens"]], format: Format
) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " documents"]]:
    """Returns the targets of documents end to end, and where each begins."""
    sizes = format.pairs(np.asarray([ids.size for ids in documents]))
    parts = [part for ids in documents for part in format.target_tokens(ids)]
    return np.concatenate(parts), np.cumsum(sizes) - sizes


def _fill(rows: Rows, row: int, block: _Block, number: int, format: Format) -> None:
    """Writes a block's row into `rows[...][row]`."""
    pieces = slice(block.rows[number], block.rows[number + 1])
    begin, sizes, starts = block.begin[pieces], block.sizes[pieces], block.starts[pieces]
    places = np.cumsum(sizes) - sizes
    used = int(places[-1] + sizes[-1])
    pair = np.repeat(begin - places, sizes) + np.arange(used)
    rows["targets"][row, :used] = block.targets[pair]
    rows["inputs"][row, :used] = block.targets[pair - 1]
    rows["inputs"][row, places[starts]] = format.bos_id
    rows["segment_ids"][row, :used] = np.repeat(np.arange(1, sizes.size + 1), sizes)
    rows["positions"][row, :used] = np.arange(used) - np.repeat(places, sizes)
    for name, value in (
        ("targets", format.pad_id),
        ("inputs", format.pad_id),
        ("segment_ids", 0),
        ("positions", 0),
    ):
        rows[name][row, used:] = value
