import pytest

from tests.sharding.processes import report_of


@pytest.mark.slow
def test_a_mesh_gives_one_device_s_scores():
    report = report_of("tests.eval.mesh_program", devices=4)
    assert report["difference"] < 1e-4 and report["greedy"]
    assert report["compilations"] == 2
    assert report["rows"] == 2
