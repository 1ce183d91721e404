"""A device gets the tokens that it needs and no others, and gradients find their way back."""

import pytest

from tests.sharding.processes import report_of


@pytest.mark.slow
def test_a_fetch_brings_what_is_needed_and_sends_less_than_a_gather():
    report = report_of("tests.sharding.fetch_program")
    assert len(report) == 21
    for name, found in report.items():
        shards, reach = map(int, name.split()[:2])
        assert found["right"], name
        # Both chunks of all devices get their reach; early rows have less before them.
        assert found["sent"] <= reach / (shards * 4), name
