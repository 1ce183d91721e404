"""What a launch is made with: block sizes, warps and pipeline stages of each kernel."""

import dataclasses
import functools

from pallas_kernels.triton import blocks as table
from pallas_kernels.visit import TileSizes


@dataclasses.dataclass(frozen=True)
class Block:
    """One kernel's share of work.

    Attributes:
      queries: queries of a tile, a power of two, at least 16.
      keys: keys of a tile, the same.
      warps: warps of a program.
      stages: depth of the pipeline that fetches tiles ahead.
    """

    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def tiles(self) -> TileSizes:
        """Returns the tile sizes alone."""
        return TileSizes(self.queries, self.keys)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of all kernels for one kind of call.

    Attributes:
      inference: forward pass without residuals.
      forward: forward pass with residuals; a multiple of the backward blocks' queries.
      backward_dq: dQ.
      backward_dkv: dK and dV.
      backward_dbias: gradient of the bias table; its tiles are those of
        `backward_dq`, and its queries a multiple of its keys.
    """

    inference: Block
    forward: Block
    backward_dq: Block
    backward_dkv: Block
    backward_dbias: Block

    def __post_init__(self):
        assert self.forward.queries % self.backward_dq.queries == 0
        assert self.backward_dbias.tiles == self.backward_dq.tiles
        assert self.backward_dbias.queries % self.backward_dbias.keys == 0

    @property
    def largest(self) -> int:
        """Returns the most queries or keys of any tile."""
        every = (getattr(self, field.name) for field in dataclasses.fields(self))
        return max(max(block.queries, block.keys) for block in every)


def power_of_two(n: int) -> int:
    """Returns the least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def padded_head_dim(head_dim: int) -> int:
    """Returns the width of a tile that holds `head_dim`: a power of two."""
    return max(16, power_of_two(head_dim))


def table_key(capability: int, itemsize: int, head_dim: int) -> tuple[str, int, int]:
    """Returns the row of `blocks.BLOCKS` for a GPU, bytes of an input number and a head size."""
    # What counts is the shared memory of a program: 99 KiB for 8.6, 8.9 and 12.x, 163 for
    # 8.0, 227 for 9.0 and 10.x.
    if capability in (86, 89) or capability >= 120:
        kind = "sm_89"
    else:
        kind = "sm_80" if capability < 90 else "sm_90"
    return kind, itemsize, max(32, padded_head_dim(head_dim))


@functools.cache
def blocks(capability: int, itemsize: int, head_dim: int) -> Blocks:
    """Returns the blocks for a call; arguments as those of `table_key`."""
    rows = table.BLOCKS[table_key(capability, itemsize, head_dim)]
    return Blocks(**{name: Block(*row) for name, row in rows.items()})
