"""Streams: one endless stream of packed rows for each row of a batch.

Stream r of B takes places r, r + B, r + 2B, ... of the documents' endless order, packs
them by itself and fills row r of every batch. No stream knows of another, so whoever
reads it, and with whom, its rows are the same; and where it stands is two integers.
"""

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int

from lazyattn.data.mixture import DocumentOrder
from lazyattn.data.packing import Format, Plan, Rows, plan_first_fit, plan_split

# Rows planned at once. First-fit chooses among so many; which rows come out depends on
# it, so it belongs to the order that a seed stands for. For "split" it only sets how
# many documents are read at a time.
WINDOW = {"split": 32, "first_fit": 128}

_FIRST_READ = 16  # documents; from then on their mean length tells how many

Cursor = tuple[int, int]


class Documents(Protocol):
    """Tokenized documents that can be read in any order."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Sequence[Int[np.ndarray, " tokens"]]:
        """Returns documents without special tokens, in the order asked for."""


class Stream:
    """The rows of one stream, from where it stands on.

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
        stream: int,
        streams: int,
        cursor: Cursor = (0, 0),
    ):
        """Stands at a cursor; nothing is read yet."""
        self._format = format
        self._share = (stream + 1) / streams
        self._reader = _Reader(documents, order, format, stream, streams)
        self._window: _Window | None = None
        self._row = 0
        self.cursor = cursor

    def fill(self, rows: Rows, row: int) -> None:
        """Writes the next row into `rows[...][row]`, and moves on."""
        if self._window is None or self._row == len(self._window.plan):
            self._window = self._next_window()
            self._row = self.cursor[1] if self._format.packing == "first_fit" else 0
        self._window.plan.fill(rows, row, self._row, self._format)
        first, second = self._window.after[self._row].tolist()
        self.cursor = first, second
        self._row += 1

    def move_to(self, cursor: Cursor) -> None:
        """Makes the stream stand at what `cursor` was."""
        self._window = None
        self.cursor = cursor

    def _next_window(self) -> "_Window":
        rows = WINDOW[self._format.packing]
        # Lest all streams read at the same step, the first window is smaller by stream.
        if self.cursor[0] == 0 or (self._window is None and self._format.packing == "split"):
            rows = max(1, round(rows * self._share))
        return self._reader.window(self.cursor, rows)


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


def measure_packing(documents: Documents, order: DocumentOrder, format: Format) -> PackingReport:
    """Packs the first documents of an order and says how well that went."""
    reader = _Reader(documents, order, format, stream=0, streams=1)
    cursor, rows, filled = (0, 0), 0, 0
    for _ in range(2):  # enough to tell
        window = reader.window(cursor, WINDOW[format.packing])
        rows += len(window.plan)
        filled += int(window.plan.sizes.sum())
        first, second = window.after[-1].tolist()
        cursor = first, second
    read, kept, whole = reader.read_so_far.tolist()
    return PackingReport(read, rows, filled / (rows * format.length), 1 - kept / whole)


@dataclasses.dataclass(frozen=True)
class _Window:
    """Some rows of a stream, planned.

    Attributes:
      plan: the rows.
      after: [rows, 2], where the stream stands after each row.
    """

    plan: Plan
    after: Int[np.ndarray, "rows 2"]


class _Reader:
    """A stream's documents one after the other, read many at a time."""

    def __init__(
        self, documents: Documents, order: DocumentOrder, format: Format, stream: int, streams: int
    ):
        self._documents = documents
        self._order = order
        self._format = format
        self._stream = stream
        self._streams = streams
        self._next = 0  # the stream's number of the first document in `_ahead`
        self._ahead: deque[Int[np.ndarray, " tokens"]] = deque()
        self.read_so_far = np.zeros(3, np.int64)  # documents, their pairs, all if none were cut

    def window(self, cursor: Cursor, rows: int) -> _Window:
        """Returns about so many rows from a cursor on; for "first_fit" the cursor's window."""
        document, used = cursor
        self._go_to(document)
        pairs = rows * self._format.length
        if self._format.packing == "split":
            return self._split(document, used, pairs)
        return self._first_fit(document, pairs)

    def _split(self, document: int, offset: int, pairs: int) -> _Window:
        """Plans rows that are full, from a pair of a document on."""
        taken = self._take(offset + pairs)
        targets, starts = self._format.join(taken)
        length = self._format.length
        cuts = np.arange(offset, targets.size + 1, length)
        bounds = np.append(starts, targets.size)
        used = np.searchsorted(bounds, cuts[1:], side="right") - 1
        after = np.stack([document + used, cuts[1:] - bounds[used]], axis=1)
        if used[-1] < len(taken):
            self._put_back(taken[-1])
        return _Window(plan_split(targets, starts, cuts), after)

    def _first_fit(self, document: int, pairs: int) -> _Window:
        """Plans the window that begins with a document."""
        taken = self._take(pairs)
        plan = plan_first_fit(*self._format.join(taken), self._format.length)
        rows = len(plan)
        after = np.stack([np.full(rows, document), np.arange(1, rows + 1)], axis=1)
        after[-1] = document + len(taken), 0
        return _Window(plan, after)

    def _go_to(self, document: int) -> None:
        """Makes a document the next; costs nothing if it is, or is read already."""
        while self._ahead and self._next < document:
            self._ahead.popleft()
            self._next += 1
        if self._next != document:
            self._ahead.clear()
            self._next = document

    def _take(self, pairs: int) -> list[Int[np.ndarray, " tokens"]]:
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

    def _put_back(self, ids: Int[np.ndarray, " tokens"]) -> None:
        """Makes the document taken last the next again."""
        self._ahead.appendleft(ids)
        self._next -= 1

    def _read_ahead(self, pairs: int) -> None:
        read, kept, _ = self.read_so_far.tolist()
        number = 1 + pairs * read // kept if read else _FIRST_READ
        numbers = range(self._next, self._next + number)
        places = [self._stream + n * self._streams for n in numbers]
        found = self._documents.read([self._order[place] for place in places])
        self._ahead.extend(found)
        sizes = np.asarray([ids.size for ids in found])
        self.read_so_far += [number, self._format.pairs(sizes).sum(), (sizes + 1).sum()]
