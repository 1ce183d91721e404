"""Layers that call the op alike share its kernels."""

import re

import jax
import jax.numpy as jnp

from lazyattn import lazy_attention
from pallas_kernels import gpu


def test_layers_that_call_alike_share_one_lowering():
    shape = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((2, 64), jnp.float32)

    def three_layers(query, table):
        x = query
        for _ in range(3):
            x = lazy_attention(x, x, x, distance_bias=table, implementation="mosaic_gpu")
        return x

    with gpu.pretend_capability(90):
        lowered = jax.jit(three_layers).trace(shape, table).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 1


def test_a_kernel_is_the_same_whatever_was_lowered_before():
    shape = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)

    def hashes():
        jax.clear_caches()

        def once(query):
            return lazy_attention(query, query, query, implementation="mosaic_gpu")

        with gpu.pretend_capability(90):
            lowered = jax.jit(once).trace(shape).lower(lowering_platforms=("cuda",))
        return re.findall(r'kernel_hash = "[^"]*"', lowered.as_text())

    first = hashes()
    assert len(first) == 1 and hashes() == first
