"""Rings of SMEM tiles between the warp that fetches them and the warpgroups that use them."""

import dataclasses
import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.mosaic_gpu import lanes, memory
from pallas_kernels.mosaic_gpu.config import Block
from pallas_kernels.mosaic_gpu.plan import Plan

# Lower ones belong to the compiler: 0, and one more than its index for every warpgroup. A fourth
# one, which fetches, must therefore never wait for its own threads.
FIRST_NAMED_BARRIER = 4
_NAMED_BARRIERS = 16


def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns an SMEM type for 16-bit matrices that TMA and WGMMA both understand."""
    width = plgpu.find_swizzle(8 * jnp.dtype(dtype).itemsize * shape[-1])
    transforms: Any = plgpu  # The classes' stubs leave abstract what they inherit.
    tiling = transforms.TilingTransform((8, width // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, transforms.SwizzleTransform(width)))


def as_index(x: Any) -> Int[Array, ""]:
    """Returns x as the int32 scalar that index arithmetic is done in."""
    return jnp.asarray(x, jnp.int32)


@dataclasses.dataclass(frozen=True)
class Ring:
    """One ring, as seen by all warps of a block.

    Tiles are numbered from 0 in the order they are fetched; tile n lies in slot
    (done + n) mod stages. Every warpgroup takes and releases every tile.

    Attributes:
      full: a barrier a slot, completed by the copies into it.
      empty: a barrier a slot, completed by the warpgroups; used in interpret mode.
      stages: number of slots.
      number: the first of as many named barriers, which do the same on a GPU at less cost.
      warpgroups: how many release each tile.
      plan: of the call.
      done: tiles of earlier pieces of work.
    """

    full: Any
    empty: Any
    stages: int
    number: int
    warpgroups: int
    plan: Plan
    done: Any = 0

    def after(self, tiles: Any) -> "Ring":
        """Returns the ring as a piece of work sees it, before which `tiles` were fetched."""
        return dataclasses.replace(self, done=tiles)

    @property
    def interpret(self) -> bool:
        """Whether this is interpret mode."""
        return self.plan.interpret is not None

    @property
    def threads(self) -> int:
        """Threads that meet at an empty slot: all users, and those that fetch."""
        return 128 * self.warpgroups + (128 if self.plan.fetch_by_warpgroup else 32)

    def slot(self, tile: Int[Array, ""]) -> Int[Array, ""]:
        """Returns the slot of a tile."""
        if self.stages == 1:
            return jnp.int32(0)
        return lax.rem(as_index(self.done + tile), jnp.int32(self.stages))

    def open(self) -> None:
        """Declares all slots empty; every user calls it once."""
        if not self.interpret:
            for slot in range(self.stages):
                memory.named_barrier("arrive", self.number + slot, self.threads)

    def acquire(self, tile: Int[Array, ""]) -> Int[Array, ""]:
        """Waits until the slot of a tile may be written; the fetching warp's part."""
        slot = self.slot(tile)
        if self.interpret:

            @pl.when(self.done + tile >= self.stages)
            def _() -> None:
                plgpu.barrier_wait(self.empty.at[slot])

        else:
            memory.named_barrier("sync", self.number + slot, self.threads)
        return slot

    def wait(self, tile: Int[Array, ""]) -> Int[Array, ""]:
        """Waits until a tile is there; returns its slot."""
        slot = self.slot(tile)
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def release(self, tile: Int[Array, ""]) -> None:
        """Gives a tile's slot back, once nothing that reads it is in flight.

        On a GPU ordinary loads are done when the threads arrive, and the copy that writes
        there next needs no fence; the race detector of interpret mode wants one.
        """
        slot = self.slot(tile)
        if self.interpret:
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.empty.at[slot])
        else:
            memory.named_barrier("arrive", self.number + slot, self.threads)

    def release_before(self, tile: Int[Array, ""], first: Any) -> None:
        """Gives back the tile before this one, unless this is the first.

        What reads a tile last is left in flight while the next one's products begin; those who
        have waited for these need not wait for it again.
        """
        pl.when(tile > first)(lambda: self.release(tile - 1))

    def close(self, tiles: Int[Array, ""]) -> None:
        """Waits until all is released, of all pieces; the fetching warp's part."""
        if self.interpret:
            # Every completion of a barrier must be waited for.
            for slot in range(self.stages):
                wait = functools.partial(plgpu.barrier_wait, self.empty.at[slot])
                pl.when(tiles > slot)(wait)


