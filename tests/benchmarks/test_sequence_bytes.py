"""How far heads with learned spans fetch, and what that sends."""

import numpy as np
import pytest

from benchmarks import sequence_bytes
from lazyattn.model.fetch import Group
from tests.sharding.processes import report_of


def test_a_group_goes_as_far_as_its_longest_span():
    reaches = (4, 16, 64, None)
    groups = (Group((1, 2), reaches), Group((0,), reaches))
    spans = np.array([[5, 17, 3], [6, 65, 66], [1, 1, 1]])
    found = sequence_bytes.by_spans(spans, groups)
    np.testing.assert_array_equal(found, [[1, 0], [3, 1], [0, 0]])
    assert sequence_bytes.layers_by_reach(groups[0], found[:, 0]) == {"4": 1, "16": 1, "None": 1}


@pytest.mark.slow
def test_most_keys_of_a_long_row_stay_where_they_are():
    found = report_of("benchmarks.sequence_bytes", "--length=65536")
    assert found["share"] <= 0.1
    # Twice the row, 8 heads of 64, four times in each of 12 layers, to seven others.
    elements = 2 * 65_536 * 8 * 64 * 4 * 12 * 7
    assert found["gathered_bytes"] in (2 * elements, 4 * elements)
