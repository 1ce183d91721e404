"""Trains one call of the op in a process of its own; prints its time and peak memory.

    python -m tests.memory_program 16384 sharp

Batch 1, 4 heads of size 64, float32, W = 1024; a kind of `CALLS`. The time is the least of
up to ten calls, the memory all that the process ever held, Python and JAX included.
"""

import json
import resource
import sys
import time

import jax
import jax.numpy as jnp

from lazyattn import lazy_attention

HEADS, HEAD_DIM, WIDTH = 4, 64, 1024


def _sharp():
    slope = 2.0 ** (-8 * jnp.arange(1, HEADS + 1) / HEADS)
    bias = -slope[:, None] * jnp.arange(WIDTH)
    return {"distance_bias": bias, "distance_slope": slope, "offset": jnp.full(HEADS, -0.5)}


def _paper():
    bias = 0.02 * jax.random.normal(jax.random.key(1), (HEADS, WIDTH))
    return {"distance_bias": bias, "offset": jnp.full(HEADS, -1.0)}


def _jax_softmax(query, key, value):
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


CALLS = {
    "sharp": (lazy_attention, _sharp),
    "paper": (lazy_attention, _paper),
    "softmax": (lazy_attention, dict),
    "jax_softmax": (_jax_softmax, dict),
}


def _peak_kib() -> int:
    """Returns the most memory that this program has held."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        # On Linux this would be that of the process it was started from, if that had more.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(length: int, kind: str) -> None:
    call, parameters = CALLS[kind]
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, length, HEADS, HEAD_DIM))

    @jax.jit
    def gradients(arrays, parameters):
        def loss(arrays, parameters):
            return jnp.sum(call(*arrays, **parameters) ** 2)

        return jax.grad(loss, argnums=(0, 1))(arrays, parameters)

    arguments = (query, key, value), parameters()
    found = jax.block_until_ready(gradients(*arguments))
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(found))
    times: list[float] = []
    while len(times) < 10 and sum(times) < 5:
        begin = time.perf_counter()
        jax.block_until_ready(gradients(*arguments))
        times.append(time.perf_counter() - begin)
    peak = _peak_kib() / 2**20
    print(json.dumps({"seconds": round(min(times), 3), "gibibytes": round(peak, 3)}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
