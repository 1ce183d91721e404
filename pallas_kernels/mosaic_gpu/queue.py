"""Pieces of work for blocks that stay: one block an SM takes piece after piece.

So the warp that fetches is already at the next piece while the warpgroups that compute end
the one before, and what starts a block is paid for once. Pieces differ tenfold in length, as
heads do in span; a counter in global memory deals them out, to whoever is free, in the order of
`schedule.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.mosaic_gpu import memory

# SMs of an H100 or H200 SXM. On a smaller one some blocks start late and find nothing left.
_SMS = 132
_INTERPRETED = 2
# Pieces whose number is kept: the one in work, the next, and those that a warpgroup may not
# have read yet: it has read the one before the last whose own operand was replaced.
_SLOTS = 4


def blocks(pieces: int, interpret: bool) -> int:
    """Returns how many blocks to launch."""
    return min(pieces, _INTERPRETED if interpret else _SMS)


def scratch() -> dict[str, Any]:
    """Returns the types of the SMEM buffers and barriers that `Queue` takes."""
    return {
        "piece_smem": plgpu.SMEM((_SLOTS,), jnp.int32),
        "piece_full": plgpu.Barrier(num_barriers=_SLOTS),
    }


@dataclasses.dataclass(frozen=True)
class Queue:
    """The pieces of one launch, as seen by all warpgroups of a block.

    Attributes:
      pieces: how many there are.
      ref: the kernel's refs, with what `scratch` describes, and `numbers` of the pieces in order.
      block: index of this block; its grid has `blocks(pieces, interpret)`.
      interpret: whether this is interpret mode, which has no counter: pieces go round in turn.
    """

    pieces: int
    ref: dict[str, Any]
    block: Int[Array, ""]
    interpret: bool

    def each(self, fetches: bool, body: Callable[..., Any], carry: Any) -> tuple[Any, Any]:
        """Runs body(piece, n, carry) -> carry for each piece this block gets, n = 0, 1, ...

        Every warpgroup calls it, and gets the same pieces. Returns how many, and the carry.

        Args:
          fetches: whether this is the warpgroup that fetches. Its first warp must, for each
            piece, wait for the warpgroups that compute to give back something of the piece
            before.
          body: what to do.
          carry: for the first call: a tree of scalars.
        """
        if self.interpret:
            count = blocks(self.pieces, self.interpret)
            mine = lax.div(jnp.int32(self.pieces - 1 + count) - self.block, jnp.int32(count))
            return mine, lax.fori_loop(
                0, mine, lambda n, carry: body(self.block + n * count, n, carry), carry
            )
        words, full = self.ref["piece_smem"], self.ref["piece_full"]

        def slot(n):
            return lax.rem(n, jnp.int32(_SLOTS))

        def next_piece(n):
            if fetches:
                # Not before all copies for the piece before are under way: who takes early
                # holds a piece back that another block could begin.
                takers = blocks(self.pieces, self.interpret)
                memory.take_number(self.ref["numbers"], words, slot(n), takers)
                plgpu.barrier_arrive(full.at[slot(n)])
            plgpu.barrier_wait(full.at[slot(n)])
            return words[slot(n)]

        def step(state):
            piece, n, carry = state
            carry = body(piece, n, carry)
            return next_piece(n + 1), n + 1, carry

        first = jnp.int32(0)
        state = (next_piece(first), first, carry)
        return lax.while_loop(lambda state: state[0] < self.pieces, step, state)[1:]
