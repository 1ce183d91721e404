"""Batches of shards are what they were on 2026-11-30: an old run resumes with its own order."""

import hashlib
import itertools
import json

import numpy as np
import pytest

from lazyattn.data.config import DataConfig
from lazyattn.data.packing import FIELDS
from lazyattn.data.pipeline import TrainingData, train_iterator, validation_batches
from tests.data.fake_documents import BOS, EOS, PAD, FakeDocuments

# Lengths by a formula: random generators may change.
_LENGTHS = ([(37 * i) % 91 for i in range(150)], [(53 * i) % 301 for i in range(70)])

# Digests of 80 training batches and of all validation batches.
RECORDED = {
    ("split", "split"): (
        "5c51e85e47d6d22e91d31a2cb090ce44",
        "d145a1c8ddca170c8330e99a0dd75a58",
    ),
    ("split", "truncate"): (
        "cad0bf62f3d5ac323ba727c19b235ddc",
        "258c03685c2306474e58f4b9f8b11d38",
    ),
    ("first_fit", "split"): (
        "bbb3c46ff4fa0f711bea10dc3d7a35a6",
        "223dc52cfada9e01e07474b9bef369da",
    ),
    ("first_fit", "truncate"): (
        "ed9a2b2d238ac0557d11264bb542dd4a",
        "9b56b58a7d3c6b5f995cc16f28186710",
    ),
}

# What a checkpoint of then holds.
STATE = {
    "step": 21,
    "data": "1/f/(2.0, 1.0)/64/4/split/split/3",
    "first_lane": 0,
    "cursors": [
        [[22, 48], [2, 72]],
        [[22, 37], [3, 194]],
        [[16, 44], [2, 70]],
        [[23, 7], [4, 102]],
    ],
}


def _digest(batches):
    digest = hashlib.sha256()
    for batch in batches:
        for name in FIELDS:
            digest.update(np.ascontiguousarray(batch[name], "<i4").data)
    return digest.hexdigest()[:32]


@pytest.mark.parametrize(("packing", "long_documents"), RECORDED)
def test_the_order_is_the_recorded_one(packing, long_documents):
    train = tuple(FakeDocuments(lengths) for lengths in _LENGTHS)
    validation = tuple(FakeDocuments(lengths[:33]) for lengths in _LENGTHS)
    data = TrainingData(None, (BOS, EOS, PAD), train, validation, (2.0, 1.0), {}, "f")
    config = DataConfig(
        path="DIR",
        sequence_length=64,
        batch_size=4,
        packing=packing,
        long_documents=long_documents,
        shuffle_seed=3,
        prefetch=0,
    )
    iterator = train_iterator(data, config)
    found = _digest(itertools.islice(iterator, 80)), _digest(validation_batches(data, config))
    assert found == RECORDED[packing, long_documents]


def test_a_state_of_then_is_read():
    train = tuple(FakeDocuments(lengths) for lengths in _LENGTHS)
    data = TrainingData(None, (BOS, EOS, PAD), train, train, (2.0, 1.0), {}, "f")
    config = DataConfig(path="DIR", sequence_length=64, batch_size=4, shuffle_seed=3, prefetch=0)
    whole = train_iterator(data, config)
    for _ in range(21):
        next(whole)
    assert json.loads(json.dumps(whole.get_state())) == STATE
    restored = train_iterator(data, config)
    restored.set_state(STATE)
    for name in FIELDS:
        np.testing.assert_array_equal(next(restored)[name], next(whole)[name])
