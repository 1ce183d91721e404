"""What a launch is made with."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """What all kernels are made with.

    Attributes:
      warpgroups: how many compute; each has 64 rows of the block's own operand.
      stages: tiles of each other operand that are fetched ahead.
      in_registers: the block's own operand is kept in registers rather than read from SMEM
        again and again.
    """

    warpgroups: int = 2
    stages: int = 2
    in_registers: bool = True

    @property
    def rows(self) -> int:
        """Queries, or keys, of a block."""
        return 64 * self.warpgroups

    @property
    def registers(self) -> int:
        """Registers of a thread that computes."""
        # All threads start with the same number, a multiple of 8, and only trade what they
        # have then: asking for more would wait for ever.
        groups = self.warpgroups + 1
        at_start = min(65536 // (128 * groups) // 8 * 8, 248)
        return min(240, (at_start * groups - self.fetch_registers) // self.warpgroups // 8 * 8)

    @property
    def fetch_registers(self) -> int:
        """Registers of a thread that fetches."""
        return 24 if self.warpgroups <= 2 else 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardBlock(Block):
    """The forward pass.

    Attributes:
      keys: of a tile, 64 or 128.
      polynomial: (n, of): share of exponentials the first sweep does by polynomial.
    """

    keys: int = 128
    polynomial: tuple[int, int] = (1, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """The blocks of all kernels for one kind of call.

    Attributes:
      inference: forward pass without residuals.
      forward: forward pass with residuals.
      backward_query: dQ.
      backward_key: dK and dV.
      backward_bias: gradient of the bias table.
    """

    inference: ForwardBlock = ForwardBlock()
    forward: ForwardBlock = ForwardBlock()
    backward_query: Block = Block()
    backward_key: Block = Block()
    backward_bias: Block = Block(stages=4)


# By head size.
_BLOCKS = {
    64: Blocks(),
    128: Blocks(
        inference=ForwardBlock(keys=128, in_registers=False),
        forward=ForwardBlock(keys=64, stages=3, in_registers=False),
        backward_query=Block(stages=3, in_registers=False),
        backward_key=Block(in_registers=False),
        backward_bias=Block(),
    ),
}

# Bytes of shared memory a block may have, less what barriers and alignment take.
_SHARED_MEMORY = 227 * 1024 - 4096


def padded_head_dim(head_dim: int) -> int:
    """Returns the head size that the kernels compute with, for one of at most 128."""
    return 64 if head_dim <= 64 else 128


def blocks(head_dim: int) -> Blocks:
    """Returns the blocks for a padded head size."""
    return _BLOCKS[head_dim]


def widest_table(head_dim: int, group: int) -> int:
    """Returns the longest bias table that fits into shared memory beside the tiles.

    Args:
      head_dim: padded head size.
      group: query heads a key head.
    """
    found = blocks(head_dim)
    row = 2 * head_dim

    def ahead(block: ForwardBlock, outputs: int) -> int:
        return outputs * block.rows * row + 2 * block.stages * block.keys * row

    query, key, bias = found.backward_query, found.backward_key, found.backward_bias
    key_stages = bias.stages + bias.warpgroups - 1
    rows_facts = 4 * 64 * 4
    used = (
        (ahead(found.inference, 1), 1),
        # Query (and out), mean, rounding.
        (ahead(found.forward, 3), 1),
        (2 * query.rows * row + 2 * query.stages * 64 * row, 1),
        (2 * key.rows * row + key.stages * (2 * 64 * row + rows_facts), min(2, group)),
        (bias.stages * (2 * 64 * row + rows_facts) + 2 * key_stages * 64 * row, 1),
    )
    # A table is held twice, with some entries around it: see `plan.Plan.table`.
    entries = min((_SHARED_MEMORY - bytes_) // tables // 8 for bytes_, tables in used)
    return (entries - 640) // 128 * 128
