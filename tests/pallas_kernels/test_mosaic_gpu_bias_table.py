"""Which loop of the Hopper kernels has which tile, and the bias of those past its table."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic_gpu import bias_table, config
from pallas_kernels.mosaic_gpu.bias_table import TileKind
from pallas_kernels.mosaic_gpu.plan import BLOCK, LOG2_E, Plan
from tests.pallas_kernels.problems import problem

BLOCKS = 12


def _plan(width, has_slope=True):
    call = problem(width=width, has_slope=has_slope, interpret=object())
    return Plan(**call.facts(), tunings=config.tunings(64, width))


@pytest.mark.parametrize("width", [0, 1, 64, 65, 66, 300, BLOCKS * BLOCK])
@pytest.mark.parametrize("start, stop", [(2, 14), (2, 2), (5, 4), (7, 14), (3, 8)])
@pytest.mark.parametrize("masked", [None, 0, 4, 9, 20])
def test_every_step_is_taken_once_by_a_loop_that_knows_its_tile(width, start, stop, masked):
    plan, diagonal = _plan(width), 2
    taken = []

    def loop(kind, start, stop, carry):
        taken.extend((kind, n) for n in range(int(start), int(stop)))
        return carry + 1

    def run(stop):
        loops = bias_table.loops
        return loops(plan, BLOCKS * BLOCK, diagonal, start, stop, loop, 0, masked=masked)

    assert run(stop) >= 1
    assert [n for _, n in taken] == list(range(start, stop))
    for kind, n in taken:
        if masked is not None and n >= masked:
            assert kind is TileKind.MASKED
        else:
            # Its nearest query and key.
            past = BLOCK * (n - diagonal) - (BLOCK - 1) >= plan.reach
            assert kind is (TileKind.TAIL if past else TileKind.NEAR)


@pytest.mark.parametrize("rows_are_keys", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_bias_is_the_tail_s(rows_are_keys, whole):
    width, value, slope = 100, -3.0, 0.25
    plan = _plan(width)
    tile_distance = jnp.int32(BLOCK * plan.near_blocks)
    tail = (jnp.float32(value * LOG2_E), jnp.float32(slope * LOG2_E))
    tile, rest = bias_table.tile_bias(
        plan,
        None,
        tile_distance,
        tail,
        TileKind.TAIL,
        rows_are_keys=rows_are_keys,
        whole=whole,
        interpret=True,
    )
    r, c = np.mgrid[:BLOCK, :BLOCK]
    distance = int(tile_distance) + (c - r if rows_are_keys else r - c)
    expected = (value - slope * (distance - (width - 1))) * LOG2_E
    np.testing.assert_allclose(tile + rest, expected, rtol=1e-6)
    # What may be large comes apart, and what remains raises no exponential.
    assert whole or np.all(np.asarray(tile) <= 0)


def test_bias_without_a_slope_is_one_number():
    tail = (jnp.float32(-1.5), jnp.float32(0.0))
    plan = _plan(100, has_slope=False)
    bias, rest = bias_table.tile_bias(
        plan,
        None,
        jnp.int32(256),
        tail,
        TileKind.TAIL,
        rows_are_keys=False,
        whole=True,
        interpret=True,
    )
    assert bias == -1.5 and rest == 0
