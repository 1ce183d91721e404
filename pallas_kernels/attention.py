"""Lazy Attention, differentiable: the one op, whatever backend computes it.

It pads, batches, and plans; a backend computes. A backend is a module with

    plan(problem, inputs) -> plan
        a `Problem` with what else is static: blocks, memory.
    table(plan, distance_bias, distance_slope, length) -> table
        the bias in the form of its kernels.
    ranges(plan, inputs, table, training=...) -> ranges
        which tiles are visited, from `visit.py`.
    forward(plan, inputs, table, ranges, training=...) -> out, residuals
    backward(plan, inputs, table, ranges, residuals, d_out, groups) -> gradients

and `PLAIN_JAX`: whether JAX itself can batch it. If not, numbers have at most 32 bits, vmap
makes the mapped axis a part of the batch, and all results are led by the batch axis.

Source: docs/lazy_attention.md, sections "Definition" and "Gradients".
"""

import dataclasses
import functools
import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PyTree

from pallas_kernels import placement
from pallas_kernels.batching import Run, over_batch
from pallas_kernels.own_settings import own_settings
from pallas_kernels.problem import Gradients, Inputs, Problem
from pallas_kernels.varying import vary_alike

# What the forward pass hands to the backward pass besides its arguments has this name, for
# policies of `jax.checkpoint`: where it is kept, no kernel runs twice.
KEPT = "lazy_attention"

_MODULES = {
    "mosaic_gpu": "pallas_kernels.mosaic_gpu.backend",
    "tpu": "pallas_kernels.tpu.backend",
    "triton": "pallas_kernels.triton.backend",
    "xla_chunked": "pallas_kernels.chunked.backend",
}


def backend(name: str) -> ModuleType:
    """Returns the module of that name; Pallas and Triton take a second to import."""
    return importlib.import_module(_MODULES[name])


def attention(
    name: str,
    problem: Problem,
    inputs: Inputs,
    *,
    chunk_starts: list[Int[Array, ""]] | None = None,
    renormalize: bool = False,
) -> Float[Array, "batch length heads value_dim"]:
    """Returns Lazy Attention's output.

    Args:
      name: of the backend.
      problem: what is static.
      inputs: the arrays.
      chunk_starts: the queries are so many equal chunks; for each the index of its first key.
        None: query i stands at key i.
      renormalize: divide the weights of a row by their sum, where it isn't 0. Only where the
        values' head size may differ from the keys'.

    Raises:
      ValueError: if a launch would not fit into a TPU's memories.
    """
    if renormalize:
        return _renormalized(name, problem, inputs, chunk_starts)
    if chunk_starts is None:
        return _square(name, problem, inputs)
    if backend(name).PLAIN_JAX:
        parts = placement.split(inputs, len(chunk_starts))
        outs = [
            _square(name, problem, backend(name).place(part, start))
            for part, start in zip(parts, chunk_starts, strict=True)
        ]
        return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)
    out = _square(name, problem, placement.fill(inputs, chunk_starts))
    return placement.take(out, inputs.query.shape[1], chunk_starts)


def _renormalized(
    name: str, problem: Problem, inputs: Inputs, chunk_starts: list[Int[Array, ""]] | None
) -> Float[Array, "batch length heads value_dim"]:
    # A column of ones makes the sum of each row's weights an output like others. Weights
    # may be small: float16 has no small numbers, and half precision few digits.
    dtype = jnp.promote_types(inputs.query.dtype, jnp.float32)
    value = inputs.value
    value = value.astype(dtype) if value.dtype == jnp.float16 else value
    value = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1)
    problem = dataclasses.replace(problem, out_dtype=str(dtype))
    inputs = dataclasses.replace(inputs, value=value)
    out = attention(name, problem, inputs, chunk_starts=chunk_starts)
    total = out[..., -1:]
    return (out[..., :-1] / jnp.where(total > 0, total, 1)).astype(inputs.query.dtype)


