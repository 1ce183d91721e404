"""Run by test_fetch.py in a process of its own, with eight simulated devices.

    python -m tests.sharding.fetch_program

Prints one JSON object: for each number of devices that share a row and each reach, whether
devices get just the tokens that they should and gradients go back to where these came from,
and what is sent each way, over what a gather sends.
"""

import json
import sys

import jax
import numpy as np
from jax.sharding import PartitionSpec

from benchmarks import sequence_bytes
from lazyattn import sharding
from lazyattn.compile.hlo import Module

SHARDS = (2, 4, 8)
CHUNK = 4
# A part of a chunk, a whole one, some, and half of the shortest row.
REACHES = (0, 1, 4, 6, 8)
# Devices and hops, where the number of hops is known to the running program only.
CHUNKS = ((2, 1), (4, 1), (4, 3), (8, 2), (8, 5), (8, 7))


def check(shards, reach, by_chunks=False):
    """Returns whether values and gradients are right, and the share that is sent."""
    length = 2 * shards * CHUNK
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, sequence=shards), jax.devices()[:shards])
    # [devices, chunks, tokens]: where each device's tokens stand.
    first = np.stack([[r, 2 * shards - 1 - r] for r in range(shards)])[..., None] * CHUNK
    dealt = (first + np.arange(CHUNK)).reshape(-1)
    index = np.arange(length)
    needed = ((index >= first - reach) & (index < first + CHUNK)).any(axis=1)[..., None]
    random = np.random.default_rng(0)
    x = random.standard_normal((length, 2)).astype(np.float32)
    d_out = random.standard_normal((shards, length, 2)).astype(np.float32)
    part = PartitionSpec(None, "sequence")

    def rows(fetch):
        return jax.shard_map(fetch, in_specs=part, out_specs=PartitionSpec("sequence"))

    def both(fetch, x, d_out):
        out, pull = jax.vjp(rows(fetch), x)
        return out, pull(d_out)[0]

    def compiled(fetch):
        return jax.jit(both, static_argnums=0).lower(fetch, x[None, dealt], d_out).compile()

    def fetch(x):
        return sharding.fetch_sequence(x, reach, shards)

    def fetch_chunks(x):
        return sharding.fetch_chunks(x, jax.numpy.int32(reach // CHUNK), shards)

    with jax.set_mesh(mesh):
        fetched = compiled(fetch_chunks if by_chunks else fetch)
        gathered = compiled(sharding.gather_sequence)
        out, d_x = jax.device_get(fetched(x[None, dealt], d_out))
    values = np.array_equal(out, np.where(needed, x, 0))
    d_rows = np.where(needed, d_out, 0).sum(axis=0)[dealt]
    texts = (fetched.as_text(), gathered.as_text())
    sent, all_sent = (sequence_bytes.sent(Module.parse(text)) for text in texts)
    return {
        "right": bool(values and np.allclose(d_x[0], d_rows, atol=1e-5)),
        "sent": sent / all_sent,
    }


def main() -> None:
    report = {f"{n} {reach}": check(n, reach) for n in SHARDS for reach in REACHES}
    for shards, hops in CHUNKS:
        report[f"{shards} {hops * CHUNK} chunks"] = check(shards, hops * CHUNK, by_chunks=True)
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
