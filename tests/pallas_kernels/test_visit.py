"""Every skipped tile's true mass is below the bound, and little else is visited."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn.attention import document_starts
from pallas_kernels import bias as bias_lib
from pallas_kernels.visit import TileSizes, bias_maxima, visit_ranges
from tests import oracle

SKIP_MASS = 1e-6

CASES = {
    "alibi": oracle.Case("", (2, 520, 4, 2, 16), 64, "alibi", True),
    "steep": oracle.Case("", (1, 600, 2, 2, 16), 64, "steep", True),
    "bumpy": oracle.Case("", (2, 400, 2, 1, 16), 400, "bumpy"),
    "rising_tail": oracle.Case("", (1, 400, 2, 2, 16), 300, "steep"),
    "normal": oracle.Case("", (1, 300, 2, 2, 16), 64, "normal"),
    "no_offset": oracle.Case("", (1, 400, 2, 2, 16), 64, "steep", True, None),
    "documents": oracle.Case("", (2, 500, 2, 2, 16), 64, "steep", True, documents=(70, 9, 200, 1)),
    "window": oracle.Case("", (1, 500, 2, 2, 16), 64, "alibi", True, settings=(("window", 150),)),
    "sharp_scores": oracle.Case("", (1, 500, 2, 2, 16), 64, "steep", True, score_scale=4.0),
    "no_bias": oracle.Case("", (1, 300, 2, 2, 16), 0, score_scale=5.0),
}
TILES = [TileSizes(64, 64), TileSizes(128, 64), TileSizes(32, 128), TileSizes(48, 32)]


@functools.partial(jax.jit, static_argnames=("tiles", "skip_mass"))
def _ranges(args, tiles, skip_mass=SKIP_MASS):
    batch, length = args["query"].shape[:2]
    bias = None
    if "distance_bias" in args:
        bias = bias_lib.expand(args["distance_bias"], args.get("distance_slope"), length)
    first = jnp.zeros((batch, length), jnp.int32)
    if "segment_ids" in args:
        first = document_starts(args["segment_ids"])
    if "window" in args:
        first = jnp.maximum(first, jnp.arange(length) - args["window"] + 1)
    return visit_ranges(
        args["query"],
        args["key"],
        bias,
        args.get("offset"),
        first,
        scale=args["query"].shape[-1] ** -0.5,
        skip_mass=skip_mass,
        tiles=tiles,
    )


def _softmax(args):
    """Returns the true softmax weights [batch, heads, length, length], float64."""
    length, heads, head_dim = args["query"].shape[1:]
    key = np.repeat(args["key"].astype(np.float64), heads // args["key"].shape[2], axis=2)
    scores = np.einsum("bqhd,bkhd->bhqk", args["query"], key, optimize=True) / np.sqrt(head_dim)
    i, j = np.mgrid[:length, :length]
    if "distance_bias" in args:
        bias = bias_lib.expand(args["distance_bias"], args.get("distance_slope"), length)
        scores += np.asarray(bias, np.float64)[:, np.maximum(i - j, 0)]
    visible = (i >= j)[None]
    if "segment_ids" in args:
        ids = args["segment_ids"]
        visible = visible & (ids[:, :, None] == ids[:, None, :])
    visible = visible & (i - j < args.get("window", length))
    scores = np.where(visible[:, None], scores, -np.inf)
    softmax = np.exp(scores - scores.max(-1, keepdims=True))
    return softmax / softmax.sum(-1, keepdims=True)


def _visited(ranges, tiles, length):
    """Returns which entries lie in visited tiles, [batch, heads, length, length]."""
    query_tile = np.arange(length) // tiles.queries
    key_tile = np.arange(length) // tiles.keys
    first = np.asarray(ranges.first)[:, :, query_tile]
    last = np.asarray(ranges.last)[query_tile]
    return (key_tile >= first[..., None]) & (key_tile <= last[:, None])


def _adversarial(kind, args):
    args = {k: np.copy(v) for k, v in args.items()}
    length = args["query"].shape[1]
    if kind == "large_far_key":
        args["key"][:, 3] *= 60
    elif kind == "weak_own_score":
        args["query"][:, length // 2 :] = -8 * np.repeat(
            args["key"][:, length // 2 :], args["query"].shape[2] // args["key"].shape[2], axis=2
        )
    elif kind == "aligned_far_keys":
        args["key"][:, :40] = args["query"][:, -1:, : args["key"].shape[2]] * 3
    elif kind == "zero_inputs":
        args["query"][:] = 0
        args["key"][:] = 0
    return args


@pytest.mark.parametrize(
    "kind", ["random", "large_far_key", "weak_own_score", "aligned_far_keys", "zero_inputs"]
)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("more", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_skipped_mass_is_below_the_bound(name, kind, more):
    args = _adversarial(kind, oracle.inputs(CASES[name]))
    softmax = _softmax(args)
    start = list(CASES).index(name)
    tiles = TILES[(start + more) % 4]
    visited = _visited(_ranges(args, tiles), tiles, softmax.shape[-1])
    assert np.max(np.where(visited, 0, softmax).sum(-1)) <= SKIP_MASS


@pytest.mark.parametrize(
    "tiles", [TILES[2], *(pytest.param(x, marks=pytest.mark.slow) for x in TILES if x != TILES[2])]
)
def test_steep_heads_visit_few_tiles(tiles):
    """The bound is of use: a steep head's span does not grow with the length."""
    visited = [
        int(
            _ranges(
                oracle.inputs(dataclasses.replace(CASES["steep"], shape=(1, length, 2, 2, 16))),
                tiles,
            ).visited.max()
        )
        for length in (400, 1200)
    ]
    assert visited[0] == visited[1]
    assert visited[1] * tiles.keys < 400


