import math

import numpy as np
import pytest

from lazyattn.errors import InputError
from lazyattn.eval.by_position import by_position, document_rows, position_edges
from lazyattn.eval.estimates import estimate


def test_edges_are_powers_of_two_and_the_length():
    assert position_edges(4096, 512) == (0, 512, 1024, 2048, 4096)
    assert position_edges(100) == (0, 16, 32, 64, 100)
    assert position_edges(16) == (0, 16)
    assert position_edges(3) == (0, 3)


def test_means_by_bucket():
    nll = np.array([[1, 2, 3, 4], [3, 4, 5, 8]], np.float32)
    found = by_position(nll, (0, 1, 2, 4))
    assert {bucket: one.mean for bucket, one in found.items()} == {(0, 1): 2, (1, 2): 3, (2, 4): 5}
    # Rows' means are 1 and 3: a deviation of sqrt(2), over sqrt(2).
    assert found[0, 1].stderr == pytest.approx(1)
    assert (found[2, 4].rows, found[2, 4].count) == (2, 4)


def test_what_the_mask_leaves_out_does_not_count():
    nll = np.array([[1, 2, np.nan], [3, np.nan, np.nan]], np.float32)
    found = by_position(nll, (0, 2, 3), np.isfinite(nll))
    assert found[0, 2].mean == 2 and found[0, 2].count == 3
    assert math.isnan(found[2, 3].mean) and found[2, 3].rows == 0


def test_the_error_of_rows_of_equal_length_is_that_of_their_means():
    values = np.random.default_rng(0).normal(size=(50, 7))
    found = estimate(values, np.ones(values.shape, bool))
    means = values.mean(axis=1)
    assert found.mean == pytest.approx(means.mean())
    assert found.stderr == pytest.approx(means.std(ddof=1) / math.sqrt(50))
    assert math.isnan(estimate(values[:1], np.ones((1, 7), bool)).stderr)


@pytest.mark.parametrize("edges", [(0,), (0, 5), (2, 2), (-1, 2)])
def test_bad_edges(edges):
    with pytest.raises(InputError, match=r"edges is .*, but it must be two or more rising numbers"):
        by_position(np.zeros((1, 4)), edges)


def test_rows_are_of_one_document_each_and_begin_alike():
    documents = [np.array([0, *range(10 * n, 10 * n + size)]) for n, size in ((1, 7), (2, 2))]
    tokens, mask = document_rows(documents, 3, rows=9)
    assert tokens.tolist() == [[0, 10, 11, 12], [0, 13, 14, 15], [0, 20, 21, 0], [0, 16, 0, 0]]
    assert mask.sum(axis=1).tolist() == [3, 3, 2, 1]
    tokens, _ = document_rows(documents, 3, rows=3)
    assert tokens[:, 1].tolist() == [10, 13, 20]
    # Of full rows some at equal steps.
    tokens, mask = document_rows([np.arange(101)], 5, rows=4)
    assert tokens[:, 1].tolist() == [1, 26, 51, 76] and mask.all()


def test_documents_with_nothing_to_predict():
    with pytest.raises(InputError, match="the number of documents is 0"):
        document_rows([], 3, rows=1)
    with pytest.raises(
        InputError, match="the tokens of a document is 1, but it must be at least 2"
    ):
        document_rows([np.zeros(1, int)], 3, rows=1)
