"""Run by test_sameness.py in a process of its own, with eight simulated devices.

    python -m tests.sharding.reach_program MESH...

Prints one JSON object: for each mesh the largest relative difference from one device of the
output and the gradients of attention, in each of `CASES`, of rows that hold several documents;
and how far each group of heads fetches, where it has a choice.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from lazyattn import sharding
from lazyattn.model import fetch
from lazyattn.model.heads import HeadBlocks
from lazyattn.model.sharded_attention import sharded_attention
from tests import oracle
from tests.sharding import cases
from tests.sharding.sameness_program import difference

INPUTS = oracle.Case("reach", (8, cases.LENGTH, 8, 4, 8), 10, "alibi", True, documents=(29, 30))
# Steep enough for rows of 48 tokens, two query heads to a key head: the last sees all.
SLOPES = np.array([8, 7, 1, 0.9, 3, 2.5, 0.3, 0.2], np.float32)
# Eight devices share a row in chunks of 3 tokens.
CASES = {
    "window of 2 chunks": {"window": 7},
    "window of 7 chunks, global heads": {"window": 20, "blocks": HeadBlocks(2, 2, 1)},
    "bias": {"bound": SLOPES},
}


def arguments(case):
    """Returns the op's arguments; with a bound no score is above 1 before the bias."""
    args = oracle.inputs(INPUTS)
    if "bound" in CASES[case]:
        for name in ("query", "key"):
            args[name] *= 8**0.25 / np.linalg.norm(args[name], axis=-1, keepdims=True)
        args["distance_bias"] = -SLOPES[:, None] * np.arange(10, dtype=np.float32)
        args["distance_slope"] = SLOPES
        args["offset"] = -np.abs(args["offset"])
    return args


def run(case, mesh):
    """Returns the output and the gradients."""
    args, settings = arguments(case), CASES[case]
    d_out = np.random.default_rng(1).standard_normal(args["query"].shape).astype(np.float32)
    if "bound" in settings:
        settings = {"bound": fetch.Bound(jnp.float32(1), settings["bound"])}

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
            skip_mass=1e-6,
            **settings,
        )
        out = sharding.collect_sequence(out)
        return jnp.sum(out * d_out), out

    floats = {name: jnp.asarray(x) for name, x in args.items() if name in oracle.GRADIENTS}
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, has_aux=True))
        return jax.device_get(gradient(floats, jnp.asarray(args["segment_ids"])))


def main() -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    one = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    meshes = {name: sharding.make_mesh(cases.MESHES[name]) for name in sys.argv[1:]}
    report = {name: {} for name in meshes}
    for case in CASES:
        expected = run(case, one)
        for name, mesh in meshes.items():
            report[name][case] = difference(run(case, mesh), expected)
            print(name, case, report[name][case], file=sys.stderr, flush=True)
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