def _square(
    name: str, problem: Problem, inputs: Inputs
) -> Float[Array, "batch length heads value_dim"]:
    """Returns the output of queries that stand at the last keys, at all as a rule."""
    plain = backend(name).PLAIN_JAX
    with own_settings(narrow=not plain):
        leaves, tree = jax.tree.flatten(inputs)
        inputs = jax.tree.unflatten(tree, vary_alike(*leaves))
        plan = backend(name).plan(problem, inputs)
        _, length, _, value_dim = inputs.query.shape[:3] + inputs.value.shape[3:]
        rows, columns = plan.padding
        run = _attention if plain else _shared_attention
        out = run(name, plan, _pad(inputs, rows, columns))
        return out[:, :length, :, :value_dim] if rows or columns else out


def _pad(inputs: Inputs, rows: int, columns: int) -> Inputs:
    """Pads every row, and the head size. Padding keys are seen by padding queries alone."""
    if not rows and not columns:
        return inputs

    def pad(name: str, x: Array) -> Array:
        widths = [(0, 0), (0, rows), (0, 0), (0, columns)][: x.ndim]
        return jnp.pad(x, widths, mode="constant" if x.ndim == 4 else "edge")

    padded = {name: pad(name, x) for name, x in inputs.rows.items()}
    return dataclasses.replace(inputs, **padded)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    name: str, plan: Problem, inputs: Inputs
) -> Float[Array, "batch length heads value_dim"]:
    return _forward(name, plan, inputs, training=False)[0]


def _attention_fwd(name: str, plan: Problem, inputs: Inputs) -> tuple[Array, PyTree]:
    out, *saved = checkpoint_name(_forward(name, plan, inputs, training=True), KEPT)
    return out, (inputs, *saved)


def _attention_bwd(name: str, plan: Problem, saved: PyTree, d_out: Array) -> tuple[Inputs]:
    inputs, table, ranges, residuals = saved

    def run(groups: int, rows: PyTree, shared: PyTree) -> Gradients:
        arrays, ranges, residuals, d_out = rows
        parameters, table = shared
        inputs = Inputs(**arrays, **parameters)
        return backend(name).backward(plan, inputs, table, ranges, residuals, d_out, groups)

    with own_settings(narrow=not backend(name).PLAIN_JAX):
        rows = inputs.rows, ranges, residuals, d_out
        gradients = _batched(name, run, rows, (inputs.parameters, table))
        of_rows = {n: getattr(gradients, n) for n in ("query", "key", "value")}
        of_parameters = {n: getattr(gradients, n) for n in inputs.parameters}
        summed = jax.tree.map(lambda x: x.sum(axis=0), of_parameters)
    nothing: Any = None
    return (Inputs(**of_rows, **summed, segment_start=nothing, offset_scale=nothing),)


_attention.defvjp(_attention_fwd, _attention_bwd)

# Layers that call it alike share one lowering of its kernels.
_shared_attention = jax.jit(_attention, static_argnums=(0, 1))


def _forward(
    name: str, plan: Problem, inputs: Inputs, *, training: bool
) -> tuple[Array, PyTree, PyTree, PyTree]:
    """Returns the output, and what the backward pass wants: table, ranges, residuals."""
    length = inputs.key.shape[1]

    def make_table(groups: int, rows: PyTree, shared: PyTree) -> PyTree:
        del groups, rows
        return backend(name).table(plan, *shared, length)

    def run(groups: int, rows: PyTree, shared: PyTree) -> PyTree:
        del groups
        parameters, table = shared
        inputs = Inputs(**rows, **parameters)
        ranges = backend(name).ranges(plan, inputs, table, training=training)
        out, residuals = backend(name).forward(plan, inputs, table, ranges, training=training)
        return out, ranges, residuals

    with own_settings(narrow=not backend(name).PLAIN_JAX):
        bias = inputs.distance_bias, inputs.distance_slope
        table = _batched(name, make_table, (), bias)
        out, ranges, residuals = _batched(name, run, inputs.rows, (inputs.parameters, table))
    return out, table, ranges, residuals


def _batched(name: str, run: Run, rows: PyTree, shared: PyTree) -> PyTree:
    if backend(name).PLAIN_JAX:
        return run(1, rows, shared)
    return over_batch(run, rows, shared)
