"""Arrays on a mesh of Explicit axes, which is what `jax.make_mesh` makes."""

import pytest

from tests import explicit_mesh_program as program
from tests.sharding.processes import report_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report():
    """What the program found; devices are fixed when a process starts."""
    return report_of(program.__name__)


@pytest.mark.parametrize("name", [*program.CALLS, "definition", "masks", "blocks"])
def test_output_and_gradients(report, name):
    assert report[name]["error"] < 1e-5


@pytest.mark.parametrize("name", ["weights", "cross"])
def test_output(report, name):
    assert report[name] < 1e-5


def test_each_device_keeps_its_own_rows_and_heads(report):
    for name in ("rows_and_heads", "one_key_head", "two_key_heads", "keys_alone"):
        assert report[name]["out"] == "float32[8@rows,40,4@heads,16]"
    assert report["both_axes_for_rows"]["out"] == "float32[8@(rows,heads),40,4,16]"
