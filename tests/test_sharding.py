import jax
import numpy as np
import pytest

from lazyattn.errors import InputError
from lazyattn.sharding import (
    MESH_AXES,
    MeshConfig,
    check_batch,
    check_divisible,
    make_mesh,
    shard_batch,
    spec,
)


def _abstract(**sizes):
    return jax.sharding.AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)


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
    "sizes", [{"data": 0}, {"fsdp": -2}, {"data": -1, "tensor": -1}, {"sequence": 2}]
)
def test_bad_mesh_sizes(sizes):
    with pytest.raises(InputError, match="mesh"):
        MeshConfig(**sizes)


def test_spec_reads_the_table():
    assert spec("batch", "length") == jax.sharding.PartitionSpec(("data", "fsdp"), None)
    assert spec(None, "vocab") == jax.sharding.PartitionSpec(None, "tensor")


def test_a_batch_must_divide_among_microbatches_and_mesh():
    mesh = _abstract(data=2, fsdp=2)
    check_batch(mesh, 16, 4)
    with pytest.raises(InputError, match=r"data.batch_size is 12, but it must be a multiple of 8"):
        check_batch(mesh, 12, 2)
    with pytest.raises(InputError, match=r"data.batch_size is 10, but it must be a multiple of 4"):
        check_batch(_abstract(), 10, 4)


def test_a_parameter_must_divide_among_the_mesh():
    sharding = jax.sharding.NamedSharding(_abstract(tensor=4), spec("vocab", "embed"))
    shapes = {"embedding": jax.ShapeDtypeStruct((8, 3), "float32")}
    check_divisible(shapes, {"embedding": sharding})
    shapes = {"embedding": jax.ShapeDtypeStruct((10, 3), "float32")}
    with pytest.raises(InputError, match=r"embedding .* 10 is not a multiple of mesh tensor = 4"):
        check_divisible(shapes, {"embedding": sharding})


def test_shard_batch_keeps_the_rows():
    rows = np.arange(6, dtype=np.int32).reshape(2, 3)
    batch = shard_batch({"inputs": rows}, make_mesh(MeshConfig(), jax.devices()[:1]))
    np.testing.assert_array_equal(batch["inputs"], rows)
    assert batch["inputs"].sharding.spec == spec("batch", "length")
