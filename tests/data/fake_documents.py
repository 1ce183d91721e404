"""Documents in memory, in which every token tells which document it is of, and where."""

import numpy as np

from lazyattn.data.packing import plan_all

BOS, EOS, PAD = 1, 2, 0
_LONGEST = 1000


class FakeDocuments:
    """Documents of given lengths; token k of document d is `(d + 1) * 1000 + k`."""

    def __init__(self, lengths):
        self.lengths = list(lengths)

    def __len__(self):
        return len(self.lengths)

    def read(self, indices):
        return [np.arange(self.lengths[d], dtype=np.uint32) + (d + 1) * _LONGEST for d in indices]


def made_up(documents, seed=0, longest=60):
    """Returns documents of lengths from 0 to `longest`."""
    return FakeDocuments(np.random.default_rng(seed).integers(0, longest + 1, documents).tolist())


def packed(documents, format):
    """Returns the rows of some documents, planned at once."""
    plan = plan_all(documents, format)
    rows = format.empty(len(plan))
    for number in range(len(plan)):
        plan.fill(rows, number, number, format)
    return rows


def segments(rows):
    """Returns [(inputs, targets, positions)] of each segment of rows, in order."""
    found = []
    for row in range(rows["inputs"].shape[0]):
        ids = rows["segment_ids"][row]
        for segment in range(1, ids.max() + 1):
            at = ids == segment
            found.append(tuple(rows[name][row][at] for name in ("inputs", "targets", "positions")))
    return found
