"""A call as its kernels see it: what all of them read."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu.plan import BLOCK, Plan
from pallas_kernels.mosaic_gpu.planning.types import Table
from pallas_kernels.problem import Inputs


class Call:
    """A call's plan, arrays and sizes.

    Attributes:
      plan: the call, and how it is done.
      inputs: its arrays as they are given; the length is a multiple of 8.
      query, key, value: of these.
      table: the bias in the kernels' form.
      offset: tau; zeros without an offset.
      offset_scale, segment_start: as in `Inputs`, rows padded to blocks of 64.
      batch, length, heads, head_dim: of the queries.
      group: query heads a key head.
      blocks: of a row, the last one maybe in part.
    """

    def __init__(self, plan: Plan, inputs: Inputs, table: Table):
        self.plan, self.inputs, self.table = plan, inputs, table
        self.query, self.key, self.value = inputs.query, inputs.key, inputs.value
        self.batch, self.length, self.heads, self.head_dim = inputs.query.shape
        self.group = self.heads // inputs.key.shape[2]
        self.blocks = -(-self.length // BLOCK)
        tau = inputs.offset
        self.offset = jnp.zeros(self.heads, jnp.float32) if tau is None else tau
        self.offset_scale = self._padded(inputs.offset_scale)
        self.segment_start = self._padded(inputs.segment_start)

    def _padded(self, x: Array) -> Float[Array, "batch padded"]:
        # A row of padding sees what the last row sees.
        missing = self.blocks * BLOCK - self.length
        return jnp.pad(x, ((0, 0), (0, missing)), mode="edge") if missing else x
