"""Lazy Attention on NVIDIA GPUs, differentiable: four kernels and what joins them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import bias as bias_lib
from pallas_kernels.batching import over_batch
from pallas_kernels.gpu import compute_capability
from pallas_kernels.own_settings import traced_by_own_settings
from pallas_kernels.triton import config
from pallas_kernels.triton.backward import backward_key, backward_query
from pallas_kernels.triton.bias_gradient import backward_bias
from pallas_kernels.triton.forward import forward
from pallas_kernels.triton.plan import Plan
from pallas_kernels.types import AttentionSettings, Visibility
from pallas_kernels.varying import vary_alike
from pallas_kernels.visit import VisitRanges, visit_ranges

# For measurements: False computes every visited tile in full. Read when a call is traced.
skip_dead_tiles = True


@traced_by_own_settings(narrow=True)
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
      query: rotated queries, bfloat16, float16 or float32.
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
    plan = make_plan(query, distance_bias, distance_slope, offset, settings, packed=packed)
    leaves, tree = jax.tree.flatten(
        (query, key, value, distance_bias, distance_slope, offset, visibility)
    )
    return _jitted_attention(*jax.tree.unflatten(tree, vary_alike(*leaves)), plan)


def make_plan(
    query: Array,
    distance_bias: Array | None,
    distance_slope: Array | None,
    offset: Array | None,
    settings: AttentionSettings,
    *,
    packed: bool,
) -> Plan:
    """Returns what is known when `attention` is traced; arguments as there."""
    capability = compute_capability()
    assert capability is not None
    length, head_dim = query.shape[1], query.shape[3]
    return Plan(
        scale=settings.scale,
        skip_mass=settings.skip_mass,
        skip_dead=skip_dead_tiles,
        packed=packed,
        width=0 if distance_bias is None else min(distance_bias.shape[1], length),
        has_slope=distance_slope is not None,
        has_offset=offset is not None,
        capability=capability,
        blocks=config.blocks(capability, query.dtype.itemsize, head_dim),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
@traced_by_own_settings(narrow=True)
def _attention(
    query, key, value, distance_bias, distance_slope, offset, visibility, plan
) -> Float[Array, "batch length heads head_dim"]:
    inputs = Kernels(query, key, value, distance_bias, distance_slope, offset, visibility, plan)
    ranges = inputs.visit_ranges(plan.blocks.inference)
    return inputs.forward(ranges, training=False)[0]


@traced_by_own_settings(narrow=True)
def _attention_fwd(
    query, key, value, distance_bias, distance_slope, offset, visibility, plan
) -> tuple[Array, Any]:
    inputs = Kernels(query, key, value, distance_bias, distance_slope, offset, visibility, plan)
    first = inputs.visit_ranges(plan.blocks.forward)
    out, value_mean, rounding, log_total, live = inputs.forward(first, training=True)
    if not plan.has_offset:
        live = first
    # Where a scan stacks residuals, XLA would run the kernel twice: once into the stack.
    found = jax.lax.optimization_barrier((out, value_mean, rounding, log_total, live))
    out, value_mean, rounding, log_total, live = found
    saved = (query, key, value, distance_bias, distance_slope, offset, visibility)
    return out, (saved, (first, live, log_total, out, value_mean, rounding))


@traced_by_own_settings(narrow=True)
def _attention_bwd(plan: Plan, residuals: Any, d_out: Array) -> tuple[Any, ...]:
    saved, (first, live, log_total, *outputs) = residuals
    inputs = Kernels(*(*saved, plan))
    d_query, delta, threshold, d_offset, far = inputs.backward_query(
        first, live, log_total, *outputs, d_out
    )
    row_facts = (first, live, log_total, delta, threshold)
    d_key, d_value = inputs.backward_key(*row_facts, d_out)
    d_bias = d_slope = None
    distance_bias, distance_slope = inputs.distance_bias, inputs.distance_slope
    if distance_bias is not None:
        near = inputs.backward_bias(*row_facts, d_out).sum(axis=0)

        def expand(distance_bias, distance_slope):
            return bias_lib.expand(distance_bias, distance_slope, near.shape[1])

        width = distance_bias.shape[1]
        _, vjp = jax.vjp(expand, distance_bias, distance_slope)
        d_bias, d_slope = vjp(near[:, : expand(distance_bias, distance_slope).shape[1]])
        if distance_slope is not None:
            far = far.sum(axis=(0, 2))
            d_bias = d_bias.at[:, width - 1].add(far[:, 0])
            d_slope = d_slope - far[:, 1]
    return (
        d_query,
        d_key,
        d_value,
        d_bias,
        d_slope,
        None if inputs.offset is None else d_offset.sum(axis=(0, 2)),
        None,
    )


_attention.defvjp(_attention_fwd, _attention_bwd)

# Layers that call it alike share one lowering of its kernels.
_jitted_attention = jax.jit(_attention, static_argnums=7)


class Kernels:
    """A call's arrays, and the launches that read them."""

    def __init__(
        self, query, key, value, distance_bias, distance_slope, offset, visibility, plan: Plan
    ):
        self.query, self.key, self.value = query, key, value
        self.distance_bias, self.distance_slope, self.offset = distance_bias, distance_slope, offset
        self.visibility, self.plan = visibility, plan
        self.table, self.slope = plan.table(distance_bias, distance_slope)
        nothing = jnp.zeros(1, jnp.float32)
        self.tau = nothing if offset is None else offset
        self.offset_scale = nothing if offset is None else visibility.offset_scale
        self.document = visibility.first if plan.packed else nothing.astype(jnp.int32)

    def visit_ranges(self, block: config.Block) -> Int[Array, "batch heads query_tiles"]:
        """Returns the first key tile that each query tile visits."""
        length = self.query.shape[1]
        bias = None
        if self.distance_bias is not None:
            bias = bias_lib.expand(self.distance_bias, self.distance_slope, length)
        ranges: VisitRanges = visit_ranges(
            self.query,
            self.key,
            bias,
            self.offset,
            self.visibility.first,
            scale=self.plan.scale,
            skip_mass=self.plan.skip_mass,
            tiles=block.tiles,
        )
        return ranges.first

    def _launch(self, run, *arrays: Array | None, thresholds: bool, slope: bool = True) -> Any:
        # The kernels take what they need of these first, in this order.
        operands = [
            (self.query, False),
            (self.key, False),
            (self.value, False),
            (self.table, True),
            *([(self.slope, True)] if slope else []),
            *([(self.tau, True)] if thresholds else []),
            *([(self.offset_scale, self.offset is None)] if thresholds else []),
            (self.document, not self.plan.packed),
            *((array, False) for array in arrays),
        ]
        arrays, parameters = zip(*operands, strict=True)
        return over_batch(run, parameters)(*arrays)

    def forward(self, first: Array, *, training: bool) -> Any:
        """Launches the forward pass."""
        run = functools.partial(forward, self.plan, training)
        return self._launch(run, first, thresholds=True)

    def backward_query(self, *arrays: Array) -> Any:
        """Launches the kernel for dQ."""
        run = functools.partial(backward_query, self.plan)
        return self._launch(run, *arrays, thresholds=True)

    def backward_key(self, *arrays: Array) -> Any:
        """Launches the kernel for dK and dV."""
        run = functools.partial(backward_key, self.plan)
        return self._launch(run, *arrays, thresholds=False)

    def backward_bias(self, *arrays: Array) -> Any:
        """Launches the kernel for the gradient of the bias table."""
        run = functools.partial(backward_bias, self.plan)
        return self._launch(run, *arrays, thresholds=False, slope=False)
