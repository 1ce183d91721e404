"""Run by test_sameness.py in a process of its own, with eight simulated devices.

    python -m tests.sharding.window_program MESH...

Prints one JSON object: for each mesh the largest relative difference from one device of the
output and the gradients of attention with a window, of rows that hold several documents.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from lazyattn import sharding
from lazyattn.model.sharded_attention import sharded_attention
from tests import oracle
from tests.sharding import cases
from tests.sharding.sameness_program import difference

CASE = oracle.Case("window", (8, cases.LENGTH, 8, 4, 8), 10, "alibi", True, documents=(29, 30))
# Longer than a chunk of a length that eight devices share, and shorter than a document.
WINDOW = 7


def run(args, d_out, mesh):
    """Returns the output and the gradients."""

    def loss(floats, ids):
        shards = sharding.sequence_shards(cases.LENGTH)
        given = {"segment_ids": ids} | floats
        dealt = {
            name: sharding.deal_sequence(x) if x.ndim == 4 or name == "segment_ids" else x
            for name, x in given.items()
        }
        qkv = [dealt.pop(name) for name in ("query", "key", "value")]
        out = sharded_attention(
            *qkv,
            dealt,
            sequence_shards=shards,
            return_weights=False,
            implementation="xla_chunked",
            window=WINDOW,
        )
        out = sharding.collect_sequence(out)
        return jnp.sum(out * d_out), out

    floats = {name: jnp.asarray(x) for name, x in args.items() if name in oracle.GRADIENTS}
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, has_aux=True))
        return jax.device_get(gradient(floats, jnp.asarray(args["segment_ids"])))


def main() -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    args = oracle.inputs(CASE)
    d_out = np.random.default_rng(1).standard_normal(args["query"].shape).astype(np.float32)
    one = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    expected = run(args, d_out, one)
    meshes = {name: sharding.make_mesh(cases.MESHES[name]) for name in sys.argv[1:]}
    report = {name: difference(run(args, d_out, mesh), expected) for name, mesh in meshes.items()}
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