def barriers(name: str, slots: int, warpgroups: int, copies: int = 1) -> dict[str, Any]:
    """Returns the types of a ring's barriers.

    Args:
      name: of the ring.
      slots: of the ring.
      warpgroups: how many release each tile.
      copies: how many copies fill a slot.
    """
    return {
        f"{name}_full": plgpu.Barrier(num_barriers=slots, num_arrivals=copies),
        f"{name}_empty": plgpu.Barrier(num_barriers=slots, num_arrivals=warpgroups),
    }


def make(
    ref: dict[str, Any], slots: dict[str, int], warpgroups: int, plan: Plan
) -> dict[str, Ring]:
    """Returns the rings of a block, given the slots of each."""
    made, number = {}, FIRST_NAMED_BARRIER
    for name, stages in slots.items():
        full, empty = (ref[f"{name}_{end}"] for end in ("full", "empty"))
        made[name] = Ring(full, empty, stages, number, warpgroups, plan)
        number += stages
    assert number <= _NAMED_BARRIERS, slots
    return made


def divide(warpgroup: Int[Array, ""], block: Block, fetch: Any, compute: Any) -> None:
    """Runs `fetch` in the last warpgroup of a block and `compute` in the others."""
    fetches = warpgroup == block.warpgroups

    @pl.when(fetches)
    def _():
        plgpu.set_max_registers(block.fetch_registers, action="decrease")
        fetch()

    @pl.when(jnp.logical_not(fetches))
    def _():
        plgpu.set_max_registers(block.registers, action="increase")
        compute()


def skip(start: Any, stop: Any, *numbered: tuple[Ring, Any]) -> None:
    """Takes and releases steps start, ..., stop-1 without a look at them.

    Args:
      start: first step.
      stop: after the last one.
      *numbered: rings, and the number of the tile that each fetches for step 0. All rings'
        tiles of one step go together, as they are fetched: else one would wait for ever.
    """

    @pl.loop(0, lax.max(as_index(stop - start), jnp.int32(0)))
    def _(n):
        for ring, zero in numbered:
            ring.wait(zero + start + n)
            ring.release(zero + start + n)


def fetching(plan: Plan) -> Any:
    """Returns a decorator that runs a function at once, in one warp of the warpgroup.

    In all of it where Pallas can't do that.
    """

    def run(body: Any) -> None:
        if plan.fetch_by_warpgroup:
            body()
        else:
            plgpu.warp_map(lambda warp: pl.when(warp == 0)(body))

    return run


def operand(tile: Any, in_registers: bool, interpret: bool) -> Any:
    """Returns a tile as the first operand of matrix products: in SMEM, or in registers."""
    if in_registers and not interpret:
        return plgpu.load(tile, layout=lanes.TILE, optimized=False)
    return tile


def begin_with(acc: Any, x: Any, interpret: bool) -> Any:
    """Puts x where products will be added to it; returns what `finish` wants to know.

    Interpret mode can't do that, so there it is added at the end.
    """
    if interpret:
        return x
    acc[...] = x
    return None


def finish(acc: Any, begun: Any, in_flight: int = 0) -> Any:
    """Returns an accumulator's value.

    Args:
      acc: the accumulator.
      begun: what `begin_with` returned.
      in_flight: how many products issued later needn't be waited for.
    """
    x = plgpu.wgmma_accumulator_load(acc, wait_n=in_flight)
    return x if begun is None else x + begun


def multiply(acc: Any, x: Any, tile: Any, spare: Any = None) -> None:
    """Issues acc += x @ tile, with x in registers; without waiting for it.

    Interpret mode takes no such x: there it goes by way of `spare` in SMEM.
    """
    if spare is None:
        plgpu.wgmma(acc, x, tile)
        return
    spare[...] = x
    plgpu.commit_smem()
    plgpu.wgmma(acc, spare, tile)
    plgpu.wgmma_wait(0)
