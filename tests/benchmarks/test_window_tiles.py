import pytest

from benchmarks import window_tiles
from pallas_kernels.visit import TileSizes


@pytest.mark.parametrize("length, tiles", [(4096, 64), (16384, 256)])
def test_square_tiles_visit_the_window_s_and_one_more(length, tiles):
    expected = sum(min(tile + 1, 512 // 64 + 1) for tile in range(tiles))
    found = window_tiles.count(TileSizes(64, 64), length, 512, whole_diagonals=False)
    assert found == (expected, tiles * (tiles + 1) // 2)


def test_wide_tiles_visit_what_their_first_query_sees():
    # Two tiles of the diagonal, and two more from the second tile of queries on.
    assert window_tiles.count(TileSizes(512, 256), 4096, 512, False) == (2 + 7 * 4, 72)


def test_whole_diagonals_cost_all_tiles_of_queries():
    assert window_tiles.count(TileSizes(128, 128), 4096, 512, True) == (5 * 32, 528)


def test_table_has_a_line_for_each_implementation():
    lines = window_tiles.table(512, [1024], 64).splitlines()
    names = [line.split(" | ")[1] for line in lines[2:]]
    assert names == [
        "pairs", "mosaic_gpu", "triton, 8.0", "triton, 9.0", "tpu, v4", "tpu, v5p", "xla_chunked"
    ]  # fmt: skip
    assert "| 1,024 | mosaic_gpu | 64 x 64 | 108 | 136 | 0.794 |" in lines
