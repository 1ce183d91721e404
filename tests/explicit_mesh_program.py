"""Run by test_explicit_mesh.py in a process of its own, with eight simulated devices.

Prints one JSON object: for each call the largest relative error of output and gradients
against the same call on one device, and how the output is sharded.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lazyattn import cross_attention, lazy_attention
from tests import oracle

P = PartitionSpec
ROWS_AND_HEADS = P("rows", None, "heads")
# Key heads, and how queries, keys and values, and parameters lie.
CALLS = {
    "rows_and_heads": (4, ROWS_AND_HEADS, ROWS_AND_HEADS, P("heads")),
    "one_key_head": (1, ROWS_AND_HEADS, P("rows"), P()),
    "two_key_heads": (2, ROWS_AND_HEADS, P("rows"), P("heads")),
    "length": (4, P("rows", "heads"), P("rows", "heads"), P()),
    "keys_alone": (4, P(), P("rows", None, "heads"), P()),
    "both_axes_for_rows": (4, P(("rows", "heads")), P(("rows", "heads")), P()),
}


def report(kv_heads, queries, keys, parameters, implementation, length=40, **more):
    mesh = jax.make_mesh((2, 4), ("rows", "heads"))
    shape = (8, length, 4, kv_heads, 16)
    case = oracle.Case("", shape, 16, "alibi", True, documents=(17, 23), **more)
    args = oracle.inputs(case)
    masks = {name: args.pop(name) for name in ("segment_ids", "prefix") if name in args}
    place = {"query": queries, "key": keys, "value": keys}
    placed = {
        name: jax.device_put(x, NamedSharding(mesh, place.get(name, parameters)))
        for name, x in args.items()
    }

    def call(args, masks):
        out = lazy_attention(**args, **masks, implementation=implementation)
        return jnp.sum(out**2), out

    run = jax.jit(jax.value_and_grad(call, has_aux=True))
    true, found = run(args, masks), run(placed, masks)
    with jax.set_mesh(mesh):
        again = run(placed, masks)
    errors = [
        oracle.relative_error(np.asarray(a, np.float64), np.asarray(b, np.float64))
        for results in (found, again)
        for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(true), strict=True)
    ]
    # Outside jit, too; masks lie on one device.
    out = lazy_attention(**placed, **masks, implementation=implementation)
    errors.append(oracle.relative_error(np.asarray(out), np.asarray(true[0][1])))
    return {"error": max(errors), "out": str(jax.typeof(found[0][1]))}


def weights_report():
    mesh = jax.make_mesh((2, 4), ("rows", "heads"))
    args = oracle.inputs(oracle.Case("", (2, 12, 4, 4, 8)))
    true = lazy_attention(**args, return_weights=True)
    args["query"] = jax.device_put(args["query"], NamedSharding(mesh, ROWS_AND_HEADS))
    found = lazy_attention(**args, return_weights=True)
    return max(
        oracle.relative_error(np.asarray(a), np.asarray(b))
        for a, b in zip(found, true, strict=True)
    )


def cross_report():
    mesh = jax.make_mesh((2, 4), ("rows", "heads"))
    args = oracle.inputs(oracle.Case("", (2, 12, 4, 4, 8), width=0, sink=(0.3,)))
    args["query"] = args["query"][:, :5]
    lengths = np.array([12, 7])
    true = cross_attention(**args, key_lengths=lengths)
    args["query"] = jax.device_put(args["query"], NamedSharding(mesh, ROWS_AND_HEADS))
    found = cross_attention(**args, key_lengths=lengths)
    return oracle.relative_error(np.asarray(found), np.asarray(true))


def main() -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    found = {name: report(*call, "xla_chunked") for name, call in CALLS.items()}
    found["definition"] = report(*CALLS["rows_and_heads"], "xla")
    only_xla = {"sink": (0.3, -0.5), "prefix": "some"}
    found["masks"] = report(*CALLS["rows_and_heads"], "xla", **only_xla)
    found["blocks"] = report(*CALLS["one_key_head"], None, length=260, **only_xla)
    found["weights"] = weights_report()
    found["cross"] = cross_report()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
