"""A batch on the mesh: which rows a process reads, and where they go."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from lazyattn.errors import InputError, require
from lazyattn.sharding.rules import num_shards, spec


@dataclasses.dataclass(frozen=True)
class BatchShare:
    """Which part of every batch a process reads.

    Attributes:
      index: of the part.
      count: equal parts of a batch. Fewer than processes where some of these hold the
        same rows, that is, where a row's length or a layer's heads are split among
        them.
    """

    index: int
    count: int


def batch_share(mesh: jax.sharding.Mesh) -> BatchShare:
    """Returns this process's part.

    Raises:
      InputError: if the mesh deals rows unevenly among processes.
    """
    shares = shares_by_process(mesh)
    return BatchShare(shares[jax.process_index()], len(set(shares)))


def shares_by_process(mesh: jax.sharding.Mesh) -> list[int]:
    """Returns for every process the index of its part of a batch; raises as `batch_share`."""
    if jax.process_count() == 1:
        return [0]
    return _shares(_row_shards_by_process(mesh))


def _shares(held: Mapping[int, tuple[int, ...]]) -> list[int]:
    """As above, given which parts of the rows each process's devices hold."""
    groups = sorted(set(held.values()))
    every = [shard for group in groups for shard in group]
    if len(set(every)) != len(every) or len({len(group) for group in groups}) != 1:
        raise InputError(
            "mesh gives processes parts of a batch that overlap in part: data x fsdp must be a"
            " multiple of the number of processes, or divide it."
        )
    return [groups.index(held[process]) for process in sorted(held)]


def _row_shards_by_process(mesh: jax.sharding.Mesh) -> dict[int, tuple[int, ...]]:
    """Returns for each process which parts of the rows its devices hold, in order."""
    shards = num_shards(mesh, "batch")
    place = jax.sharding.NamedSharding(mesh, spec("batch"))
    held: dict[int, set[int]] = {}
    devices: dict[Any, Any] = dict(place.devices_indices_map((shards,)))
    for device, (rows,) in devices.items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    return {process: tuple(sorted(found)) for process, found in held.items()}


def check_batch(
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    batch_size: int,
    microbatches: int = 1,
    sequence_length: int | None = None,
) -> None:
    """Checks that microbatches and the mesh divide the batch.

    Args:
      mesh: the mesh.
      batch_size: rows a step, over all devices and microbatches.
      microbatches: parts of a batch.
      sequence_length: tokens a row; None: don't check it.

    Raises:
      InputError: if they don't, before anything is compiled.
    """
    shards = num_shards(mesh, "batch")
    require(
        batch_size % (microbatches * shards) == 0,
        "data.batch_size",
        batch_size,
        f"a multiple of {microbatches * shards}: training.microbatches = {microbatches}"
        f" times the mesh's {shards} parts of a batch",
    )
    shards = num_shards(mesh, "length")
    if sequence_length is not None and shards > 1:
        require(
            sequence_length % (2 * shards) == 0,
            "data.sequence_length",
            sequence_length,
            f"a multiple of {2 * shards}, two chunks for each of the mesh's {shards} parts of a"
            " row",
        )


def shard_batch(
    batch: Mapping[str, Int[np.ndarray, "rows length"]], mesh: jax.sharding.Mesh
) -> dict[str, Int[Array, "batch length"]]:
    """Returns arrays over the whole mesh, given this process's rows.

    Args:
      batch: the rows of `batch_share(mesh)`, of full length.
      mesh: where they go; a length that it doesn't divide is not split.
    """
    share = batch_share(mesh)
    return {name: _place(np.asarray(array), mesh, share) for name, array in batch.items()}


def _place(
    rows: Int[np.ndarray, "rows length"], mesh: jax.sharding.Mesh, share: BatchShare
) -> Int[Array, "batch length"]:
    length = "length" if rows.shape[1] % num_shards(mesh, "length") == 0 else None
    sharding = jax.sharding.NamedSharding(mesh, spec("batch", length))
    shape = (rows.shape[0] * share.count, rows.shape[1])
    if share.count == 1:
        return jax.make_array_from_callback(shape, sharding, lambda index: rows[index])
    # A process's parts of the batch need not be neighbours; its rows fill them in order.
    part = shape[0] // num_shards(mesh, "batch")
    mine = _row_shards_by_process(mesh)[jax.process_index()]

    def local(index: Any) -> Any:
        number = mine.index((index[0].start or 0) // part)
        return rows[number * part : (number + 1) * part, index[1]]

    return jax.make_array_from_callback(shape, sharding, local)
