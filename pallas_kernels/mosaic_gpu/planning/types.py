"""What both planners return."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int


class Table(NamedTuple):
    """The distance bias in the kernels' form; see `Plan.table`.

    Attributes:
      for_queries, for_keys: tables of every head, for tiles whose rows are queries or keys.
      tail: value and slope of what follows.
      maxima: for `visits`, largest b(x) of each distance of tiles, and then the means of b(x)
        from each near distance on; None where that asks the bias itself.
    """

    for_queries: Float[Array, "heads rows 128"]
    for_keys: Float[Array, "heads rows 128"]
    tail: Float[Array, "heads 2"]
    maxima: Float[Array, "heads numbers"] | None


class Visits(NamedTuple):
    """What is known before the forward pass.

    Attributes:
      first: first block of keys that each block of queries visits.
      no_overflow: whether no score of a head, less b(0), is large either way: 1 or 0.
      work: tiles visited, in parts whose sum counts.
    """

    first: Int[Array, "batch heads blocks"]
    no_overflow: Int[Array, "batch heads"]
    work: Int[Array, "batch heads parts"]


class KeyRanges(NamedTuple):
    """What the backward pass knows of its tiles, seen from the keys and the distances.

    Attributes:
      last, last_live: last block of queries that visits each block of keys, and last for which
        it may be live.
      distances: see `by_xla.distance_ranges`; None without a bias.
      tile_order: of work tiles, for each order that was asked for.
    """

    last: Int[Array, "batch heads blocks"]
    last_live: Int[Array, "batch heads blocks"]
    distances: Int[Array, "batch heads parts filled 3"] | None
    tile_order: list[Int[Array, " work_tiles+1"]]


class ParameterGradients(NamedTuple):
    """Gradients of the parameters, of each group of the batch; None for those not given."""

    distance_bias: Float[Array, "groups heads width"] | None
    distance_slope: Float[Array, "groups heads"] | None
    offset: Float[Array, "groups heads"] | None
