import numpy as np
import pytest

from lazyattn.data.mixture import DocumentOrder, Mixture
from lazyattn.errors import InputError


@pytest.mark.parametrize("documents", [1, 2, 37])
def test_every_epoch_has_every_document_once(documents):
    order = DocumentOrder(documents, seed=3)
    epochs = [[order[e * documents + i] for i in range(documents)] for e in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(documents))
    if documents > 2:
        assert len(set(map(tuple, epochs))) == 4


def test_the_order_depends_on_seed_and_source_and_not_on_who_asked_before():
    def first(seed, source=0):
        order = DocumentOrder(1000, seed, source)
        return [order[i] for i in range(20)]

    assert first(0) == first(0)
    assert len({tuple(first(seed, source)) for seed in (0, 1, -1, 2**70) for source in (0, 1)}) == 8
    order = DocumentOrder(1000, 0)
    assert [order[place] for place in (5, 2500, 5)] == [first(0)[5], order[2500], first(0)[5]]


def test_no_documents():
    with pytest.raises(InputError, match="documents is 0, but it must be at least 1"):
        DocumentOrder(0, 0)


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0), (0.7, 0.2, 0.1), (5, 3, 2, 90)])
def test_shares_hold_in_every_stretch_of_rows(weights):
    mixture = Mixture(weights)
    shares = np.asarray(weights) / sum(weights)
    picked = np.asarray([mixture[row] for row in range(20_000)])
    for start in (0, 777, 10_000):
        for number in (64, 1000, 8192):
            counts = np.bincount(picked[start : start + number], minlength=len(weights))
            np.testing.assert_allclose(counts, shares * number, atol=5)


def test_shares_hold_far_out():
    mixture = Mixture((0.25, 0.75))
    picked = [mixture[row] for row in range(10**15, 10**15 + 1000)]
    assert abs(sum(picked) - 750) <= 5
