"""Pipelines of SMEM tiles between the warp that fetches them and the warpgroups that use them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu import memory
from pallas_kernels.mosaic_gpu.kernel_types import Carry, Index, Ref, Refs, Scalar, Scratch
from pallas_kernels.mosaic_gpu.plan import Plan

# Lower ones belong to the compiler: 0, and one more than its index for every warpgroup. A fourth
# one, which fetches, must therefore never wait for its own threads.
FIRST_NAMED_BARRIER = 4
_NAMED_BARRIERS = 16

# What a loop does at a step, see `steps`: of step, slots, wait and carry the next carry.
Step = Callable[[Scalar, tuple[Scalar, ...], Callable[[], None], Carry], Carry]


def tiled(shape: tuple[int, ...], dtype: DTypeLike) -> pl.MemoryRef:
    """Returns an SMEM type for 16-bit matrices that TMA and WGMMA both understand."""
    width = plgpu.find_swizzle(8 * jnp.dtype(dtype).itemsize * shape[-1])
    # JAX's types leave abstract what these classes inherit.
    tiling = plgpu.TilingTransform((8, width // jnp.dtype(dtype).itemsize))  # type: ignore[abstract]
    swizzle = plgpu.SwizzleTransform(width)  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def as_index(x: Index) -> Scalar:
    """Returns x as the int32 scalar that index arithmetic is done in."""
    return jnp.asarray(x, jnp.int32)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """One pipeline, as seen by all warps of a CTA.

    Tiles are numbered from 0 in the order they are fetched; tile n lies in slot
    (tiles_consumed + n) mod stages. Every warpgroup takes and releases every tile.

    Attributes:
      full: a barrier a slot, completed by the copies into it.
      empty: a barrier a slot, completed by the warpgroups; used in interpret mode.
      stages: number of slots.
      number: the first of as many named barriers, which do the same on a GPU at less cost.
      warpgroups: how many release each tile.
      plan: the call, and how it is done.
      tiles_consumed: tiles of earlier work tiles.
    """

    full: Ref
    empty: Ref
    stages: int
    number: int
    warpgroups: int
    plan: Plan
    tiles_consumed: Index = 0

    def after(self, tiles: Index) -> "Pipeline":
        """Returns the pipeline as a work tile sees it, before which `tiles` were fetched."""
        return dataclasses.replace(self, tiles_consumed=tiles)

    @property
    def interpret(self) -> bool:
        """Whether this is interpret mode."""
        return self.plan.interpret is not None

    @property
    def threads(self) -> int:
        """Threads that meet at an empty slot: all users, and those that fetch."""
        return 128 * self.warpgroups + (128 if self.plan.fetch_by_warpgroup else 32)

    def slot(self, tile: Index) -> Scalar:
        """Returns the slot of a tile."""
        if self.stages == 1:
            return jnp.int32(0)
        return lax.rem(as_index(self.tiles_consumed + tile), jnp.int32(self.stages))

    def open(self) -> None:
        """Declares all slots empty; every user calls it once."""
        if not self.interpret:
            for slot in range(self.stages):
                memory.named_barrier("arrive", self.number + slot, self.threads)

    def producer_acquire(self, tile: Index) -> Scalar:
        """Waits until the slot of a tile may be written; the fetching warp's part."""
        slot = self.slot(tile)
        if self.interpret:

            @pl.when(self.tiles_consumed + tile >= self.stages)
            def _() -> None:
                plgpu.barrier_wait(self.empty.at[slot])

        else:
            memory.named_barrier("sync", self.number + slot, self.threads)
        return slot

    def copy(self, slot: Scalar, source: Ref, target: Ref) -> None:
        """Copies from global memory into a slot of `target`; the fetching warp's part."""
        plgpu.copy_gmem_to_smem(source, target.at[slot], self.full.at[slot])

    def consumer_wait(self, tile: Index) -> Scalar:
        """Waits until a tile is there; returns its slot."""
        slot = self.slot(tile)
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def following(self, slot: Scalar) -> Scalar:
        """Returns the next tile's slot."""
        after = slot + 1
        return lax.select(after == self.stages, jnp.int32(0), after)

    def preceding(self, slot: Scalar) -> Scalar:
        """Returns the slot of the tile before."""
        return lax.select(slot == 0, jnp.int32(self.stages), slot) - 1

    def consumer_release(self, tile: Index, *, loading: bool = False) -> None:
        """Gives a tile's slot back, see `consumer_release_slot`."""
        self.consumer_release_slot(self.slot(tile), loading=loading)

    def consumer_release_slot(self, slot: Scalar, *, loading: bool = False) -> None:
        """Gives a slot back, once no product that reads it is in flight.

        Args:
          slot: which.
          loading: ordinary loads from it may be in flight: nothing has used yet what they
            give, and no later product was waited for. Threads arrive at a barrier without
            waiting for their loads, and the copy that writes there next is not ordered behind
            them but by a fence. Interpret mode always has one.
        """
        if self.interpret:
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.empty.at[slot])
        else:
            if loading:
                memory.finish_loads()
            memory.named_barrier("arrive", self.number + slot, self.threads)

    def close(self, tiles: Scalar) -> None:
        """Waits until all is released, of all work tiles; the fetching warp's part."""
        if self.interpret:
            # Every completion of a barrier must be waited for.
            for slot in range(self.stages):
                wait = functools.partial(plgpu.barrier_wait, self.empty.at[slot])
                pl.when(tiles > slot)(wait)


