"""The planning of the Hopper kernels' calls: small Triton kernels, in Triton's interpreter, do
what plain JAX does."""

from tests.pallas_kernels import triton_interpreter as interpreter  # isort: skip

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic_gpu import config
from pallas_kernels.mosaic_gpu.plan import Plan
from pallas_kernels.mosaic_gpu.planning import by_triton, by_xla
from pallas_kernels.mosaic_gpu.scheduler import TileOrder
from pallas_kernels.problem import Inputs
from tests import oracle
from tests.pallas_kernels.problems import problem

# Lengths that are and aren't a multiple of a block, tables shorter and longer than them; with
# and without slope, table, offset, documents, skipped tiles.
CASES = [
    oracle.Case("slope", (2, 1100, 2, 1, 64), 100, "alibi", True),
    oracle.Case("no_slope", (1, 320, 2, 2, 64), 130),
    oracle.Case("wide", (1, 200, 2, 2, 128), 1030, "alibi", True),
    oracle.Case("packed", (2, 300, 2, 1, 64), 64, "alibi", True, documents=(70, 130, 100)),
    oracle.Case("softmax", (1, 128, 1, 1, 64), 0, tau=None),
    oracle.Case("gaps", (1, 300, 2, 1, 64), 70, "gaps", True),
    oracle.Case("blind", (1, 300, 2, 1, 64), 70, "blind", True),
]


def _plan(case, args, skip_mass):
    length, heads = args["query"].shape[1:3]
    bias = args.get("distance_bias")
    width = 0 if bias is None else bias.shape[1]
    call = problem(
        length=length,
        heads=heads,
        scale=-0.3,
        skip_mass=skip_mass,
        packed=bool(case.documents),
        width=min(width, length),
        has_slope=args.get("distance_slope") is not None,
        has_offset=args.get("offset") is not None,
    )
    plan = Plan(**call.facts(), tunings=config.tunings(64, 0))
    return plan, length


def _inputs(query, key, segment_start, distance_bias, distance_slope, offset):
    scale = jnp.ones(segment_start.shape)
    return Inputs(query, key, key, segment_start, scale, distance_bias, distance_slope, offset)


def _both(function, *args, **settings):
    with interpreter.interpreted(interpreter.blocks(64, 64)):
        ours = jax.jit(lambda: getattr(by_triton, function)(*args, **settings))()
    return ours, jax.jit(lambda: getattr(by_xla, function)(*args, **settings))()


def _visits_by_xla(plan, call, table):
    return jax.jit(functools.partial(by_xla.visits, plan))(call, table)


def _same(ours, expected, tolerance=0.0):
    assert (ours is None) == (expected is None)
    if ours is not None:
        np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("skip_mass", [pytest.param(0.0, marks=pytest.mark.slow), 1e-4])
@pytest.mark.parametrize(
    "case",
    [
        case if case.name == "packed" else pytest.param(case, marks=pytest.mark.slow)
        for case in CASES
    ],
    ids=str,
)
def test_tables_and_visits(case, skip_mass):
    args = {name: jnp.asarray(x) for name, x in oracle.inputs(case).items()}
    plan, length = _plan(case, args, skip_mass)
    parameters = [args.get(name) for name in ("distance_bias", "distance_slope", "offset")]
    ours, expected = _both("table", plan, *parameters[:2], length)
    for name in ("for_queries", "for_keys", "tail"):
        _same(getattr(ours, name), getattr(expected, name), 2e-6)
    segment_start = jnp.zeros(args["query"].shape[:2], jnp.int32)
    if case.documents:
        ids = np.asarray(args["segment_ids"])
        starts = [[np.flatnonzero(row == x)[0] for x in row] for row in ids]
        segment_start = jnp.asarray(starts, jnp.int32)
    call = _inputs(args["query"], args["key"], segment_start, *parameters)
    with interpreter.interpreted(interpreter.blocks(64, 64)):
        found = jax.jit(lambda: by_triton.visits(plan, call, ours))()
    wanted = _visits_by_xla(plan, call, expected)
    _same(found.first, wanted.first)
    _same(found.no_overflow, wanted.no_overflow)
    _same(found.work.sum(axis=-1), wanted.work[:, :, 0])
    large = _inputs(40 * args["query"], 40 * args["key"], segment_start, *parameters)
    with interpreter.interpreted(interpreter.blocks(64, 64)):
        found = jax.jit(lambda: by_triton.visits(plan, large, ours))()
    _same(found.no_overflow, _visits_by_xla(plan, large, expected).no_overflow)
    assert not np.asarray(found.no_overflow).any()


def test_a_block_visits_what_any_of_its_queries_sees():
    """Not what its first one sees: where chunks are filled up, queries before see less."""
    case = oracle.Case("", (1, 300, 2, 1, 64), 64, documents=(300,))
    args = {name: jnp.asarray(x) for name, x in oracle.inputs(case).items()}
    plan, _ = _plan(case, args, 0.0)
    place = jnp.arange(300, dtype=jnp.int32)
    segment_start = jnp.where(place < 200, place, jnp.maximum(place - 150, 0))[None]
    parameters = [args[name] for name in ("distance_bias", "offset")]
    bias, offset = parameters
    call = _inputs(args["query"], args["key"], segment_start, bias, None, offset)
    with interpreter.interpreted(interpreter.blocks(64, 64)):
        table = jax.jit(lambda: by_triton.table(plan, parameters[0], None, 300))()
        found = jax.jit(lambda: by_triton.visits(plan, call, table))()
    assert found.first[0, 0].tolist() == [0, 1, 2, 0, 1]
    _same(found.first, _visits_by_xla(plan, call, table).first)


