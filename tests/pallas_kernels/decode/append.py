"""What writing into caches by a kernel must do: what plain JAX does."""

import jax
import jax.numpy as jnp
import numpy as np

from lazyattn import rotary
from lazyattn.generation import rings
from lazyattn.generation.cache import GroupCache, pages
from pallas_kernels.decode import append

HEADS = ((3, 0), (1,), (4, 2, 5))
SLOTS = (300, 128, 40)


def _caches(batch, dtype, all_slots, head_dim=24):
    rng = np.random.default_rng(0)
    found = []
    for own, slots in zip(HEADS, all_slots, strict=True):
        keys, values = (
            jnp.asarray(rng.standard_normal((batch, slots, len(own), head_dim)), dtype)
            for _ in range(2)
        )
        norms = jnp.asarray(3 + rng.random((batch, len(own), pages(slots))), jnp.float32)
        found.append((keys, values, norms))
    new = [jnp.asarray(rng.standard_normal((batch, 8, 6, head_dim)), dtype) for _ in range(2)]
    return found, new


def check(dtype, slots=SLOTS):
    """Pages begun, gone on and come back to; rows with all, some or none of the positions."""
    start = jnp.asarray([0, 124, 298, 10, 126], jnp.int32)
    count = jnp.asarray([8, 8, 5, 0, 3], jnp.int32)
    held, (keys, values) = _caches(5, dtype, slots)

    @jax.jit
    def call(held, keys, values):
        return append.append(held, HEADS, keys, values, start, count)

    found = call(held, keys, values)
    real = jnp.arange(8) < count[:, None]
    for cache, own, mine in zip(held, HEADS, found, strict=True):
        new = (x[:, :, list(own)] for x in (keys, values))
        true = rings.append(GroupCache(*cache), *new, start, real)
        np.testing.assert_array_equal(mine[0].astype("float32"), true.keys.astype("float32"))
        np.testing.assert_array_equal(mine[1].astype("float32"), true.values.astype("float32"))
        np.testing.assert_allclose(mine[2], true.key_norms, rtol=1e-6)
        assert not np.array_equal(mine[0].astype("float32"), cache[0].astype("float32"))


def check_enter(dtype, *, normed=True, group=2, head_dim=24):
    """Queries, keys and values of a product: normed and turned, and then appended."""
    start = jnp.asarray([0, 124, 298, 10, 126], jnp.int32)
    count = jnp.asarray([3, 3, 2, 0, 1], jnp.int32)
    held, _ = _caches(5, dtype, SLOTS, head_dim)
    rng = np.random.default_rng(1)
    kv_heads = sum(map(len, HEADS))
    heads = group * kv_heads
    projected = jnp.asarray(rng.standard_normal((5, 3, heads + 2 * kv_heads, head_dim)), dtype)
    scales = [jnp.asarray(1 + 0.1 * rng.standard_normal(head_dim), jnp.float32) for _ in range(2)]
    positions = start[:, None] + jnp.arange(3)

    @jax.jit
    def call(held, projected, scales):
        angles = rotary.cos_and_sin(positions, head_dim, 1e4)
        return append.enter(
            held, HEADS, projected, scales if normed else None, angles, start, count, 1e-5
        )

    query, found = call(held, projected, scales)
    parts = jnp.split(projected, [heads, heads + kv_heads], axis=2)
    if normed:
        true = [rotary.norm_rotate(x, scale, positions, 1e4, 1e-5, "xla")
                for x, scale in zip(parts, scales, strict=False)]  # fmt: skip
    else:
        true = [rotary.rotate(x, positions, 1e4) for x in parts[:2]]
    unit = {"float32": 1e-5, "bfloat16": 2**-7}[dtype]
    np.testing.assert_allclose(*(x.astype("float32") for x in (query, true[0])), atol=4 * unit)
    real = jnp.arange(3) < count[:, None]
    for cache, own, mine in zip(held, HEADS, found, strict=True):
        new = (x[:, :, list(own)] for x in (true[1], parts[2]))
        whole = rings.append(GroupCache(*cache), *new, start, real)
        names = (whole.keys, whole.values, whole.key_norms)
        for x, y in zip(mine, names, strict=True):
            np.testing.assert_allclose(x.astype("float32"), y.astype("float32"), atol=4 * unit)
