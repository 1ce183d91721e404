"""The TPU kernels in Pallas's TPU interpret mode: races detected, memory starting as NaN."""

import jax
import numpy as np
import pytest

from tests import oracle, test_attention, test_chunk_starts
from tests.pallas_kernels import kernel_suite as suite
from tests.pallas_kernels.tpu_interpreter import interpreted

# Queries and keys of a tile: equal, or two and four key tiles to a query tile.
BLOCKS = [(128, 128), (256, 128), (256, 256), (512, 128)]
# What runs wherever the suite runs: a window in documents that heads share, in two tiles.
# `make test-tpu` has all.
QUICK = oracle.Case(
    "quick", (1, 210, 2, 1, 16), 64, "alibi", True, (-0.7, 0.3), (110, 17, 3), (("window", 40),)
)
NAMED = {case.name: case for case in suite.CASES}
# Tiles of every kind at tiles of 128: live, dead, negligible.
SPARSE = oracle.Case("sparse", (1, 900, 2, 1, 32), 300, "alibi", True, (-1.0, -0.4))
DOCUMENTS = oracle.Case(
    "more_documents", (2, 500, 2, 1, 16), 64, "alibi", True, documents=(200, 1, 299)
)
# Most chunks of keys are of no use to a tile of queries.
WINDOW = oracle.Case("window", (1, 900, 2, 1, 32), 300, "alibi", True, settings=(("window", 200),))


def test_a_window_in_documents():
    with interpreted(128, 128):
        oracle.check("tpu", QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("case", suite.CASES, ids=str)
def test_output_and_gradients(case):
    with interpreted(*BLOCKS[suite.CASES.index(case) % len(BLOCKS)]):
        oracle.check("tpu", case)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"tiles_a_step": 1}, marks=pytest.mark.slow),
        pytest.param({"generation": "v6e", "queries": 256}, marks=pytest.mark.slow),
        pytest.param({"chunked": True, "queries": 256}, marks=pytest.mark.slow),
        pytest.param({"chunked": True, "turned": False}, marks=pytest.mark.slow),
        pytest.param({"turned": False, "queries": 256}, marks=pytest.mark.slow),
        pytest.param({"queries": 512}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_kind_of_tile_in_every_layout(layout):
    with interpreted(**layout):
        oracle.check("tpu", SPARSE)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"chunked": True}, marks=pytest.mark.slow),
        pytest.param({"chunked": True, "turned": False, "queries": 256}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_documents_in_chunks(layout):
    with interpreted(**layout):
        oracle.check("tpu", DOCUMENTS)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"chunked": True}, {"queries": 512}], ids=str)
def test_window_in_every_layout(layout):
    with interpreted(**layout):
        oracle.check("tpu", WINDOW)


@pytest.mark.slow
def test_softmax_in_chunks():
    with interpreted(chunked=True):
        oracle.check("tpu", oracle.Case("", (1, 500, 2, 1, 16), 64, "alibi", True, None))


@pytest.mark.slow
@pytest.mark.parametrize("case", suite.HEAD_SIZES, ids=str)
def test_head_sizes(case):
    with interpreted():
        oracle.check("tpu", case)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["documents_grouped", "paper", "no_offset", "sharp_scores"])
def test_bfloat16(name):
    factor = suite.HALF_PRECISION_FACTOR.get(name, 1.2)
    with interpreted(256, 128):
        oracle.check_half_precision("tpu", NAMED[name], "bfloat16", factor=factor)


@pytest.mark.slow
def test_dead_tiles_do_not_matter():
    with interpreted():
        suite.check_dead_tiles_do_not_matter(SPARSE, "float32", 1e-5, "tpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    "test",
    [
        lambda: test_attention.test_softmax_limit("tpu"),
        lambda: test_attention.test_first_token_attends_to_nothing("tpu"),
        lambda: test_attention.test_causality_and_document_isolation("tpu", -1.0),
        lambda: test_attention.test_causality_and_document_isolation("tpu", 0.5),
        lambda: test_attention.test_half_precision_is_near_float64("tpu", "bfloat16"),
    ],
    ids=["softmax_limit", "first_token", "isolated", "isolated_positive", "half"],
)
def test_as_every_implementation(test):
    with interpreted():
        test()


@pytest.mark.slow
def test_bias_of_minus_infinity_near_the_diagonal():
    with interpreted():
        oracle.check_blind_rows("tpu")


@pytest.mark.slow
def test_gradient_of_an_offset_of_zero():
    with interpreted(128, 128):
        oracle.check_gradient_of_an_offset_of_zero("tpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", suite.BLIND)
def test_gradients_of_blind_rows(name):
    with interpreted(128, 128):
        suite.check_gradients_of_blind_rows("float32", 3e-5, "tpu", (name,))


@pytest.mark.slow
def test_not_a_number_comes_through():
    with interpreted():
        suite.check_not_a_number_comes_through("float32", "tpu")


@pytest.mark.slow
def test_vmap_and_scan():
    # Interpreted kernels have effects, which remat refuses: `test_tpu_compiles.py` has it.
    with interpreted():
        suite.check_transformations("float32", 1e-5, implementation="tpu", remat=False)


@pytest.mark.slow
def test_strict_settings_and_64_bits():
    with interpreted():
        suite.check_settings("float32", "tpu", remat=False)


@pytest.mark.slow
def test_shard_map():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("batch", "heads"))
    with interpreted():
        suite.check_sharded(mesh, "float32", 1e-5, "tpu")


@pytest.mark.slow
@pytest.mark.parametrize("case", [test_chunk_starts.CASES[0], test_chunk_starts.WINDOW], ids=str)
def test_chunks_of_a_sequence(case):
    with interpreted(128, 128):
        test_chunk_starts.check_chunks("tpu", case, 4, (0, 3))
