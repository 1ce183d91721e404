"""Lazy Attention on Hopper GPUs, differentiable: four kernels and what joins them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.batching import over_batch
from pallas_kernels.mosaic_gpu import backward_bias as bias_kernel
from pallas_kernels.mosaic_gpu import config, row_facts
from pallas_kernels.mosaic_gpu.backward_key import backward_key
from pallas_kernels.mosaic_gpu.backward_query import backward_query
from pallas_kernels.mosaic_gpu.forward import forward
from pallas_kernels.mosaic_gpu.plan import UNIT, Plan
from pallas_kernels.mosaic_gpu.planning import by_triton, by_xla
from pallas_kernels.mosaic_gpu.planning.by_xla import KeyRanges, Table, Visits
from pallas_kernels.mosaic_gpu.row_facts import Residuals
from pallas_kernels.types import AttentionSettings, Visibility
from pallas_kernels.varying import vary_alike

# For measurements: False computes every visited tile in full. Read when a call is traced.
skip_dead_tiles = True

# Tests on a CPU put parameters of Pallas's interpret mode here. Read when a call is traced.
interpret: Any = None


def attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    distance_bias: Float[Array, "heads width"] | None,
    distance_slope: Float[Array, " heads"] | None,
    offset: Float[Array, " heads"] | None,
    visibility: Visibility,
    settings: AttentionSettings,
    *,
    packed: bool,
) -> Float[Array, "batch length heads head_dim"]:
    """Returns Lazy Attention's output.

    Args:
      query: rotated queries, bfloat16 or float16.
      key: rotated keys of the same dtype; `kv_heads` divides `heads`.
      value: values of the same dtype.
      distance_bias: b(x) of distances 0 <= x < width, float32; None: no bias.
      distance_slope: of its tail, float32; None: b is 0 past the table.
      offset: tau of each head, float32; None: ordinary softmax.
      visibility: what each query sees.
      settings: scale and skip_mass.
      packed: whether some query does not see the first key of its row.

    Source: docs/lazy_attention.md, sections "Definition" and "Gradients".
    """
    length, head_dim = query.shape[1], query.shape[3]
    padded_dim = config.padded_head_dim(head_dim)
    width = 0 if distance_bias is None else min(distance_bias.shape[1], length)
    plan = Plan(
        scale=settings.scale,
        skip_mass=settings.skip_mass,
        skip_dead=skip_dead_tiles,
        packed=packed,
        width=width,
        has_slope=distance_slope is not None,
        has_offset=offset is not None,
        blocks=config.blocks(padded_dim),
        interpret=interpret,
        by_triton=interpret is None and by_triton.available(),
    )
    # TMA clips what lies past the end, but wants whole groups of 8 rows; interpret mode
    # wants whole tiles. A padding key is seen by padding queries alone.
    missing = -length % (8 if interpret is None else 128)
    query, key, value = (_pad(x, missing, padded_dim - head_dim) for x in (query, key, value))
    if missing:
        visibility = jax.tree.map(lambda x: _pad_rows(x, missing, mode="edge"), visibility)
    leaves, tree = jax.tree.flatten(
        (query, key, value, distance_bias, distance_slope, offset, visibility)
    )
    leaves = vary_alike(*leaves)
    whole = interpret is not None or bool(jax.typeof(leaves[0]).manual_axis_type.varying)
    plan = dataclasses.replace(plan, fetch_by_warpgroup=whole)
    out = _attention(*jax.tree.unflatten(tree, leaves), plan)
    return out[:, :length, :, :head_dim]


def _pad(x: Float[Array, "batch length n dim"], rows: int, columns: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, columns))) if rows or columns else x


def _pad_rows(x: Float[Array, "batch length *axes"], missing: int, **how: Any) -> Array:
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), **how)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attention(
    query, key, value, distance_bias, distance_slope, offset, visibility, plan
) -> Float[Array, "batch length heads head_dim"]:
    inputs = (query, key, value, distance_bias, distance_slope, offset, visibility)
    call = Kernels(*inputs, plan)
    return call.forward(call.visits(), training=False)[0]


def _attention_fwd(
    query, key, value, distance_bias, distance_slope, offset, visibility, plan
) -> tuple[Array, Any]:
    inputs = (query, key, value, distance_bias, distance_slope, offset, visibility)
    call = Kernels(*inputs, plan)
    visits = call.visits()
    out, mean, rounding, log_total, live = call.forward(visits, training=True)
    live = visits.first if live is None else live
    found = Residuals(out, rounding, mean, log_total)
    return out, (inputs, call.table, visits.first, live, found)


def _attention_bwd(plan: Plan, residuals: Any, d_out: Array) -> tuple[Any, ...]:
    inputs, table, first, live, found = residuals
    call = Kernels(*inputs, plan, table)
    d_query, rows, of_mean, far = call.backward_query(found, first, live, d_out)
    ranges = call.key_ranges(first, live)
    d_key, d_value = call.backward_key(rows, ranges, d_out)
    sums = None if plan.width == 0 else call.backward_bias(rows, ranges, d_out)
    of_parameters = call.gradients(of_mean, sums, far)
    return d_query, d_key, d_value, *of_parameters, None


_attention.defvjp(_attention_fwd, _attention_bwd)


class Kernels:
    """A call's arrays, and the launches that read them."""

    def __init__(
        self,
        query,
        key,
        value,
        distance_bias,
        distance_slope,
        offset,
        visibility,
        plan: Plan,
        table: Table | None = None,
    ):
        self.query, self.key, self.value = query, key, value
        self.distance_bias, self.distance_slope, self.offset = distance_bias, distance_slope, offset
        self.plan = plan
        self.planning: Any = by_triton if plan.by_triton else by_xla
        _, self.length, self.heads, _ = query.shape
        self.units = -(-self.length // UNIT)
        self.table = table or self._table()
        self.tau = jnp.zeros(self.heads, jnp.float32) if offset is None else offset
        missing = self.units * UNIT - self.length
        # A row of padding sees what the last row sees.
        self.document, self.offset_scale = (
            _pad_rows(x, missing, mode="edge") if missing else x
            for x in (visibility.first, visibility.offset_scale)
        )
        position = jnp.arange(self.units * UNIT, dtype=jnp.int32)
        self.count_inverse = 1.0 / (position - self.document + 1).astype(jnp.float32)
        self.first_visible = visibility.first
        self.distances = bias_kernel.distances(plan, self.units) if plan.width else 0

    def _table(self) -> Table:
        """Returns the bias in the kernels' form."""
        parameters = [x for x in (self.distance_bias, self.distance_slope) if x is not None]

        def run(groups: int, *parameters: Array) -> Any:
            del groups
            given = (*parameters, None, None)[:2]
            found = self.planning.table(self.plan, *given, self.heads, self.length)
            return tuple(x for x in found if x is not None)

        found = _batched(run, *((x, True) for x in parameters)) if parameters else run(0)
        return Table(*(*found, None)[:4])

    def visits(self) -> Visits:
        """Returns which tiles are visited, and whether scores are small."""
        parameters = {
            "distance_bias": self.distance_bias,
            "distance_slope": self.distance_slope,
            "offset": self.offset,
            "maxima": self.table.maxima,
        }
        given = {name: x for name, x in parameters.items() if x is not None}

        def run(groups: int, *arrays: Array) -> Any:
            del groups
            found = dict.fromkeys(parameters) | dict(zip(given, arrays[3:], strict=True))
            return self.planning.visits(self.plan, *arrays[:3], **found)

        shared = ((x, True) for x in given.values())
        return _batched(
            run, (self.query, False), (self.key, False), (self.first_visible, False), *shared
        )

    def key_ranges(self, first: Array, live: Array) -> KeyRanges:
        """Returns the ranges of the backward pass."""
        block = self.plan.blocks.backward_bias
        # Distances that only fill up the warpgroups have nothing to do.
        filled = self.distances + -self.distances % block.warpgroups

        def run(groups: int, first: Array, live: Array) -> Any:
            del groups
            parts = bias_kernel.chunks(self.plan, first.shape[0], self.heads, self.units)
            found = self.planning.key_ranges(first, live, self.distances, filled, parts)
            return tuple(x for x in found if x is not None)

        found = _batched(run, (first, False), (live, False))
        return KeyRanges(*found, *((None,) if self.distances == 0 else ()))

    def gradients(
        self, of_mean: Array | None, sums: Array | None, far: Array | None
    ) -> tuple[Array | None, Array | None, Array | None]:
        """Returns the gradients of bias, slope and offset; None for those not given."""
        names = ("of_mean", "sums", "far")
        given = {n: x for n, x in zip(names, (of_mean, sums, far), strict=True) if x is not None}
        if not given:
            return None, None, None

        def run(groups: int, *arrays: Array) -> Any:
            found = self.planning.gradients(
                groups,
                None if self.distance_bias is None else self.distance_bias.shape[1],
                self.distance_slope is not None,
                **(
                    dict.fromkeys(("of_mean", "sums", "far"))
                    | dict(zip(given, arrays, strict=True))
                ),
                length=self.length,
                distances=self.distances,
            )
            return tuple(x for x in found if x is not None)

        found = list(_batched(run, *((x, False) for x in given.values())))
        return tuple(
            None if parameter is None else found.pop(0).sum(axis=0)
            for parameter in (self.distance_bias, self.distance_slope, self.offset)
        )

    def forward(self, visits: Visits, *, training: bool) -> tuple[Any, ...]:
        """Launches the forward pass; returns what `forward.forward` returns."""
        plan, first = self.plan, visits.first

        def run(groups: int, *arrays: Array) -> Any:
            del groups
            # None can't be returned through a batching rule.
            return tuple(x for x in forward(plan, training, *arrays) if x is not None)

        operands = (
            (self.query, False), (self.key, False), (self.value, False), (self.table.falling, True),
            (self.table.tail, True), (self.tau, True), (self.offset_scale, False),
            (self.count_inverse, False), (self.document if plan.packed else first, False),
            (first, False), (visits.small, False),
        )  # fmt: skip
        results = list(_batched(run, *operands))
        out = results.pop(0)
        want_mean = training and plan.has_offset
        mean = results.pop(0) if want_mean else None
        rounding, log_total = (results.pop(0), results.pop(0)) if training else (None, None)
        return out, mean, rounding, log_total, results.pop(0) if want_mean else None

    def backward_query(
        self, residuals: Residuals, first: Array, live: Array, d_out: Array
    ) -> tuple[Array, Array, Array | None, Array | None]:
        """Launches the kernel for dQ; returns what `backward_query.backward_query` does."""
        plan = self.plan
        names = row_facts.names(plan)

        def run(groups: int, *arrays: Array) -> Any:
            del groups
            by_name = dict(zip((*names, "log_total"), arrays[12:], strict=True))
            found = Residuals(
                by_name["out"], by_name["rounding"], by_name.get("mean"), by_name["log_total"]
            )
            query, d_out, key, value, table, tail, *others = arrays[:12]
            results = backward_query(plan, query, d_out, key, value, table, tail, found, *others)
            return tuple(x for x in results if x is not None)

        operands = (
            (self.query, False), (d_out, False), (self.key, False), (self.value, False),
            (self.table.falling, True), (self.table.tail, True), (self.tau, True),
            (self.offset_scale, False), (self.count_inverse, False),
            (self.document if plan.packed else first, False), (first, False), (live, False),
            *((x, False) for x in residuals.tiles.values()), (residuals.log_total, False),
        )  # fmt: skip
        results = list(_batched(run, *operands))
        d_query, rows = results.pop(0), results.pop(0)
        of_mean = results.pop(0) if plan.has_offset else None
        return d_query, rows, of_mean, results.pop(0) if results else None

    def backward_key(self, rows: Array, ranges: KeyRanges, d_out: Array) -> Any:
        """Launches the kernel for dK and dV."""
        plan = self.plan

        def run(groups: int, *arrays: Array) -> Any:
            del groups
            return backward_key(plan, *arrays)

        return _batched(
            run, (self.query, False), (d_out, False), (self.key, False), (self.value, False),
            (self.table.rising, True), (self.table.tail, True), (self.tau, True), (rows, False),
            (ranges.last, False), (ranges.last_live, False),
        )  # fmt: skip

    def backward_bias(
        self, rows: Array, ranges: KeyRanges, d_out: Array
    ) -> Float[Array, "batch parts heads filled 128"]:
        """Launches the kernel for the gradient of the bias, over tiles inside the table."""
        plan = self.plan

        def run(groups: int, *arrays: Array) -> Any:
            del groups
            return bias_kernel.backward_bias(plan, *arrays)

        return _batched(
            run, (self.query, False), (d_out, False), (self.key, False), (self.value, False),
            (self.table.falling, True), (rows, False), (ranges.distances, False),
        )  # fmt: skip


def _batched(run: Any, *operands: tuple[Array, bool]) -> Any:
    """Launches a kernel on arrays, each with whether the batch shares it; see `over_batch`."""
    arrays, parameters = zip(*operands, strict=True)

    def vary(groups: int, *arrays: Array) -> Any:
        results, tree = jax.tree.flatten(run(groups, *arrays))
        return jax.tree.unflatten(tree, vary_alike(*results, like=arrays))

    return over_batch(vary, parameters)(*arrays)
