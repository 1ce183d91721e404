"""Every mesh computes what one device computes."""

import pytest

from tests.sharding import cases
from tests.sharding.processes import report_of

PROGRAM = "tests.sharding.sameness_program"


def check(report, names, bound=1e-5):
    assert list(report) == list(names)
    for name, found in report.items():
        assert all(difference <= bound for difference in found.values()), (name, found)


def test_one_step_on_a_mesh_of_all_axes():
    names = ("fsdp_tensor_sequence",)
    check(report_of(PROGRAM, "lazy", "0", *names), names)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp_tensor_sequence", "sequence"])
def test_heads_that_fetch_less_on_a_shared_length(name):
    (report,) = report_of("tests.sharding.reach_program", name).values()
    assert len(report) == 3 and max(report.values()) <= 1e-5, report


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lazy", "softmax"])
def test_twenty_steps_on_every_mesh(variant):
    check(report_of(PROGRAM, variant, "20", *cases.MESHES), cases.MESHES)


@pytest.mark.slow
def test_muon_on_a_mesh_of_all_axes():
    names = ("fsdp", "fsdp_tensor_sequence")
    check(report_of(PROGRAM, "lazy+muon", "8", *names), names)


@pytest.mark.slow
def test_qk_norm_where_reaches_are_chosen():
    names = ("fsdp_tensor_sequence", "sequence")
    check(report_of(PROGRAM, "lazy+qk_norm", "3", *names), names)


@pytest.mark.slow
def test_products_in_float8():
    # An entry whose last bit differs may be rounded to another float8, 1/8 away.
    names = ("fsdp_tensor_sequence",)
    check(report_of(PROGRAM, "lazy+fp8", "0", *names), names, 0.02)
