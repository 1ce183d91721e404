import pytest

from tests.sharding.processes import report_of

# `tests/sharding` holds a whole step on a mesh to one device's in the default suite.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report():
    """What tests/model/mesh_program.py found; devices are fixed when a process starts."""
    return report_of("tests.model.mesh_program")


def test_a_mesh_gives_one_device_s_loss_and_gradients(report):
    assert report["loss"] < 1e-5
    assert report["gradients"] < 1e-4


def test_activations_are_split_by_rows(report):
    assert report["rows_of_hidden_states"] == 2


def test_attention_weights_on_a_mesh(report):
    assert report["weights"] < 1e-5


def test_one_prompt_is_continued_on_a_mesh_that_it_does_not_divide_over(report):
    assert report["one_prompt"]


def test_heads_with_and_without_a_window_on_a_mesh(report):
    assert report["window_gradients"] < 1e-4
    assert report["window_weights"] < 1e-5
    assert report["window_tokens"]
    assert report["window_error"] == (
        "model.attention.global_share is 0.5, but it must be a share that gives each of the 4"
        " devices that share the heads equally many global key/value heads, while"
        " model.attention.window is set."
    )


def test_heads_must_divide_among_devices(report):
    assert report["error"] == (
        "model.attention.num_heads is 4, but it must be a multiple of 8, "
        "the devices of the mesh that share the heads."
    )
