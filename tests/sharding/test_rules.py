import jax
import pytest

from lazyattn.errors import InputError
from lazyattn.sharding import MESH_AXES, check_divisible, spec


def _abstract(**sizes):
    return jax.sharding.AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)


def test_spec_reads_the_table():
    assert spec("batch", "length") == jax.sharding.PartitionSpec(("data", "fsdp"), "sequence")
    assert spec(None, "vocab") == jax.sharding.PartitionSpec(None, "tensor")


def test_a_parameter_must_divide_among_the_mesh():
    sharding = jax.sharding.NamedSharding(_abstract(tensor=4), spec("vocab", "embed"))
    shapes = {"embedding": jax.ShapeDtypeStruct((8, 3), "float32")}
    check_divisible(shapes, {"embedding": sharding})
    shapes = {"embedding": jax.ShapeDtypeStruct((10, 3), "float32")}
    with pytest.raises(InputError, match=r"embedding .* 10 is not a multiple of mesh tensor = 4"):
        check_divisible(shapes, {"embedding": sharding})
