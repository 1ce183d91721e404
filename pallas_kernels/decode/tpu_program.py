"""The TPU decode kernel: what a program does with one row of one key/value head.

`tpu.py` launches it and says how it works.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.decode.types import PAGE, Settings
from pallas_kernels.tpu.config import LANES
from pallas_kernels.tpu.kernel_types import Index, Ref, Refs, Scalar
from pallas_kernels.tpu.plan import LOG2_E, SUBLANES
from pallas_kernels.tpu.tile import LAST_FIRST, LAST_LAST, LOWEST, MASKED, dot

# Chunks that are copied at a time: one is worked on, the others are under way.
COPIES = 4
# Chunks that are told dead or live at a time.
_MARKS = 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernel is compiled for.

    Attributes:
      new, group, head_dim: sizes, see `types.Inputs`.
      slots: of the cache, whole pages.
      real_slots: those that hold keys.
      chunk: slots of a chunk.
      settings: of the call.
      has_bias, has_offset, quantized: which arrays there are.
    """

    new: int
    group: int
    head_dim: int
    slots: int
    real_slots: int
    chunk: int
    settings: Settings
    has_bias: bool
    has_offset: bool
    quantized: bool

    @property
    def real_rows(self) -> int:
        """Returns the rows of queries of one head of the cache: heads of a query together."""
        return self.new * self.group

    @property
    def rows(self) -> int:
        """Returns these, in whole vectors."""
        return -(-self.real_rows // SUBLANES) * SUBLANES

    @property
    def bias_rows(self) -> int:
        """Returns the rows of the bias; one serves all that a tile of one query has."""
        return 1 if self.real_rows == 1 else self.rows

    @property
    def chunks(self) -> int:
        """Returns how many chunks a row has; the last one may overlap the one before."""
        return -(-self.slots // self.chunk)

    @property
    def origin(self) -> int:
        """Returns the lane of the bias that has distance 0."""
        return self.slots + self.chunk

    @property
    def bias_lanes(self) -> int:
        """Returns the lanes of the bias."""
        return self.origin + self.chunk + LANES

    def vmem_bytes(self, itemsize: int, cache_itemsize: int) -> int:
        """Returns the bytes of VMEM that a program needs, about."""
        copies = 2 * COPIES * self.head_dim * self.chunk * cache_itemsize
        scores = self.chunks * self.rows * (self.chunk + LANES) * 4
        bias = 2 * max(self.bias_rows, SUBLANES) * self.bias_lanes * 4 if self.has_bias else 0
        queries = 4 * self.rows * max(self.head_dim, LANES) * itemsize
        # Tiles of scores, keys and values in the queries' dtype.
        work = 8 * self.rows * self.chunk * 4 + 4 * self.head_dim * self.chunk * itemsize
        return copies + scores + bias + queries + work


class Program:
    """One row of one head of the cache."""

    def __init__(self, plan: Plan, refs: Refs):
        self.plan, self.refs = plan, refs
        self.row, self.head = pl.program_id(0), pl.program_id(1)
        self.length = refs.lengths[self.row]
        # Where the newest key is.
        self.last = jax.lax.rem(jnp.maximum(self.length - 1, 0), plan.real_slots)
        turn = jnp.zeros((plan.rows, 1), jnp.int32)
        row = jax.lax.broadcasted_iota(jnp.int32, turn.shape, 0)
        for i in range(1, plan.new):
            turn += (row >= i * plan.group).astype(jnp.int32)
        self.before_newest = plan.new - 1 - turn

    def run(self) -> None:
        """Does both sweeps."""
        plan, refs = self.plan, self.refs
        refs.maximum[...] = jnp.full_like(refs.maximum, LOWEST)
        for name in ("total", "weight", "sum"):
            ref = getattr(refs, name)
            ref[...] = jnp.zeros_like(ref)
        order = refs.order.at[0, 0, 0]
        self.sweep("key", order, order[0], self.add_keys)
        maximum = jnp.max(refs.maximum[...], axis=1, keepdims=True)
        total = refs.total[...] * jnp.exp2(refs.maximum[...] - maximum)
        total = jnp.sum(total, axis=1, keepdims=True)
        lse = maximum + jnp.log2(total)
        if plan.has_offset:
            self.mark_live(lse)
            self.sweep("value", refs.live, refs.live[0], functools.partial(self.add_values, lse))
        else:
            self.sweep("value", order, order[0], functools.partial(self.add_values, lse))
        out = refs.sum[...]
        if plan.settings.renormalize:
            weight = jnp.sum(refs.weight[...], axis=1, keepdims=True)
            out = out / jnp.where(weight == 0, 1.0, weight)
        # No mass at all, or what is no number.
        out = jnp.where(total > 0, out, jnp.nan)
        refs.out[0, 0] = out.astype(refs.out.dtype)

    def sweep(
        self, what: str, listed: Ref, count: Index, body: Callable[[Scalar, Array], None]
    ) -> None:
        """Runs body(chunk, what it has) for each chunk of a list, copying ahead."""
        plan, refs = self.plan, self.refs
        source, copies = getattr(refs, what), getattr(refs, f"{what}_copies")
        done = getattr(refs, f"{what}_copied")

        def copy(n: Index) -> Any:
            slot = jax.lax.rem(n, COPIES)
            at = pl.ds(self.start(listed[n + 1]), plan.chunk)
            return pltpu.make_async_copy(
                source.at[refs.layer[0], self.row, self.head, :, at], copies.at[slot], done.at[slot]
            )

        def start(n: Index) -> None:
            pl.when(n < count)(lambda: copy(n).start())

        for n in range(COPIES - 1):
            start(n)

        @pl.loop(0, count)
        def _(n):
            start(n + COPIES - 1)
            copy(n).wait()
            body(listed[n + 1], copies[jax.lax.rem(n, COPIES)])

    def start(self, chunk: Scalar) -> Scalar:
        """Returns a chunk's first slot."""
        start = jnp.minimum(chunk * self.plan.chunk, self.plan.slots - self.plan.chunk)
        return pl.multiple_of(start, LANES)

    def in_full(self, chunk: Scalar) -> tuple[Scalar, Scalar]:
        """Returns whether all queries see all of a chunk, and the distance of its first slot."""
        plan, settings = self.plan, self.plan.settings
        start = self.start(chunk)
        later = start > self.last
        first = self.last - start + jnp.where(later, plan.real_slots, 0)
        end = start + plan.chunk
        full = (later | (end - 1 <= self.last)) & (start == chunk * plan.chunk)
        full &= (first - plan.chunk + 1 >= plan.new - 1) & (first < self.length)
        full &= end <= plan.real_slots
        if settings.window is not None:
            full &= first < settings.window
        return full, first

    def backs(self, chunk: Scalar) -> tuple[Array, Array]:
        """Returns how far before the newest position each slot's key lies, and whether it is
        the chunk's own and held; both [1, chunk]."""
        plan = self.plan
        shape = (1, plan.chunk)
        slot = self.start(chunk) + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        back = self.last - slot
        back = jnp.where(back < 0, back + plan.real_slots, back)
        own = (slot >= chunk * plan.chunk) & (slot < plan.real_slots) & (back < self.length)
        return back, own

    def visible(self, chunk: Scalar) -> Array:
        """Returns which of a chunk's slots each row sees."""
        back, own = self.backs(chunk)
        distance = back - self.before_newest
        seen = own & (distance >= 0)
        window = self.plan.settings.window
        return seen if window is None else seen & (distance < window)

    def bias(self, first: Scalar) -> Array:
        """Returns the bias of a chunk whose first slot lies so far before the newest."""
        plan = self.plan
        lane = jnp.clip(plan.origin - first, 0, plan.origin)
        within = jax.lax.rem(lane, LANES)
        at = pl.ds(pl.multiple_of(lane - within, LANES), plan.chunk + LANES)
        window = self.refs.bias[0, :, at]
        turned = pltpu.roll(window, jnp.where(within == 0, 0, plan.chunk + LANES - within), 1)
        return turned[:, : plan.chunk]

    def scaled(self, x: Array, scales: Ref, chunk: Scalar, factor: float) -> Array:
        """Returns x with each page's scale and a factor multiplied into its slots."""
        page = self.start(chunk) // PAGE
        parts = []
        for n in range(self.plan.chunk // PAGE):
            scale = scales[0, 0, 0, page + n] * factor
            parts.append(x[:, n * PAGE : (n + 1) * PAGE] * scale)
        return jnp.concatenate(parts, axis=1)

    def add_keys(self, chunk: Scalar, keys: Array) -> None:
        """Keeps the scores of a chunk, and adds up their exponentials."""
        plan, refs = self.plan, self.refs
        query = refs.query[0, 0]
        scores = dot(query, _as(keys, query.dtype), LAST_FIRST)
        factor = plan.settings.scale * LOG2_E
        if plan.quantized:
            scores = self.scaled(scores, refs.key_scales, chunk, factor)
        else:
            scores = scores * factor
        full, first = self.in_full(chunk)

        @pl.when(full)
        def _():
            self.keep(chunk, scores + self.bias(first) if plan.has_bias else scores)

        @pl.when(jnp.logical_not(full))
        def _():
            found = scores
            if plan.has_bias:
                slot = self.start(chunk)
                bias = self.bias(self.last - slot)
                if plan.settings.ring:
                    place = slot + jax.lax.broadcasted_iota(jnp.int32, (1, plan.chunk), 1)
                    older = self.bias(self.last - slot + plan.real_slots)
                    bias = jnp.where(place <= self.last, bias, older)
                found = scores + bias
            self.keep(chunk, jnp.where(self.visible(chunk), found, MASKED))

    def keep(self, chunk: Scalar, scores: Array) -> None:
        """Stores scores; lanes have sums of their own, so that none waits for others."""
        refs = self.refs
        refs.scores[chunk] = scores
        parts = _lanes(scores)
        highest = functools.reduce(jnp.maximum, parts)
        refs.highest[chunk] = highest
        old = refs.maximum[...]
        new = jnp.maximum(old, highest)
        total = refs.total[...] * jnp.exp2(old - new)
        refs.total[...] = total + sum(jnp.exp2(part - new) for part in parts)
        refs.maximum[...] = new

    def mark_live(self, lse: Array) -> None:
        """Lists the chunks with a weight above 0."""
        refs, order = self.refs, self.refs.order.at[0, 0, 0]
        count = order[0]
        threshold = refs.threshold[0, 0]
        refs.live[0] = 0

        @pl.loop(0, pl.cdiv(count, _MARKS))
        def _(turn):
            found = []
            for n in range(_MARKS):
                at = turn * _MARKS + n
                chunk = order[jnp.minimum(at, self.plan.chunks - 1) + 1]
                # What is no number is not below anything.
                dead = jnp.exp2(refs.highest[chunk] - lse) <= threshold
                some = jnp.max(jnp.where(dead, 0, 1))
                found.append((chunk, jnp.where(at < count, some, 0)))
            number = refs.live[0]
            for chunk, some in found:
                refs.live[jnp.minimum(number, self.plan.chunks - 1) + 1] = chunk
                number += some
            refs.live[0] = number

    def add_values(self, lse: Array, chunk: Scalar, values: Array) -> None:
        """Adds the weighted values of a chunk."""
        plan, refs = self.plan, self.refs
        weights = jnp.exp2(refs.scores[chunk] - lse)
        if plan.has_offset:
            weights = weights - refs.threshold[0, 0]
            weights = jnp.where(weights <= 0, 0.0, weights)
        dtype = refs.query.dtype

        def add(weights: Array, values: Array) -> None:
            if plan.settings.renormalize:
                refs.weight[...] += sum(_lanes(weights))
            if plan.quantized:
                weights = self.scaled(weights, refs.value_scales, chunk, 1.0)
            refs.sum[...] += dot(weights.astype(dtype), values, LAST_LAST)

        full, _ = self.in_full(chunk)
        pl.when(full)(lambda: add(weights, _as(values, dtype)))

        @pl.when(jnp.logical_not(full))
        def add_in_part():
            # What no query sees may be no number.
            back, seen = self.backs(chunk)
            if plan.settings.window is not None:
                seen &= back - (plan.new - 1) < plan.settings.window
            wide = jnp.where(seen, values.astype(jnp.float32), 0.0)
            add(jnp.where(self.visible(chunk), weights, 0.0), wide.astype(dtype))


def _as(x: Array, dtype: jnp.dtype) -> Array:
    """Returns keys or values in the queries' dtype."""
    return x if x.dtype == dtype else x.astype(jnp.float32).astype(dtype)


def _lanes(x: Array) -> list[Array]:
    """Returns the vectors of a tile's rows, [rows, LANES] each."""
    return [x[:, at : at + LANES] for at in range(0, x.shape[1], LANES)]
