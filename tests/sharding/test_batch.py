import jax
import numpy as np
import pytest

from lazyattn.errors import InputError
from lazyattn.sharding import (
    MESH_AXES,
    BatchShare,
    MeshConfig,
    batch_share,
    check_batch,
    make_mesh,
    shard_batch,
    spec,
)
from lazyattn.sharding.batch import _shares


def _abstract(**sizes):
    return jax.sharding.AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)


def test_a_batch_must_divide_among_microbatches_and_mesh():
    mesh = _abstract(data=2, fsdp=2)
    check_batch(mesh, 16, 4)
    with pytest.raises(InputError, match=r"data.batch_size is 12, but it must be a multiple of 8"):
        check_batch(mesh, 12, 2)
    with pytest.raises(InputError, match=r"data.batch_size is 10, but it must be a multiple of 4"):
        check_batch(_abstract(), 10, 4)


def test_a_row_must_divide_into_two_chunks_a_device():
    check_batch(_abstract(sequence=4), 1, 1, 24)
    check_batch(_abstract(), 1, 1, 23)
    with pytest.raises(InputError, match=r"data.sequence_length is 20, .* a multiple of 8"):
        check_batch(_abstract(sequence=4), 1, 1, 20)


def test_shard_batch_keeps_the_rows():
    rows = np.arange(6, dtype=np.int32).reshape(2, 3)
    batch = shard_batch({"inputs": rows}, make_mesh(MeshConfig(), jax.devices()[:1]))
    np.testing.assert_array_equal(batch["inputs"], rows)
    assert batch["inputs"].sharding.spec == spec("batch", "length")


def test_one_process_reads_everything():
    assert batch_share(make_mesh(MeshConfig(), jax.devices()[:1])) == BatchShare(0, 1)


def test_processes_that_hold_the_same_rows_read_the_same():
    # Parts of the rows that each process's devices hold.
    assert _shares({0: (0, 1), 1: (2, 3)}) == [0, 1]
    assert _shares({0: (0,), 1: (0,), 2: (1,), 3: (1,)}) == [0, 0, 1, 1]
    assert _shares({0: (1, 3), 1: (0, 2)}) == [1, 0]


@pytest.mark.parametrize("held", [{0: (0, 1), 1: (1, 2)}, {0: (0,), 1: (1, 2)}])
def test_uneven_parts_are_refused(held):
    with pytest.raises(InputError, match="data x fsdp must be a multiple"):
        _shares(held)