def test_no_skip_mass_visits_all_but_other_documents():
    args = oracle.inputs(CASES["documents"])
    tiles = TileSizes(64, 64)
    first = np.asarray(_ranges(args, tiles, skip_mass=0.0).first)
    starts = np.asarray(document_starts(args["segment_ids"]))
    for tile in range(first.shape[-1]):
        true = starts[:, tile * 64 : (tile + 1) * 64].min(axis=1) // 64
        np.testing.assert_array_equal(first[:, :, tile], np.tile(true[:, None], (1, 2)))


@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_a_window_leaves_out_whole_tiles_that_nobody_sees(tiles):
    args = oracle.inputs(CASES["window"])
    first = np.asarray(_ranges(args, tiles, skip_mass=0.0).first)
    for tile in range(first.shape[-1]):
        assert np.all(first[:, :, tile] == max(0, tile * tiles.queries - 149) // tiles.keys)


def test_positive_offsets_visit_everything():
    args = oracle.inputs(CASES["steep"])
    args["offset"] = np.array([0.5, -1.0], np.float32)
    first = np.asarray(_ranges(args, TileSizes(64, 64)).first)
    assert np.all(first[:, 0] == 0)
    assert np.all(first[:, 1, 5:] > 0)


def test_not_a_number_is_never_skipped():
    args = oracle.inputs(CASES["steep"])
    args["key"][:, 2, 0, 0] = np.nan
    assert np.all(np.asarray(_ranges(args, TileSizes(64, 64)).first)[:, 0] == 0)


@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_bias_maxima_bound_every_entry(tiles):
    bias = np.random.default_rng(0).standard_normal((2, 300)).astype(np.float32)
    maxima = np.asarray(bias_maxima(jnp.asarray(bias), tiles))
    i, j = np.mgrid[:300, :300]
    causal = i >= j
    entries = bias[:, np.clip(i - j, 0, None)]
    bound = maxima[:, i // tiles.queries, j // tiles.keys]
    assert np.all((bound >= entries) | ~causal)


@pytest.mark.parametrize("tiles", [TileSizes(64, 64), TileSizes(128, 64)], ids=str)
@pytest.mark.parametrize("name", ["query", "key", "distance_bias"])
def test_a_tile_with_nan_is_visited(name, tiles):
    # Maxima of several heads, from which XLA leaves NaN out on a CPU.
    case = oracle.Case("", (1, 1100, 4, 2, 64), 100, "alibi", True)
    args = {name: jnp.asarray(x) for name, x in oracle.inputs(case).items()}
    before = np.asarray(_ranges(args, tiles).first)
    assert (before[0, :2, -1] > 3).all()
    place = 40 if name == "distance_bias" else 70
    args[name] = args[name].at[:, place].set(jnp.nan)
    first = np.asarray(_ranges(args, tiles).first)
    if name == "query":
        assert (first[:, :, place // tiles.queries] == 0).all()
    elif name == "key":
        assert (first <= place // tiles.keys).all()
    else:
        distance = np.arange(first.shape[2]) * tiles.queries - first * tiles.keys
        assert (distance[:, :, 1:] >= tiles.keys).all()
