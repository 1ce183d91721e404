"""What all launches of one call share: static facts, and arrays in the kernels' form.

Kernels see [batch, heads, head_dim, length]: head sizes lie along sublanes, positions
along lanes, so that a head of 64 fills its vectors. Scores are [keys, queries]: what
belongs to a query is a row of lanes, and every reduction over keys goes along sublanes.
They are in units of log2.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels.problem import Problem
from pallas_kernels.tpu import config
from pallas_kernels.visit import TileSizes

LOG2_E = math.log2(math.e)
SUBLANES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Problem):
    """A call, and how it is done.

    Attributes:
      block: tiles.
      strips: of a tile, that are worked on at a time.
      query_first: a turn of the backward pass multiplies for dQ first, and the first sweep
        keeps its largest scores in order.
      turned: hold the turned bias in VMEM, see `tile.Bias`.
      tiles_a_step: tiles of queries of one step; 1 for a forward pass in chunks.
      forward_chunks, backward_chunks: see `config.key_chunks`.
    """

    block: TileSizes
    strips: config.Strips
    query_first: bool
    turned: bool
    tiles_a_step: int
    forward_chunks: int
    backward_chunks: int

    @property
    def half(self) -> bool:
        """Returns whether inputs are in half precision."""
        return self.itemsize == 2

    @property
    def queries(self) -> int:
        """Returns the queries of a tile."""
        return self.block.queries

    @property
    def keys(self) -> int:
        """Returns the keys of a tile."""
        return self.block.keys

    @property
    def ratio(self) -> int:
        """Returns the key tiles that a query tile's diagonal crosses."""
        return self.queries // self.keys

    @property
    def padded_length(self) -> int:
        """Returns the length as a multiple of `queries`."""
        return -(-self.length // self.queries) * self.queries

    @property
    def padded_dim(self) -> int:
        """Returns the head size the kernels see."""
        return config.padded_head_dim(self.head_dim)

    @property
    def steps(self) -> int:
        """Returns the steps that go over all queries, but for a forward pass in chunks."""
        return self.query_tiles // self.tiles_a_step

    @property
    def query_tiles(self) -> int:
        """Returns how many tiles of queries there are."""
        return self.padded_length // self.queries

    @property
    def bias_window(self) -> int:
        """Returns the distances, rounded up, that one tile has."""
        return self.queries + self.keys

    @property
    def bias_length(self) -> int:
        """Returns the lanes of a head's padded bias."""
        return self.padded_length + self.queries

    @property
    def score_scale(self) -> float:
        """Returns the factor of scores in units of log2."""
        return self.scale * LOG2_E

    def to_kernel(
        self, x: Shaped[Array, "batch length heads head_dim"]
    ) -> Shaped[Array, "batch heads padded_dim padded_length"]:
        """Brings inputs into the kernels' form."""
        return self._pad(x).transpose(0, 2, 3, 1)

    def to_kernel_rows(
        self, x: Shaped[Array, "batch length heads head_dim"]
    ) -> Shaped[Array, "batch heads padded_length padded_dim"]:
        """Brings keys and values into the form that products with queries take from the left.

        The other way up, each of their tiles would be turned for every tile of queries.
        """
        return self._pad(x).transpose(0, 2, 1, 3)

    def _pad(
        self, x: Shaped[Array, "batch length heads head_dim"]
    ) -> Shaped[Array, "batch padded_length heads padded_dim"]:
        length, dim = self.padded_length - self.length, self.padded_dim - self.head_dim
        return jnp.pad(x, ((0, 0), (0, length), (0, 0), (0, dim)))

    def from_kernel(
        self, x: Shaped[Array, "batch heads padded_dim padded_length"]
    ) -> Shaped[Array, "batch length heads head_dim"]:
        """Undoes `to_kernel`."""
        return x[:, :, : self.head_dim, : self.length].transpose(0, 3, 1, 2)

    def rows(self, x: Shaped[Array, "batch length"], **how) -> Shaped[Array, "batch 1 padded"]:
        """Pads a number a query, and gives it a sublane."""
        return jnp.pad(x, ((0, 0), (0, self.padded_length - self.length)), **how)[:, None]

    def bias(
        self, values: Float[Array, "heads padded_length"]
    ) -> Float[Array, "heads 8 bias_length"]:
        """Returns the bias of each distance as the kernels read it.

        Row s has b(x - queries - s) at lane x: eight copies, each a lane further on, are
        the eight sublanes of a Toeplitz matrix.
        """
        values = LOG2_E * values
        copies = [
            jnp.pad(values, ((0, 0), (self.queries + s, 0)))[:, : self.bias_length]
            for s in range(SUBLANES)
        ]
        return jnp.stack(copies, axis=1)

    def bias_gradient(
        self, sums: Float[Array, "... 8 bias_length"]
    ) -> Float[Array, "... padded_length"]:
        """Returns the gradient of `values` from that of `bias`, the factor left out."""
        sums = jnp.pad(sums, [(0, 0)] * (sums.ndim - 1) + [(0, SUBLANES)])
        starts = [self.queries + s for s in range(SUBLANES)]
        copies = [sums[..., s, at : at + self.padded_length] for s, at in enumerate(starts)]
        return jnp.sum(jnp.stack(copies), axis=0)
