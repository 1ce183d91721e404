"""Counts the tiles that a call with a window visits, in the tiles of each implementation.

    python -m benchmarks.window_tiles --window=512 --lengths=4096,16384

Nothing is negligible here (`skip_mass` 0), so what is counted is the window's doing alone.
Needs no device. Prints a Markdown table; "pairs" are of a query and a key that it sees.
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from absl import app, flags
from jaxtyping import Array, Int

from pallas_kernels import visit
from pallas_kernels.chunked.tiling import tile_size
from pallas_kernels.mosaic_gpu.plan import BLOCK
from pallas_kernels.tpu import config as tpu_config
from pallas_kernels.triton import config as triton_config
from pallas_kernels.visit import TileSizes

# Its own where tests import this: other programs have flags of the same names.
_OWN: dict[str, Any] = {
    "flag_values": flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
}
_WINDOW = flags.DEFINE_integer("window", 512, "Keys that a query sees.", lower_bound=1, **_OWN)
_LENGTHS = flags.DEFINE_list("lengths", ["4096", "16384"], "Sequence lengths.", **_OWN)
_HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "Head size; inputs of 16 bits.", **_OWN)


def tiles(head_dim: int, length: int) -> Iterator[tuple[str, TileSizes]]:
    """Returns implementations by name, and their tiles for training."""
    yield "mosaic_gpu", TileSizes(BLOCK, BLOCK)
    for capability in (80, 90):
        block = triton_config.blocks(capability, 2, head_dim).forward
        yield f"triton, {capability / 10}", TileSizes(block.queries, block.keys)
    for generation in ("v4", "v5p"):
        yield f"tpu, {generation}", tpu_config.block(generation, 2, head_dim, length)
    size = tile_size(length)
    yield "xla_chunked", TileSizes(size, size)


def segment_starts(length: int, window: int) -> Int[Array, "1 length"]:
    """Returns the first key that each query of a row sees."""
    return jnp.maximum(jnp.arange(length, dtype=jnp.int32) - (window - 1), 0)[None]


def count(sizes: TileSizes, length: int, window: int, whole_diagonals: bool) -> tuple[int, int]:
    """Returns how many tiles are visited, and how many causal ones there are.

    Args:
      sizes: of a tile.
      length: of the sequence.
      window: keys that a query sees.
      whole_diagonals: all query tiles go as far from the diagonal as the widest does, also
        where no keys are.
    """
    nothing = jnp.zeros((1, length, 1, 1))
    ranges = visit.visit_ranges(
        nothing,
        nothing,
        None,
        None,
        segment_starts(length, window),
        scale=1.0,
        skip_mass=0.0,
        tiles=sizes,
    )
    visited = ranges.visited
    if whole_diagonals:
        visited = visited.max() * jnp.ones_like(visited)
    return int(visited.sum()), int((ranges.last + 1).sum())


def table(window: int, lengths: list[int], head_dim: int) -> str:
    """Returns the counts as Markdown."""
    lines = [
        "| length | implementation | tile, queries x keys | visited | causal | share |",
        "|---|---|---|---|---|---|",
    ]
    for length in lengths:
        seen = int((jnp.arange(length) - segment_starts(length, window) + 1).sum())
        rows = [("pairs", "", seen, length * (length + 1) // 2)]
        for name, sizes in tiles(head_dim, length):
            found = count(sizes, length, window, whole_diagonals=name == "xla_chunked")
            rows.append((name, f"{sizes.queries} x {sizes.keys}", *found))
        for name, tile, visited, causal in rows:
            share = f"{visited / causal:.3f}"
            lines.append(f"| {length:,} | {name} | {tile} | {visited:,} | {causal:,} | {share} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    lengths = [int(length) for length in _LENGTHS.value]
    print(table(_WINDOW.value, lengths, _HEAD_DIM.value))


if __name__ == "__main__":
    app.run(main)