def test_a_number_that_is_none_is_visited():
    case = CASES[0]
    args = {name: jnp.asarray(x) for name, x in oracle.inputs(case).items()}
    plan, length = _plan(case, args, 1e-4)
    parameters = [args[name] for name in ("distance_bias", "distance_slope", "offset")]
    key = args["key"].at[0, 70, 0, 3].set(jnp.nan)
    call = _inputs(args["query"], key, jnp.zeros((2, length), jnp.int32), *parameters)
    broken = parameters[0].at[1, 99].set(jnp.nan)
    with interpreter.interpreted(interpreter.blocks(64, 64)):
        table = jax.jit(lambda: by_triton.table(plan, *parameters[:2], length))()
        found = jax.jit(lambda: by_triton.visits(plan, call, table))()
        norms = jax.jit(lambda: by_triton.norms(plan, call, table))()
        table = jax.jit(lambda: by_triton.table(plan, broken, parameters[1], length))()
    # A GPU's maxima leave NaN out, unlike the interpreter's: so there must be none.
    assert not np.isnan(norms).any() and np.isinf(norms[0, 1, :, 1]).all()
    largest = table.maxima[:, : -(-length // 64)]
    assert not np.isnan(largest).any() and np.isinf(largest[1, 1])
    _same(found.first, _visits_by_xla(plan, call, table).first)
    assert (np.asarray(found.first)[0, :, 1:] <= 1).all() and not np.asarray(found.no_overflow)[
        0
    ].any()


@pytest.mark.parametrize(
    "blocks, distances, filled, parts",
    [pytest.param(5, 3, 4, 2, marks=pytest.mark.slow), (70, 18, 18, 4), (3, 0, 0, 1)],
)
def test_ranges_of_the_backward_pass(blocks, distances, filled, parts):
    rng = np.random.default_rng(blocks)
    first = np.minimum(rng.integers(0, blocks, (2, 2, blocks)), np.arange(blocks))
    live = np.minimum(first + rng.integers(0, 3, first.shape), np.arange(blocks))
    work = rng.integers(0, 9, (2, 2, 3))
    arrays = (jnp.asarray(x, jnp.int32) for x in (first, live, work))
    orders = [
        TileOrder.of_queries(2, 2, 2, 64 * blocks, 192, 8192),
        TileOrder.of_keys(2, 1, 2, 64 * blocks, 128, 64),
        TileOrder.by_head(2, 2, 2, max(parts * filled, 1)),
    ][: 3 if distances else 2]
    ours, expected = _both("key_ranges", *arrays, 2, orders, distances, filled, parts)
    for name in ("last", "last_live", "distances"):
        _same(getattr(ours, name), getattr(expected, name))
    for tile_order, wanted in zip(ours.tile_order, expected.tile_order, strict=True):
        _same(tile_order, wanted)


def test_order_of_work_tiles():
    work = jnp.asarray([[[3], [9], [1], [1]], [[2], [2], [5], [8]]], jnp.int32)
    # Sections of two key heads, four query heads; a work tile of each head is 3 tiles.
    order = TileOrder(pairs=8, heads=4, members=2, tiles=3, section=4, descending=True)
    ours, (expected,) = _both("tile_orders", work, 2, [order])
    _same(ours[0], expected)
    assert expected[-1] == 0
    items = [tuple(int(x) for x in order.item(n)) for n in expected[:-1]]
    assert sorted(items) == [(b, h, t) for b in range(2) for h in range(4) for t in range(3)]
    # Key heads by their work: 13 of the second row's second, 12, 4 and 2.
    assert items[:4] == [(1, 2, 2), (1, 3, 2), (0, 0, 2), (0, 1, 2)]
    assert [item[2] for item in items] == [2] * 4 + [1] * 4 + [0] * 4 + [2] * 4 + [1] * 4 + [0] * 4
    assert items[12:14] == [(1, 0, 2), (1, 1, 2)]


@pytest.mark.parametrize("groups", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("straight", [False, True])
@pytest.mark.parametrize(
    "length, width, has_slope", [(300, 100, True), (300, 100, False), (190, 1100, True)]
)
def test_gradients(length, width, has_slope, straight, groups):
    rng = np.random.default_rng(groups)
    blocks, heads = -(-length // 64), 2
    distances = min((min(width, length) + 62) // 64 + 1, blocks)
    # Of dK's kernel a part for each block of keys, but more than are added at once.
    sums = (37, heads, distances, 64) if straight else (2, heads, distances + 1, 128)
    shapes = {
        "of_offset": (2, heads, blocks, 64),
        "sums": (2, *sums),
        "tail_sums": (2, heads, blocks, 2, 64),
    }
    arrays = {name: jnp.asarray(rng.normal(size=x), jnp.float32) for name, x in shapes.items()}
    if not has_slope or width > length:
        arrays["tail_sums"] = None
    settings = dict(**arrays, length=length, distances=distances)
    ours, expected = _both("gradients", groups, width, has_slope, **settings)
    for name in ("distance_bias", "distance_slope", "offset"):
        _same(getattr(ours, name), getattr(expected, name), 1e-3)


def test_gradient_of_the_offset_alone():
    of_offset = jnp.ones((1, 1, 2, 64))
    ours, expected = _both(
        "gradients", 1, None, False, of_offset, None, None, length=128, distances=0
    )
    assert ours.distance_bias is ours.distance_slope is None
    _same(ours.offset, expected.offset, 1e-6)