class Slots(NamedTuple):
    """How many slots a pipeline has, and how many copies fill one."""

    stages: int
    copies: int = 1


def barriers(name: str, slots: Slots, warpgroups: int) -> Scratch:
    """Returns the types of a pipeline's barriers; `warpgroups` release each tile."""
    full = plgpu.Barrier(num_barriers=slots.stages, num_arrivals=slots.copies)
    empty = plgpu.Barrier(num_barriers=slots.stages, num_arrivals=warpgroups)
    return {f"{name}_full": full, f"{name}_empty": empty}


def make(ref: Refs, slots: dict[str, Slots], warpgroups: int, plan: Plan) -> dict[str, Pipeline]:
    """Returns the pipelines of a CTA, given the slots of each."""
    made, number = {}, FIRST_NAMED_BARRIER
    for name, (stages, _) in slots.items():
        full, empty = ref[f"{name}_full"], ref[f"{name}_empty"]
        made[name] = Pipeline(full, empty, stages, number, warpgroups, plan)
        number += stages
    assert number <= _NAMED_BARRIERS, slots
    return made


def skip(start: Index, stop: Index, *numbered: tuple[Pipeline, Index]) -> None:
    """Takes and releases steps start, ..., stop-1 without a look at them.

    `numbered` are pipelines, and the number of the tile that each fetches for step 0. All
    pipelines' tiles of one step go together, as they are fetched: else one would wait for ever.
    """

    @pl.loop(0, lax.max(as_index(stop - start), jnp.int32(0)))
    def _(n):
        for pipe, zero in numbered:
            pipe.consumer_wait(zero + start + n)
            pipe.consumer_release(zero + start + n)


def steps(
    start: Index,
    stop: Index,
    ahead: bool,
    body: Step,
    carry: Carry,
    *numbered: tuple[Pipeline, Index],
    late: tuple[tuple[Pipeline, Index], ...] = (),
) -> Carry:
    """Runs steps start, ..., stop-1 over tiles of some pipelines.

    Args:
      start, stop: first step, and after the last one.
      ahead: wait for a step's tiles during the step before.
      body: called as body(n, slots, wait, carry) with the step, the slots of its tiles, and a
        function that it calls once while products are in flight, so that waiting takes no
        time of its own: that waits for the late tiles, and with `ahead` for the next step's
        others. Returns the next carry.
      carry: for the first step.
      *numbered: as `skip` wants them; the tiles are there when `body` is called.
      late: more of them, whose tiles are there after `wait`.
    """
    start = as_index(start)
    stop = lax.max(as_index(stop), start)
    all_pipes = [pipe for pipe, _ in numbered + late]

    def wait(slots, which):
        for pipe, slot in list(zip(all_pipes, slots, strict=True))[which]:
            plgpu.barrier_wait(pipe.full.at[slot])

    early_ones, late_ones = slice(len(numbered)), slice(len(numbered), None)
    first = tuple(pipe.slot(zero + start) for pipe, zero in numbered + late)
    if ahead:
        pl.when(start < stop)(lambda: wait(first, early_ones))

    def step(n, state):
        slots, carry = state
        following = tuple(pipe.following(x) for pipe, x in zip(all_pipes, slots, strict=True))

        def wait_within():
            wait(slots, late_ones)
            if ahead:
                pl.when(n + 1 < stop)(lambda: wait(following, early_ones))

        if not ahead:
            wait(slots, early_ones)
        return following, body(n, slots, wait_within, carry)

    return lax.fori_loop(start, stop, step, (first, carry))[1]


def fetching(plan: Plan) -> Callable[[Callable[[], None]], None]:
    """Returns a decorator that runs a function at once, in one warp of the warpgroup.

    In all of it where Pallas can't do that.
    """

    def run(body: Callable[[], None]) -> None:
        if plan.fetch_by_warpgroup:
            body()
        else:
            plgpu.warp_map(lambda warp: pl.when(warp == 0)(body))

    return run


def begin_with(acc: Ref, x: Float[Array, "64 64"], interpret: bool) -> Array | None:
    """Puts x where products will be added to it; returns what `finish` wants to know.

    Interpret mode can't do that, so there it is added at the end.
    """
    if interpret:
        return x
    acc[...] = x
    return None


def finish(acc: Ref, begun: Array | None, in_flight: int = 0) -> Float[Array, "64 64"]:
    """Returns an accumulator's value; `begun` is what `begin_with` returned.

    So many products issued later as `in_flight` says needn't be waited for.
    """
    x = plgpu.wgmma_accumulator_load(acc, wait_n=in_flight)
    return x if begun is None else x + begun


def multiply(acc: Ref, x: Float[Array, "64 64"], tile: Ref, spare: Ref | None = None) -> None:
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
