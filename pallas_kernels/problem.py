"""The words that all backends share: what a call is, what goes in, what is kept, what comes back.

Queries and keys are cut into tiles. For one head, a tile of queries x keys is

- negligible: so little softmax mass that it is never visited (`visit.py`);
- dead: visited, but no entry survives Elastic-Softmax, so that only the
  log-sum-exp, dQ, dK and db need it;
- live: the rest.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How kernels run; for measurements and tests.

    Attributes:
      skip_dead: leave dead tiles out of what they don't contribute to. False computes every
        visited tile in full.
      interpret: parameters of Pallas's interpret mode; None: kernels are compiled.
      launch_triton: called in place of `triton.call.launch`; None: jax-triton launches.
      planner: what plans calls of the Hopper kernels, "triton" or "xla"; None: Triton where
        there is jax-triton.
    """

    skip_dead: bool = True
    interpret: Any = None
    launch_triton: Any = None
    planner: Literal["triton", "xla"] | None = None


_options = jax.make_user_context(Options())


def current_options() -> Options:
    """Returns what `options` set; else the defaults."""
    return _options.value


@contextlib.contextmanager
def options(**changes: Any) -> Iterator[None]:
    """Changes options for the calls traced inside. JAX knows: it traces them anew."""
    with _options(dataclasses.replace(current_options(), **changes)):
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem(Options):
    """What is known of a call when it is traced.

    A backend's plan is a `Problem` that also says how the backend does it.

    Attributes:
      length: of the keys.
      heads: of the queries.
      group: query heads a key head.
      head_dim: of queries and keys.
      value_dim: of values.
      dtype: of all three.
      width: of the bias table, at most `length`; 0: no bias.
      has_slope: the bias goes on past its table.
      has_offset: Elastic-Softmax rather than softmax.
      packed: some query does not see the first key of its row: documents, or a window.
      scale: factor of the scores, 1 / sqrt(head_dim) as a rule.
      skip_mass: softmax mass that a row may lose to negligible tiles; 0 skips none.
      out_dtype: of the output; None: that of the queries. "xla_chunked" only.
    """

    length: int
    heads: int
    group: int
    head_dim: int
    value_dim: int
    dtype: str
    width: int
    has_slope: bool
    has_offset: bool
    packed: bool
    scale: float
    skip_mass: float
    out_dtype: str | None = None

    def facts(self) -> dict[str, Any]:
        """Returns the fields of `Problem` by name, to make a plan of."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Problem)}

    @property
    def has_bias(self) -> bool:
        """Whether there is a bias table."""
        return self.width > 0

    @property
    def key_heads(self) -> int:
        """Heads of the keys."""
        return self.heads // self.group

    @property
    def itemsize(self) -> int:
        """Bytes of an input number."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def padding(self) -> tuple[int, int]:
        """Rows, and numbers a head, by which the kernels want queries, keys and values longer."""
        return 0, 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays of a call. Those that a call has not are None, as everywhere.

    Query i sees keys `segment_start[i] <= j <= i`: causal, in its document and its window.

    Attributes:
      query: after RoPE.
      key: after RoPE; `kv_heads` divides `heads`.
      value: of the same dtype.
      segment_start: first key that each query sees.
      offset_scale: what tau is multiplied by: 1 / n_i, or the same constant everywhere.
      distance_bias: b(x) of distances 0 <= x < width, in the dtype of scores.
      distance_slope: of its tail; None: b is 0 past the table.
      offset: tau of each head; None: ordinary softmax.
    """

    query: Float[Array, "batch length heads head_dim"]
    key: Float[Array, "batch key_length kv_heads head_dim"]
    value: Float[Array, "batch key_length kv_heads value_dim"]
    segment_start: Int[Array, "batch length"]
    offset_scale: Float[Array, "batch length"]
    distance_bias: Float[Array, "heads width"] | None
    distance_slope: Float[Array, " heads"] | None
    offset: Float[Array, " heads"] | None

    @property
    def rows(self) -> dict[str, Array]:
        """The arrays that the batch axis leads."""
        names = ("query", "key", "value", "segment_start", "offset_scale")
        return {name: getattr(self, name) for name in names}

    @property
    def parameters(self) -> dict[str, Array | None]:
        """The arrays that all of the batch shares."""
        names = ("distance_bias", "distance_slope", "offset")
        return {name: getattr(self, name) for name in names}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the forward pass leaves for the backward pass, linear in length.

    Each backend has those that it needs, in a layout of its own; the others are None.

    Attributes:
      lse: log-sum-exp of each row's scores.
      out: the output.
      rounding: what rounding took from what delta is found from.
      live: first tile, of each tile of queries, that may be live.
      live_v: sum of the values of live entries, or that over the number of visible ones.
      mean_k: mean of the keys under P, in two halves; with it dQ needs no dead tile.
      past: sums over tiles past the bias table.
    """

    lse: Array
    out: Array | None = None
    rounding: Array | None = None
    live: Array | None = None
    live_v: Array | None = None
    mean_k: tuple[Array, Array] | None = None
    past: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gradients:
    """Gradients of `Inputs`; None for those that a call has not.

    The batch may be made of `groups` groups that know nothing of one another, see
    `batching.over_batch`. Those of parameters are sums over a group, led by that axis.
    """

    query: Float[Array, "batch length heads head_dim"]
    key: Float[Array, "batch key_length kv_heads head_dim"]
    value: Float[Array, "batch key_length kv_heads value_dim"]
    distance_bias: Float[Array, "groups heads width"] | None
    distance_slope: Float[Array, "groups heads"] | None
    offset: Float[Array, "groups heads"] | None
