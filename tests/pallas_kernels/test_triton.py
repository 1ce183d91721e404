"""The Triton kernels in Triton's interpreter, on the CPU."""

from tests.pallas_kernels import triton_interpreter as interpreter  # isort: skip

import pytest

from tests import oracle, test_attention, test_chunk_starts
from tests.pallas_kernels import kernel_suite as suite

# Forward queries and keys, backward queries and keys: equal, unequal either way, and query
# tiles of several key tiles.
BLOCKS = [
    interpreter.blocks(64, 64),
    interpreter.blocks(64, 32, (32, 16)),
    interpreter.blocks(32, 64, (32, 32)),
    interpreter.blocks(128, 64, (64, 32)),
]


@pytest.mark.parametrize("case", suite.in_interpreters(suite.CASES), ids=str)
def test_output_and_gradients(case):
    blocks = BLOCKS[suite.CASES.index(case) % len(BLOCKS)]
    with interpreter.interpreted(blocks):
        oracle.check("triton", case)


# By default the case's chunks have blocks 1.
@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, len(BLOCKS)))
def test_every_kind_of_tile_with_all_blocks(number):
    with interpreter.interpreted(BLOCKS[number]):
        oracle.check("triton", suite.SPARSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", suite.BLIND)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_blind_rows(dtype, name):
    with interpreter.interpreted(BLOCKS[1]):
        suite.check_gradients_of_blind_rows(
            dtype, 3e-5 if dtype == "float32" else 0.02, names=(name,)
        )


@pytest.mark.slow
def test_dead_tiles_do_not_matter():
    with interpreter.interpreted(BLOCKS[1]):
        suite.check_dead_tiles_do_not_matter(suite.SPARSE, "float32", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "test",
    [
        lambda: test_attention.test_softmax_limit("triton"),
        lambda: test_attention.test_first_token_attends_to_nothing("triton"),
        lambda: test_attention.test_causality_and_document_isolation("triton", -1.0),
        lambda: test_attention.test_causality_and_document_isolation("triton", 0.5),
        lambda: test_attention.test_half_precision_is_near_float64("triton", "bfloat16"),
        lambda: oracle.check_blind_rows("triton"),
        lambda: oracle.check_gradient_of_an_offset_of_zero("triton"),
    ],
    ids=["softmax_limit", "first_token", "isolated", "isolated_positive", "half", "blind", "zero"],
)
def test_as_every_implementation(test):
    with interpreter.interpreted(BLOCKS[0]):
        test()


@pytest.mark.slow
def test_not_a_number_comes_through():
    with interpreter.interpreted(BLOCKS[1]):
        suite.check_not_a_number_comes_through("float32")
        suite.check_a_far_key_that_is_none_comes_through("float32", "triton")


@pytest.mark.parametrize(
    "case",
    [suite.SPARSE, pytest.param(test_chunk_starts.WINDOW, marks=pytest.mark.slow)],
    ids=str,
)
def test_chunks_of_a_sequence(case):
    with interpreter.interpreted(BLOCKS[1]):
        test_chunk_starts.check_chunks("triton", case, 4, (0, 3))
