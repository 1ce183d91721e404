"""Runs Triton kernels on the CPU, through Triton's interpreter, inside jax.jit.

Import this before anything imports triton: kernels are interpreted only if the
environment says so when they, and Triton's own helpers, are defined.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

import triton.experimental.gluon
import triton.language as tl
from triton.runtime import interpreter

from pallas_kernels import problem, target
from pallas_kernels.decode import triton as decode
from pallas_kernels.decode import triton_append
from pallas_kernels.mosaic_gpu.planning import gradients, key_ranges, order, table, visits
from pallas_kernels.rotary import kernels
from pallas_kernels.triton import backend, config

# All that reads it is imported by now; the processes that other tests start need not.
assert triton.experimental.gluon and backend and decode and triton_append
assert kernels
assert gradients and key_ranges and order and table and visits
del os.environ["TRITON_INTERPRET"]

_NAMES = {
    "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32", "int8": "i8",
}  # fmt: skip


class _Pointer:
    """An array as the interpreter wants it: a few methods of torch.Tensor, no copies."""

    def __init__(self, array: np.ndarray):
        assert array.flags.c_contiguous
        self.array = array
        self.dtype = _NAMES[array.dtype.name]
        self.shape = array.shape

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, *args, **kwargs):
        return self

    def set_(self, *args):
        return self

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def copy_(self, other):
        return self

    def element_size(self):
        return self.array.itemsize


def _convert(values, source, target, rounding, _convert=interpreter._convert_float):
    """Conversion between float types; the interpreter's own cuts off to bfloat16."""
    if target == tl.bfloat16 and source == tl.float32:
        return values.view(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    if source == tl.bfloat16 and target == tl.float32:
        return values.view(ml_dtypes.bfloat16).astype(np.float32).view(np.uint32)
    return _convert(values, source, target, rounding)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """tl.dot; the interpreter's own multiplies the bits of bfloat16 as integers."""

    def widen(x):
        if x.dtype.scalar == tl.bfloat16:
            return x.data.view(ml_dtypes.bfloat16).astype(np.float32)
        return x.data.astype(np.float32)

    return interpreter.TensorHandle(np.matmul(widen(a), widen(b)) + d.data, d.dtype.scalar)


def _call_nested(self, *args, _patch=interpreter._patch_lang, _seen=set(), **kwargs):  # noqa: B006
    """A call of one kernel function by another; Triton patches the language every time."""
    if id(self.fn.__globals__) not in _seen:
        _seen.add(id(self.fn.__globals__))
        _patch(self.fn)
    return self.rewrite()(*args, **kwargs)


def _launch(kernel, arrays, outputs, grid, block, static, in_place=()):
    """What `pallas_kernels.triton.call.launch` does, on the CPU."""

    def on_host(*arrays):
        # As on a GPU, outputs start as anything at all.
        results = [
            np.full(x.shape, 0x55 if np.issubdtype(x.dtype, np.integer) else np.nan, x.dtype)
            for x in outputs
        ]
        arrays = [
            np.array(x) if n in in_place else np.ascontiguousarray(x) for n, x in enumerate(arrays)
        ]
        kernel[grid](*map(_Pointer, arrays), *map(_Pointer, results), static)
        return [*results, *(arrays[n] for n in in_place)]

    written = [jax.ShapeDtypeStruct(arrays[n].shape, arrays[n].dtype) for n in in_place]
    return jax.pure_callback(on_host, [*outputs, *written], *arrays, vmap_method="sequential")


@contextlib.contextmanager
def interpreted(blocks: config.Blocks) -> Iterator[None]:
    """Makes `implementation="triton"` run here, with these block sizes."""
    saved: list[tuple[Any, str, Any]] = [
        (owner, name, getattr(owner, name))
        for owner, name in (
            (config, "blocks"),
            (interpreter, "_convert_float"),
            (interpreter.interpreter_builder, "options"),
            (interpreter.InterpreterBuilder, "create_dot"),
            (interpreter.InterpretedFunction, "__call__"),
        )
    ]
    config.blocks = lambda *_: blocks
    interpreter._convert_float = _convert
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter.InterpretedFunction.__call__ = _call_nested
    try:
        with target.compile_for("sm90"), problem.options(launch_triton=_launch):
            yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)


def blocks(queries: int, keys: int, backward: tuple[int, int] | None = None) -> config.Blocks:
    """Returns blocks of one size in the forward and one in the backward pass."""
    forward = config.Block(queries, keys, 4, 1)
    back = config.Block(*(backward or (queries, keys)), 4, 1)
    return config.Blocks(forward, forward, back, back, back)
