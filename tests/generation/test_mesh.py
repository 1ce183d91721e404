"""A cache over the devices of a mesh, which share rows and heads."""

import pytest

from tests.sharding.processes import report_of


@pytest.mark.slow
def test_a_mesh_gives_one_device_s_logits():
    assert max(report_of("tests.generation.mesh_program")) < 1e-5
