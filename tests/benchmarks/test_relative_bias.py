"""Attention with a learned relative bias, by everyone that can on a CPU: the same function."""

import types

import numpy as np
import pytest

from benchmarks import cases, relative_bias

SHAPE = cases.Shape(2, 4, 64, 16, 2)


def _options(**changes):
    small = {"cases": ["flat", "alibi"], "passes": ["forward", "training"], "dtype": "float32"}
    return types.SimpleNamespace(**(small | {"calls": 1, "rounds": 1} | changes))


@pytest.mark.slow
def test_all_compute_the_same():
    names = ["lazyattn", "lazyattn_all", "xla"]
    parts = relative_bias.run_shape(SHAPE, _options(implementations=names))
    found = [line for part in parts for line in part]
    assert len(found) == 4 * len(names)
    for line in found:
        assert line.error is None and line.difference < 2e-5, line
        assert line.same_bits and line.milliseconds > 0
        assert (line.table_difference is not None) == (line.which == "training")
    assert "| alibi | training | xla |" in relative_bias.as_table(found)


def test_flex_attention():
    pytest.importorskip("torch")
    options = _options(implementations=["flex_attention"], passes=["forward"])
    for (line,) in relative_bias.run_shape(SHAPE, options):
        assert line.error is None and line.difference < 2e-5, line


def test_a_difference_is_seen():
    """A bias that is one distance off."""
    tensors = cases.tensors(SHAPE, "float32", seed=1)
    table = relative_bias.table_of("alibi", SHAPE)
    true = relative_bias.truth("training", tensors, np.roll(table, 1, axis=1))
    line, _ = relative_bias.measure("lazyattn", "alibi", "training", SHAPE, tensors, true)
    assert line.difference > 0.01 and line.table_difference > 0.01


def test_what_can_not_run_says_why():
    options = _options(implementations=["cudnn"], cases=["flat"], passes=["forward"])
    (found,) = relative_bias.run_shape(SHAPE, options)
    assert found[0].error and found[0].milliseconds == 0
    assert found[0].error in relative_bias.as_table(found)
