"""What all launches of one call share: static facts, and arrays in the kernels' form."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import bias as bias_lib
from pallas_kernels.triton.config import Block, Blocks, padded_head_dim, power_of_two

_LOG2_E = math.log2(math.e)

# Forms of a tile's bias, see `tile.py`.
NONE, TABLE, TAIL = range(3)


@dataclasses.dataclass(frozen=True)
class Static:
    """What one kernel is compiled for; kernels take it as one constant.

    Attributes:
      length, heads, head_dim: of the queries.
      group: query heads a key head.
      queries, keys: of a tile.
      forward_queries, forward_keys: of the forward pass's tiles, whose ranges the backward
        pass reads.
      scale: factor of the scores.
      width: length of the bias table, at most `length`; 0: no bias.
      pitch: entries of one head in the padded table.
      lead: of them before b(0).
      has_slope: the bias goes on past its table.
      has_offset: Elastic-Softmax rather than softmax.
      packed: some query does not see the first key of its row: documents, or a window.
      skip_dead: leave dead tiles out of what they don't contribute to.
      training: the forward pass leaves residuals.
      keep_rounding: among them what rounding took from the outputs.
      packed_compare: the GPU compares two bfloat16 numbers at a time.
      distances, chunks, batches: see `bias_gradient.lazy_backward_bias`.
    """

    length: int
    heads: int
    head_dim: int
    group: int
    queries: int
    keys: int
    forward_queries: int
    forward_keys: int
    scale: float
    width: int
    pitch: int
    lead: int
    has_slope: bool
    has_offset: bool
    packed: bool
    skip_dead: bool
    training: bool
    keep_rounding: bool
    packed_compare: bool
    distances: int = 0
    chunks: int = 0
    batches: int = 0

    @property
    def has_bias(self) -> bool:
        """Returns whether there is a bias table."""
        return self.width > 0

    @property
    def near_bias(self) -> int:
        """Returns the form of the bias in tiles with a distance inside the table."""
        return TABLE if self.has_bias else NONE

    @property
    def far_bias(self) -> int:
        """Returns the form of the bias in tiles past the table."""
        return TAIL if self.has_slope else NONE

    @property
    def has_far(self) -> bool:
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
    def key_heads(self) -> int:
        """Returns how many heads the keys have."""
        return self.heads // self.group

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
    def query_tiles_padded(self) -> int:
        """Returns the same, rounded up to a power of two."""
        return power_of_two(self.query_tiles)

    @property
    def query_tiles_a_chunk(self) -> int:
        """Returns the most tiles of queries in one of `chunks` runs."""
        return -(-self.query_tiles // self.chunks)

    @property
    def key_tiles(self) -> int:
        """Returns how many tiles of keys there are."""
        return -(-self.length // self.keys)

    @property
    def forward_tiles(self) -> int:
        """Returns how many tiles of queries the forward pass has."""
        return -(-self.length // self.forward_queries)

    @property
    def forward_tiles_padded(self) -> int:
        """Returns the same, rounded up to a power of two."""
        return power_of_two(self.forward_tiles)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known when a call is traced.

    Attributes:
      scale: factor of the scores.
      skip_mass: softmax mass a row may lose to negligible tiles.
      skip_dead, packed, width, has_slope, has_offset: see `Static`.
      capability: compute capability of the GPU.
      blocks: of every kernel.
    """

    scale: float
    skip_mass: float
    skip_dead: bool
    packed: bool
    width: int
    has_slope: bool
    has_offset: bool
    capability: int
    blocks: Blocks

    @property
    def lead(self) -> int:
        """Returns the entries before b(0) in the padded table: enough for any tile."""
        return 2 * self.blocks.largest

    def static(self, query: Array, key: Array, block: Block, *, training: bool = True) -> Static:
        """Returns what a kernel is compiled for."""
        _, length, heads, head_dim = query.shape
        half = query.dtype.itemsize == 2
        return Static(
            length=length,
            heads=heads,
            head_dim=head_dim,
            group=heads // key.shape[2],
            queries=block.queries,
            keys=block.keys,
            forward_queries=self.blocks.forward.queries,
            forward_keys=self.blocks.forward.keys,
            scale=self.scale,
            width=self.width,
            pitch=self.width + 2 * self.lead,
            lead=self.lead,
            has_slope=self.has_slope,
            has_offset=self.has_offset,
            packed=self.packed,
            skip_dead=self.skip_dead,
            training=training,
            keep_rounding=training and half,
            packed_compare=query.dtype == jnp.bfloat16 and self.capability >= 90,
        )

    def table(
        self,
        distance_bias: Float[Array, "heads width"] | None,
        distance_slope: Float[Array, " heads"] | None,
    ) -> tuple[Float[Array, "heads pitch"], Float[Array, " heads"]]:
        """Returns the padded table and the slopes in units of log2; dummies for None.

        Entries before b(0) belong to masked distances; entries past the width are the
        tail's, for tiles that reach past the table.
        """
        nothing = jnp.zeros(1, jnp.float32)
        if distance_bias is None:
            return nothing, nothing
        values = bias_lib.expand(distance_bias, distance_slope, self.width + self.lead)
        table = _LOG2_E * jnp.pad(values, ((0, 0), (self.lead, 0)))
        return table, nothing if distance_slope is None else _LOG2_E * distance_slope
