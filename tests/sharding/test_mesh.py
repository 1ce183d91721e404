import types

import jax
import numpy as np
import pytest

from lazyattn.errors import InputError
from lazyattn.sharding import MESH_AXES, MeshConfig, make_mesh
from lazyattn.sharding.mesh import across_slices


def test_one_device_is_a_mesh_of_ones():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert mesh.axis_names == MESH_AXES
    assert set(mesh.shape.values()) == {1}


def test_mesh_must_fit_the_devices():
    with pytest.raises(InputError, match=r"mesh is .*'tensor': 3.* a product of 1, the number of"):
        make_mesh(MeshConfig(data=1, tensor=3), jax.devices()[:1])
    with pytest.raises(InputError, match=r"mesh is .* a product of 1"):
        make_mesh(MeshConfig(data=-1, tensor=3), jax.devices()[:1])


@pytest.mark.parametrize(
    "sizes", [{"data": 0}, {"fsdp": -2}, {"data": -1, "tensor": -1}, {"sequence": -3}]
)
def test_bad_mesh_sizes(sizes):
    with pytest.raises(InputError, match="mesh"):
        MeshConfig(**sizes)


@pytest.mark.parametrize(
    ("sizes", "slices", "parts"),
    [
        ((4, 2, 1, 1), 2, [2, 1, 1, 1]),
        ((2, 8, 2, 1), 4, [2, 2, 1, 1]),
        ((1, 1, 4, 2), 4, [1, 1, 4, 1]),
        ((3, 4, 1, 1), 6, [3, 2, 1, 1]),
        ((8, 1, 1, 1), 1, [1, 1, 1, 1]),
    ],
)
def test_the_first_axes_cross_slices(sizes, slices, parts):
    assert across_slices(sizes, slices) == parts


def _devices(slices, each):
    """Stand-ins for the devices of several slices, in an order that mixes them."""
    found = [
        types.SimpleNamespace(
            id=i,
            slice_index=i % slices,
            process_index=i % slices,
            platform="cpu",
            device_kind="stand-in",
        )
        for i in range(slices * each)
    ]
    return found


def test_neighbours_on_inner_axes_are_of_one_slice(monkeypatch):
    # A mesh of stand-ins is enough to see where they went.
    monkeypatch.setattr(jax.sharding, "Mesh", lambda devices, axes: (devices, axes))
    devices, axes = make_mesh(MeshConfig(data=4, fsdp=1, tensor=2), _devices(2, 4))
    assert axes == MESH_AXES
    assert devices.shape == (4, 1, 2, 1)
    slices = np.vectorize(lambda device: device.slice_index)(devices)[:, 0, :, 0]
    np.testing.assert_array_equal(slices, [[0, 0], [0, 0], [1, 1], [1, 1]])
    assert sorted(device.id for device in devices.flat) == list(range(8))
