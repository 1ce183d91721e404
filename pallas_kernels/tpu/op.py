"""Lazy Attention on TPUs, differentiable: two kernels and what joins them."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.batching import over_batch
from pallas_kernels.own_settings import traced_by_own_settings
from pallas_kernels.tpu import config
from pallas_kernels.tpu.backward import backward
from pallas_kernels.tpu.forward import forward
from pallas_kernels.tpu.plan import Plan
from pallas_kernels.tpu.support import generation
from pallas_kernels.types import AttentionSettings, Visibility
from pallas_kernels.varying import vary_alike
from pallas_kernels.visit import visit_ranges

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
      query: rotated queries, bfloat16 or float32.
      key: rotated keys of the same dtype; `kv_heads` divides `heads`.
      value: values of the same dtype.
      distance_bias: b(x) of distances 0 <= x < width, float32; None: no bias.
      distance_slope: of its tail, float32; None: b is 0 past the table.
      offset: tau of each head, float32; None: ordinary softmax.
      visibility: what each query sees.
      settings: scale and skip_mass.
      packed: whether some query does not see the first key of its row.

    Raises:
      ValueError: if a launch would not fit into the TPU's memories.

    Source: docs/lazy_attention.md, sections "Definition" and "Gradients".
    """
    plan = make_plan(query, key, distance_bias, offset, settings, packed=packed)
    bias = None
    if distance_bias is not None:
        bias = plan.expand_bias(distance_bias, distance_slope)
    leaves, tree = jax.tree.flatten((query, key, value, bias, offset, visibility))
    return _attention(*jax.tree.unflatten(tree, vary_alike(*leaves)), plan)


def make_plan(
    query: Array,
    key: Array,
    distance_bias: Array | None,
    offset: Array | None,
    settings: AttentionSettings,
    *,
    packed: bool,
) -> Plan:
    """Returns what is known when `attention` is traced; arguments as there."""
    tpu = generation()
    assert tpu is not None
    _, length, heads, head_dim = query.shape
    itemsize = query.dtype.itemsize
    block = config.block(tpu, itemsize, head_dim, length)
    padded = -(-length // block.queries) * block.queries

    dim = config.padded_head_dim(head_dim)
    turned, forward_chunks, backward_chunks = config.layout(tpu, block, padded, dim, itemsize)
    return Plan(
        scale=settings.scale,
        skip_mass=settings.skip_mass,
        skip_dead=skip_dead_tiles,
        packed=packed,
        has_bias=distance_bias is not None,
        has_offset=offset is not None,
        heads=heads,
        group=heads // key.shape[2],
        length=length,
        head_dim=head_dim,
        itemsize=itemsize,
        block=block,
        strips=config.strips(turned, block.queries),
        query_first=tpu in config.QUERY_FIRST,
        turned=turned,
        tiles_a_step=config.tiles_a_step(tpu, block, padded, dim, itemsize),
        forward_chunks=forward_chunks,
        backward_chunks=backward_chunks,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
@traced_by_own_settings(narrow=True)
def _attention(
    query, key, value, bias, offset, visibility, plan
) -> Float[Array, "batch length heads head_dim"]:
    inputs = Kernels(query, key, value, bias, offset, visibility, plan)
    return plan.from_kernel(inputs.forward(inputs.visit_ranges(), training=False)[0])


@traced_by_own_settings(narrow=True)
def _attention_fwd(query, key, value, bias, offset, visibility, plan) -> tuple[Array, Any]:
    inputs = Kernels(query, key, value, bias, offset, visibility, plan)
    first = inputs.visit_ranges()
    out, mean, rounding, log_sum, live = inputs.forward(first, training=True)
    out = plan.from_kernel(out)
    saved = (query, key, value, bias, offset, visibility)
    return out, (saved, (first, live, log_sum), out, (mean, rounding))


@traced_by_own_settings(narrow=True)
def _attention_bwd(plan: Plan, residuals: Any, d_out: Array) -> tuple[Any, ...]:
    saved, (first, live, log_sum), out, (mean, rounding) = residuals
    inputs = Kernels(*(*saved, plan))
    d_query, d_key, d_value, d_bias, pull = inputs.backward(
        first, live, log_sum, plan.to_kernel(out), mean, rounding, plan.to_kernel(d_out)
    )

    def from_keys(x: Array, like: Array) -> Array:
        return plan.from_kernel(x.swapaxes(2, 3)).astype(like.dtype)

    bias, offset = inputs.bias, inputs.offset
    return (
        plan.from_kernel(d_query).astype(inputs.query.dtype),
        from_keys(plan.scale * d_key, inputs.key),
        from_keys(d_value, inputs.value),
        None if bias is None else plan.bias_gradient(d_bias.sum(axis=0)),
        None if offset is None else pull.sum(axis=(0, 2, 3)),
        None,
    )


_attention.defvjp(_attention_fwd, _attention_bwd)


class Kernels:
    """A call's arrays, and the launches that read them."""

    def __init__(self, query, key, value, bias, offset, visibility, plan: Plan):
        self.query, self.key, self.value = query, key, value
        self.bias, self.offset = bias, offset
        self.visibility, self.plan = visibility, plan

    def visit_ranges(self) -> Int[Array, "batch heads query_tiles"]:
        """Returns the first key tile that each query tile visits."""
        plan = self.plan
        return visit_ranges(
            self.query,
            self.key,
            None if self.bias is None else self.bias[:, : plan.length],
            self.offset,
            self.visibility.first,
            scale=plan.scale,
            skip_mass=plan.skip_mass,
            tiles=plan.block.tiles,
        ).first

    def _launch(self, run, keys: Sequence[Array], *arrays: Array) -> Any:
        plan = self.plan
        nothing = jnp.zeros(1, jnp.float32)
        has_bias, has_offset = plan.has_bias, plan.has_offset
        operands = [
            (plan.to_kernel(self.query), False),
            *((array, False) for array in keys),
            (plan.bias(self.bias) if has_bias else nothing, True),
            (self.offset if has_offset else nothing, True),
            (plan.rows(self.visibility.offset_scale) if has_offset else nothing, not has_offset),
            (
                plan.rows(self.visibility.first, mode="edge") if plan.packed else nothing,
                not plan.packed,
            ),
            *((array, False) for array in arrays),
        ]
        every, parameters = zip(*operands, strict=True)
        return over_batch(run, parameters)(*every)

    def forward(self, first: Array, *, training: bool) -> Any:
        """Launches the forward pass."""
        plan = self.plan
        keys = plan.to_kernel_rows(self.key), plan.to_kernel(self.value)
        return self._launch(functools.partial(forward, plan, training), keys, first)

    def backward(self, first, live, log_sum, out, mean, rounding, d_out) -> Any:
        """Launches the backward pass."""
        plan = self.plan
        rows = plan.to_kernel_rows(self.key), plan.to_kernel_rows(self.value)
        keys = (*rows, plan.to_kernel(self.key))
        run = functools.partial(backward, plan)
        return self._launch(run, keys, first, live, log_sum, out, mean, rounding, d_out)
