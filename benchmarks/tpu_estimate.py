"""Bundles of whole calls, from the schedules that the TPU compiler writes.

Every part's bundles are taken times how often inputs run it: for our kernels, and for
jax's splash attention at the block sizes, of those tried, at which that is least.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from benchmarks import cases
from benchmarks.tpu_compiler import Compiler, Part, Schedule
from pallas_kernels.visit import TileSizes

_TILE = 128

# Bytes that one core's memory moves in a bundle's time, from the chip's bandwidth and the
# clock at which its matrix units reach their peak (jax's own table has both).
BYTES_A_BUNDLE = {"v4": 585, "v5e": 547, "v5p": 703, "v6e": 937, "7x": 1500}

# Blocks of splash attention: queries, keys in memory, keys computed at once.
SPLASH_BLOCKS = ((512, 512, 512), (512, 1024, 512), (1024, 1024, 512), (1024, 1024, 1024))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One of our kernels, taken apart.

    Attributes:
      loops: over pairs of tiles: both sweeps, or live and dead tiles.
      single: what runs instead for the last of an odd number of tiles.
      tile: bundles that every query tile costs besides.
      dead: those only a query tile with dead tiles runs.
      alive: those only one without any runs.
      marks: bundles for each eight tiles of the first loop besides, to tell dead tiles.
      step: bundles of a step besides its query tiles.
      head: bundles of a head besides its steps.
    """

    loops: tuple[Part, Part]
    single: tuple[int, int]
    tile: int
    dead: int
    alive: int
    marks: int
    step: int
    head: int

    @classmethod
    def of(cls, schedule: Schedule, bias_turns: int, *, backward: bool) -> "Kernel":
        """Takes a schedule apart; `bias_turns`: of each loop that goes over a head's bias."""
        first, second = schedule.inner_loops()
        inner = max(schedule.depth[first.start], schedule.depth[second.start])

        def holds(part: Part, other: Part) -> bool:
            return part.start <= other.start and other.stop <= part.stop and part != other

        around = [loop for _, loop in schedule.loops if holds(loop, first) and holds(loop, second)]
        tile = min(around, key=lambda loop: loop.bundles)
        step = max(around, key=lambda loop: loop.bundles)
        depths = schedule.depth[tile.start : tile.stop]
        fixed = sum(depth < inner for depth in depths)

        def single(loop: Part) -> int:
            after = [
                part
                for part in schedule.regions
                if part.start >= loop.stop and part.products == loop.products // 2
            ]
            if not after:
                return loop.bundles // 2
            nearest = min(part.start for part in after)
            return min(part.bundles for part in after if part.start == nearest)

        singles = single(first), single(second)
        dead = alive = 0
        skipped = [
            part
            for part in schedule.regions
            if holds(part, second) and part.start > first.stop and part.stop < tile.stop
        ]
        if skipped and backward:
            branch = max(skipped, key=lambda part: part.bundles)
            dead = branch.bundles - second.bundles - singles[1]
            others = [
                part.bundles
                for part in schedule.regions
                if first.stop <= part.start
                and part.stop <= branch.start
                and 0 < part.products < first.products // 2
            ]
            alive = max(others, default=0)
        outside = [
            depth
            for at, depth in enumerate(schedule.depth[step.start : step.stop], step.start)
            if not tile.start <= at < tile.stop
        ]
        least = min(outside, default=0)
        step_bundles = sum(depth == least for depth in outside) if tile != step else 0
        turns = sum(depth > least for depth in outside)
        return cls(
            (first, second),
            singles,
            fixed - sum(singles) - dead - alive,
            dead,
            alive,
            sum(
                loop.bundles
                for depth, loop in schedule.loops
                if depth == inner and not loop.products and holds(tile, loop)
            ),
            step_bundles,
            turns * bias_turns,
        )

    def cycles(
        self,
        first: Iterable[int],
        second: Iterable[int],
        tiles_a_step: int,
        chunks: int,
        visits: Iterable[int],
    ) -> float:
        """Returns the bundles of one head whose query tiles go through so many tiles.

        Args:
          first: turns of the first loop of each query tile.
          second: likewise of the second.
          tiles_a_step: query tiles of a step.
          chunks: of keys.
          visits: how many of them each query tile visits.
        """
        total = float(self.head) * chunks
        for *turns, visited in zip(first, second, visits, strict=True):
            # A little too much: the diagonal is in one chunk only.
            total += self.tile * visited + self.step * chunks / tiles_a_step
            total += self.marks * (turns[0] // 8 + 1)
            total += self.dead if turns[1] else self.alive
            for count, loop, single in zip(turns, self.loops, self.single, strict=True):
                total += count // 2 * loop.bundles + count % 2 * single
        return total


@dataclasses.dataclass(frozen=True)
class Splash:
    """Estimates for one head of splash attention at one choice of blocks."""

    blocks: tuple[int, int, int]
    forward: float
    backward: float
    loops: tuple[Part, Part]
    tiles: int


def splash(compiler: Compiler, generation: str, shape: cases.Shape) -> Splash:
    """Returns splash attention at its best blocks."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    best = None
    x = jax.ShapeDtypeStruct((2, shape.length, shape.head_dim), jnp.bfloat16)
    for queries, keys, compute in SPLASH_BLOCKS:
        sizes = kernels.BlockSizes(
            block_q=queries,
            block_kv=keys,
            block_kv_compute=compute,
            block_q_dkv=queries,
            block_kv_dkv=keys,
            block_kv_dkv_compute=compute,
            use_fused_bwd_kernel=True,
        )
        mask = masks.MultiHeadMask([masks.CausalMask((shape.length,) * 2)] * 2)
        attend = kernels.make_splash_mha_single_device(mask, block_sizes=sizes)

        def loss(q, k, v, attend=attend):
            return jnp.sum(attend(q, k, v).astype(jnp.float32))

        try:
            compiler.compile(jax.grad(loss, argnums=(0, 1, 2)), (x, x, x), generation)
        except Exception as error:
            print(f"splash attention {queries, keys, compute}: {str(error).splitlines()[0][:100]}")
            continue
        cycles, loops = [], []
        visited = sum(-(-((i + 1) * queries) // keys) for i in range(shape.length // queries))
        steps = (shape.length // queries) * (shape.length // keys)
        for name, row in (("splash_mha_fwd", queries), ("splash_mha_dkv", keys)):
            schedule = compiler.schedule(name)
            step = max((loop for _, loop in schedule.loops), key=lambda loop: loop.bundles)
            most = max(part.products for part in schedule.regions)
            main = min(
                (part for part in schedule.regions if part.products == most),
                key=lambda part: part.bundles,
            )
            # What only the first and last steps of a row run: zeroing, writing out.
            once = _disjoint(
                part
                for part in schedule.regions
                if part.products == 0 and part.bundles > 100 and step.start < part.start
            )
            rest = step.bundles - main.bundles - once
            cycles.append(visited * main.bundles + steps * rest + shape.length // row * once)
            loops.append(main)
        found = Splash(
            (queries, keys, compute), *cycles, tuple(loops), visited * queries * keys // _TILE**2
        )
        if best is None or found.forward + found.backward < best.forward + best.backward:
            best = found
    assert best is not None
    return best


def _disjoint(parts: Iterable[Part]) -> int:
    """Returns the bundles that some part has."""
    return len({at for part in parts for at in range(part.start, part.stop)})


def chunk_visits(
    block: TileSizes, chunk: int, visited: Int[np.ndarray, "heads query_tiles"]
) -> Int[np.ndarray, "heads query_tiles"]:
    """Returns how many chunks of keys each tile of queries visits.

    Args:
      block: tiles.
      chunk: keys of one.
      visited: tiles of keys that each tile of queries visits besides its diagonal.
    """
    tiles = chunk // block.keys
    diagonal = np.arange(visited.shape[1]) * (block.queries // block.keys)
    return diagonal // tiles - (diagonal - visited) // tiles + 1


def waiting_bundles(generation: str, block: TileSizes, head_dim: int) -> float:
    """Returns the bundles that a visit to one of several chunks waits while dQ is read and
    written."""
    return 2 * 4 * head_dim * block.queries / BYTES_A_BUNDLE[generation]


def memory_bundles(generation: str, shape: cases.Shape, *, backward: bool) -> float:
    """Returns the bundles one head's bytes take to move, at the memory's full bandwidth.

    Keys and values are read once: they stay in VMEM while a head's queries go by.
    """
    array = shape.length * shape.head_dim * 2
    # Keys, and in the backward pass values, lie along rows of whole vectors.
    upright = shape.length * -(-shape.head_dim // _TILE) * _TILE * 2
    bias = 8 * shape.length * 4
    arrays = (2 + 3 + 2 * 2 + 1) * array + 2 * upright if backward else 5 * array + upright
    return (arrays + (2 if backward else 1) * bias) / BYTES_A_BUNDLE[generation]
