"""What one turn of a loop over tiles hands to the next: two sets of buffers in VMEM.

A turn works on the raw scores of one set and leaves its results beside them, while the
matrix units read the other set's results and fill it with the next tile's raw scores. So
matrix and vector units have work that does not wait for one another.

A tile is worked on in strips of keys. Left alone, the compiler begins all of them before
it ends any, for it takes first what most depends on, and spills what registers can't
hold. So strips are kept in order: their stores go to addresses that contain a number
which is always zero, but the compiler doesn't know that, and must take it that they
overwrite what later strips load. Strips take turns in the two halves of a set, which are
arrays of their own: the next strip may already be loaded, but not the one after it.
`tile.Bias.fence` then keeps the next one from going on.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Shaped

from pallas_kernels.tpu.config import LANES
from pallas_kernels.tpu.kernel_types import Index, Ref, Refs, Scalar, Scratch
from pallas_kernels.tpu.plan import SUBLANES, Plan

# Of every 128 keys, the first 64 are in the first half.
HALF = LANES // 2

_FLOAT32_BYTES = 4


def strips(plan: Plan, size: int) -> list[slice]:
    """Returns a tile's keys in parts of `size`, at most `HALF`, of both halves in turn."""
    return [
        slice(first + at, first + at + size)
        for block in range(0, plan.keys, LANES)
        for at in range(0, HALF, size)
        for first in (block, block + HALF)
    ]


def half_of(keys: slice) -> int:
    """Returns which half a strip is in."""
    return keys.start % LANES // HALF


class Sets(NamedTuple):
    """Which set each part of a turn uses.

    Attributes:
      pending: has the results that are still to be multiplied.
      scores: has the raw scores to work on.
      results: gets the results of that.
      ahead: gets the raw scores of the next turn.
    """

    pending: int
    scores: int
    results: int
    ahead: int

    @property
    def in_order(self) -> bool:
        """Returns whether strips are kept in order."""
        return self.results == self.scores


# Before and after any loop raw scores are in the first set, results in the second.
ALONE = Sets(pending=1, scores=0, results=1, ahead=0)
_FIRST = Sets(pending=1, scores=0, results=0, ahead=1)
_SECOND = Sets(pending=0, scores=1, results=1, ahead=0)


def over_pairs(
    count: Index, turn: Callable[[Index, Sets], None], *, alternate: bool = True
) -> None:
    """Runs turn(0, sets), ..., turn(count - 1, sets), two at a time: what fills and drains
    the matrix units at the ends is paid half as often. `alternate`: between the sets."""

    @pl.loop(0, count // 2)
    def _(pair):
        turn(2 * pair, _FIRST if alternate else ALONE)
        turn(2 * pair + 1, _SECOND if alternate else ALONE)

    pl.when(count % 2 == 1)(lambda: turn(count - 1, ALONE))


class Layout:
    """Where each field of a set lies, a number a key and query.

    A field of results has the inputs' dtype; it is held as float32 bits, since a half of a
    set must be one array.
    """

    def __init__(self, plan: Plan, scores: Sequence[str], results: Sequence[str]):
        """Takes the names of all fields."""
        self.plan, self._results = plan, frozenset(results)
        keys = plan.keys // 2
        sizes = dict.fromkeys(scores, keys)
        sizes |= dict.fromkeys(results, keys * plan.itemsize // _FLOAT32_BYTES)
        self._starts, self._rows = {}, 0
        for name, size in sizes.items():
            self._starts[name] = self._rows
            self._rows += size

    def packed(self, field: str) -> bool:
        """Returns whether two numbers share 32 bits."""
        return self.plan.half and field in self._results

    def rows(self, field: str, keys: slice) -> slice:
        """Returns the rows of some keys of one half."""
        block, key = divmod(keys.start, LANES)
        rows = block * HALF + key % HALF, keys.stop - keys.start
        first, count = (n // 2 for n in rows) if self.packed(field) else rows
        return slice(self._starts[field] + first, self._starts[field] + first + count)

    def scratch(self) -> Scratch:
        """Returns the memory that both sets need."""
        array = pltpu.VMEM((self._rows, self.plan.queries), jnp.float32)
        return {_name(of, half): array for of in range(2) for half in range(2)}


def _name(of: int, half: int) -> str:
    return f"set_{of}_{half}"


def unknown_zero(zero: Scalar | None) -> Index:
    """Returns a row that is 0, unknown to the compiler unless `zero` is None."""
    return 0 if zero is None else pl.multiple_of(zero * SUBLANES, SUBLANES)


class Buffers:
    """The two sets, in a kernel."""

    def __init__(self, plan: Plan, refs: Refs, layout: Layout, zero: Scalar | None = None):
        """`zero`: an int32 that is 0, and comes from memory; None: strips in any order."""
        self.plan, self.refs, self.layout = plan, refs, layout
        self.zero, self.dtype = zero, refs.query.dtype

    def put(self, into: int, field: str, x: Shaped[Array, "keys queries"], cut: slice) -> None:
        """Stores a whole tile, of the queries `cut`."""
        for keys in strips(self.plan, HALF):
            bits = self._bits(field, x[keys])
            self._half(into, keys)[self.layout.rows(field, keys), cut] = bits

    def whole(self, of: int, field: str, cut: slice) -> Shaped[Array, "keys queries"]:
        """Returns a whole tile, of the queries `cut`."""
        parts = []
        for keys in strips(self.plan, HALF):
            bits = self._half(of, keys)[self.layout.rows(field, keys), cut]
            packed = self.layout.packed(field)
            parts.append(pltpu.bitcast(bits, self.dtype) if packed else bits)
        return jnp.concatenate(parts, axis=0)

    def load(self, of: int, field: str, keys: slice, cut: slice) -> Float[Array, "strip queries"]:
        """Returns a strip of raw scores."""
        return self._half(of, keys)[self.layout.rows(field, keys), cut]

    def store(
        self, into: int, field: str, keys: slice, x: Shaped[Array, "strip queries"], cut: slice
    ) -> None:
        """Stores a strip of results, before the next one of its half if in order."""
        bits = self._bits(field, x)
        at = unknown_zero(self.zero) + self.layout.rows(field, keys).start
        self._half(into, keys)[pl.ds(at, bits.shape[0]), cut] = bits

    def _half(self, of: int, keys: slice) -> Ref:
        return getattr(self.refs, _name(of, half_of(keys)))

    def _bits(self, field: str, x: Array) -> Array:
        return pltpu.bitcast(x, jnp.float32) if self.layout.packed(field) else x
