"""Layers that call the op alike share its kernels."""

import re
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic.gpu import constraints, fragmented_array

from lazyattn import lazy_attention
from pallas_kernels import compile_ahead, target
from pallas_kernels.mosaic_gpu import compile_ahead as of_mosaic
from pallas_kernels.mosaic_gpu import equal_variables, layouts_once

_HASH = re.compile(r'kernel_hash = "[^"]*"')


# What is compiled ahead shows by default that these two hold.
@pytest.mark.slow
def test_layers_that_call_alike_share_one_lowering():
    shape = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((2, 64), jnp.float32)

    def three_layers(query, table):
        x = query
        for _ in range(3):
            x = lazy_attention(x, x, x, distance_bias=table, implementation="mosaic_gpu")
        return x

    with target.compile_for("sm90"):
        lowered = jax.jit(three_layers).trace(shape, table).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 1


@pytest.mark.slow
def test_a_kernel_is_the_same_whatever_was_lowered_before():
    shape = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)

    def hashes():
        jax.clear_caches()

        def once(query):
            return lazy_attention(query, query, query, implementation="mosaic_gpu")

        with target.compile_for("sm90"):
            lowered = jax.jit(once).trace(shape).lower(lowering_platforms=("cuda",))
        return _HASH.findall(lowered.as_text())

    first = hashes()
    assert len(first) == 1 and hashes() == first


@pytest.mark.slow
def test_kernels_are_compiled_ahead_once_each(monkeypatch):
    begun = []
    monkeypatch.setattr(compile_ahead, "_begun", set())
    monkeypatch.setattr(of_mosaic, "_device", lambda ctx: jax.devices()[0])
    monkeypatch.setattr(compile_ahead, "_compile", lambda *program: begun.append(program))
    shape = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    jax.clear_caches()

    def loss(x):
        for _ in range(3):
            x = lazy_attention(x, x, x, implementation="mosaic_gpu")
        return x.astype(jnp.float32).sum()

    def text(function, *arguments):
        traced = jax.jit(function).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    with target.compile_for("sm90"), ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(compile_ahead, "_pool", lambda: pool)
        whole = text(jax.grad(loss), shape)
    # A layer's forward pass and both of its backward kernels, however many layers there are.
    assert len(begun) == len(set(_HASH.findall(whole))) == 3
    for kernel, arguments in begun:
        config = re.search(r"\{kernel_hash = .*?\}", text(kernel, *arguments)).group()
        assert config in whole


def test_equal_variables_are_those_that_jax_finds():
    a, b, c, d, e, f = map(constraints.Variable, "abcdef")
    pairs = [(d, c), (a, b), (f, f), (b, c), (d, a)]
    system = constraints.ConstraintSystem(
        constraints=[*(constraints.Equals(x, y) for x, y in pairs), constraints.Divides(e, (8,))]
    )
    expected = equal_variables.by_jax(system)
    found = equal_variables.equal_variables(system)
    assert {v: set(equal) for v, equal in found.items()} == {
        v: set(equal) for v, equal in expected.items()
    }
    # In an order of the constraints, not of a set.
    assert found[a] == [b, d, c]


def test_layouts_that_are_remembered_are_those_of_jax(monkeypatch):
    tiling, layout = fragmented_array.Tiling, fragmented_array.TiledLayout
    for kind, names in ((tiling, ("canonicalize", "tile_shape")), (layout, ("canonicalize",))):
        for name in names:
            function = getattr(kind, name)
            monkeypatch.setattr(kind, name, getattr(function, "__wrapped__", function))
    long = tiling(((64, 8), (16, 8), (8, 8), (1, 2)))
    whole = layout(long, (-8,), (-4, -3), -1, _check_canonical=False)

    def found():
        return [long.canonicalize(), whole.canonicalize(), long.tile_shape((128, 128))]

    expected = found()
    layouts_once.remember.__wrapped__()
    assert found() == found() == expected
    assert long.tile_shape([128, 128]) == expected[-1]
    with pytest.raises(ValueError, match="does not apply"):
        long.tile_shape((100, 100))
