"""How a tile's keys are dealt out over strips, halves and rows."""

import jax.numpy as jnp
import pytest

from pallas_kernels import target
from pallas_kernels.tpu import backend, config
from pallas_kernels.tpu.buffers import ALONE, HALF, Layout, half_of, strips
from tests.pallas_kernels.problems import problem


def _plan(dtype):
    call = problem(length=4096, heads=1, head_dim=128, dtype=jnp.dtype(dtype).name)
    with target.compile_for("v5p"):
        return backend.plan(call)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("size", [16, HALF])
def test_strips_are_all_keys_of_both_halves_in_turn(dtype, size):
    plan = _plan(dtype)
    parts = strips(plan, size)
    keys = sorted(key for part in parts for key in range(part.start, part.stop))
    assert keys == list(range(plan.keys))
    assert [half_of(part) for part in parts] == [0, 1] * (len(parts) // 2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("size", [16, 32, HALF])
def test_fields_fill_a_half_without_overlap(dtype, size):
    plan = _plan(dtype)
    layout = Layout(plan, ("scores", "d_weights"), ("weights", "d_scores"))
    for half in range(2):
        rows = []
        for field in ("scores", "d_weights", "weights", "d_scores"):
            for part in strips(plan, size):
                if half_of(part) == half:
                    found = layout.rows(field, part)
                    rows += range(found.start, found.stop)
        (array,) = {array.shape for array in layout.scratch().values()}
        assert sorted(rows) == list(range(array[0]))


def test_a_turn_alone_leaves_the_sets_as_it_found_them():
    assert (ALONE.pending, ALONE.scores) == (ALONE.results, ALONE.ahead)
    assert not ALONE.in_order


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("queries", [128, 256, 512])
def test_strips_fit_into_halves_and_packed_vectors(turned, queries):
    sizes = config.strips(turned, queries)
    for size in (sizes.large, sizes.small, sizes.backward):
        assert HALF % size == 0 and size % 16 == 0
