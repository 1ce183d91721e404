"""What all launches of one call share: static facts, and arrays in the kernels' form."""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import bias as bias_lib
from pallas_kernels.problem import Inputs, Problem
from pallas_kernels.triton.config import Block, Blocks, padded_head_dim

_LOG2_E = math.log2(math.e)

# Forms of a tile's bias, see `tile.py`.
NONE, TABLE, TAIL = range(3)


class Table(NamedTuple):
    """The distance bias in the kernels' form, in units of log2.

    Attributes:
      values: b(x), padded: entries before b(0) belong to masked distances; entries past the
        width are the tail's, for tiles that reach past the table.
      slope: of the tail; None without one.
    """

    values: Float[Array, "heads pitch"]
    slope: Float[Array, " heads"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static(Problem):
    """What one kernel is compiled for; kernels take it as one constant.

    Attributes:
      queries, keys: of a tile.
      forward_queries, forward_keys: of the forward pass's tiles, whose ranges the backward
        pass reads.
      pitch: entries of one head in the padded table.
      lead: of them before b(0).
      training: the forward pass leaves residuals.
      keep_rounding: among them what rounding took from the outputs.
      packed_compare: the GPU compares two bfloat16 numbers at a time.
      distances, chunks, batches: see `backward_dbias.lazy_backward_dbias`.
    """

    queries: int
    keys: int
    forward_queries: int
    forward_keys: int
    pitch: int
    lead: int
    training: bool
    keep_rounding: bool
    packed_compare: bool
    distances: int = 0
    chunks: int = 0
    batches: int = 0

    @property
    def near_bias(self) -> int:
        """Returns the form of the bias in tiles with a distance inside the table."""
        return TABLE if self.has_bias else NONE

    @property
    def past_bias(self) -> int:
        """Returns the form of the bias in tiles past the table."""
        return TAIL if self.has_slope else NONE

    @property
    def has_past(self) -> bool:
        """Returns whether some tile may lie past the table, or there is no table."""
        return self.width < self.length

    @property
    def score_scale(self) -> float:
        """Returns the factor of scores in units of log2."""
        return self.scale * _LOG2_E

    @property
    def padded_dim(self) -> int:
        """Returns the head size of a tile."""
        return padded_head_dim(self.head_dim)

    @property
    def query_stride(self) -> int:
        """Returns the numbers from one position to the next in query, out and the like."""
        return self.heads * self.head_dim

    @property
    def key_stride(self) -> int:
        """Returns the same of key and value."""
        return self.key_heads * self.head_dim

    @property
    def query_tiles(self) -> int:
        """Returns how many tiles of queries there are."""
        return -(-self.length // self.queries)

    @property
    def key_tiles(self) -> int:
        """Returns how many tiles of keys there are."""
        return -(-self.length // self.keys)

    @property
    def forward_tiles(self) -> int:
        """Returns how many tiles of queries the forward pass has."""
        return -(-self.length // self.forward_queries)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Problem):
    """A call, and how it is done.

    Attributes:
      capability: compute capability of the GPU.
      blocks: of every kernel.
    """

    capability: int
    blocks: Blocks

    @property
    def lead(self) -> int:
        """Returns the entries before b(0) in the padded table: enough for any tile."""
        return 2 * self.blocks.largest

    def static(self, block: Block, *, training: bool = True) -> Static:
        """Returns what a kernel is compiled for."""
        return Static(
            **self.facts(),
            queries=block.queries,
            keys=block.keys,
            forward_queries=self.blocks.forward.queries,
            forward_keys=self.blocks.forward.keys,
            pitch=self.width + 2 * self.lead,
            lead=self.lead,
            training=training,
            keep_rounding=training and self.itemsize == 2,
            packed_compare=self.dtype == "bfloat16" and self.capability >= 90,
        )

    def table(
        self,
        distance_bias: Float[Array, "heads width"] | None,
        distance_slope: Float[Array, " heads"] | None,
    ) -> Table | None:
        """Returns the bias as the kernels read it."""
        if distance_bias is None:
            return None
        values = bias_lib.expand(distance_bias, distance_slope, self.width + self.lead)
        values = _LOG2_E * jnp.pad(values, ((0, 0), (self.lead, 0)))
        return Table(values, None if distance_slope is None else _LOG2_E * distance_slope)

    def bias(self, table: Table | None) -> tuple[Array | None, Array | None]:
        """Returns the table and the slopes."""
        return (None, None) if table is None else table

    def arrays(self, inputs: Inputs, table: Table | None) -> tuple[Array | None, ...]:
        """Returns what kernels for queries read first, in their order."""
        scale = inputs.offset_scale if self.has_offset else None
        of_heads = (*self.bias(table), inputs.offset, scale)
        return inputs.query, inputs.key, inputs.value, *of_heads, self.segment_start(inputs)

    def segment_start(self, inputs: Inputs) -> Array | None:
        """Returns the first key that each query sees, unless that is the first of all."""
        return inputs.segment_start if self.packed else None
