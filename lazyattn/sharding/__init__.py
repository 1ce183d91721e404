"""Where arrays lie: the mesh, the table of logical axes, and what follows from both.

Nothing else in the package names a mesh axis.
"""

from lazyattn.sharding.batch import (
    BatchShare,
    batch_share,
    check_batch,
    shard_batch,
    shares_by_process,
)
from lazyattn.sharding.mesh import MESH_AXES, MeshConfig, make_mesh
from lazyattn.sharding.rules import (
    RULES,
    active_mesh,
    check_divisible,
    constrain,
    fitting_spec,
    mesh_axes,
    num_shards,
    spec,
)
from lazyattn.sharding.sequence import (
    chunk_starts,
    collect_sequence,
    deal_sequence,
    fetch_chunks,
    fetch_sequence,
    gather_sequence,
    sequence_shards,
)

__all__ = [
    "MESH_AXES",
    "RULES",
    "BatchShare",
    "MeshConfig",
    "active_mesh",
    "batch_share",
    "check_batch",
    "check_divisible",
    "chunk_starts",
    "collect_sequence",
    "constrain",
    "deal_sequence",
    "fetch_chunks",
    "fetch_sequence",
    "fitting_spec",
    "gather_sequence",
    "make_mesh",
    "mesh_axes",
    "num_shards",
    "sequence_shards",
    "shard_batch",
    "shares_by_process",
    "spec",
]
