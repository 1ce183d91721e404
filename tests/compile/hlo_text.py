"""Modules in the compiler's notation, small enough to count by hand."""

from pathlib import Path

_HERE = Path(__file__).parent

# Four devices hold a quarter each of three layers' weights [8, 64]. The loop slices one
# layer's, gathers it, multiplies, and keeps each layer's input.
TEXT = (_HERE / "step.hlo").read_text()

# As for TPU7x: a SparseCore gathers, adds and scatters for eight devices.
SPARSE_CORE = (_HERE / "sparse_core.hlo").read_text()

# The program of one of two slices of four devices. A gather overlaps with a fusion; a loop of
# three rounds sums over the slices and in its own slice, and the latter once more after it.
TWO_SLICES = (_HERE / "two_slices.hlo").read_text()
