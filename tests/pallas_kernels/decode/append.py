"""What writing into caches by a kernel must do: what plain JAX does."""

import jax
import jax.numpy as jnp
import numpy as np

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
        true = jax.jit(rings.append)(GroupCache(*cache), *new, start, real)
        np.testing.assert_array_equal(mine[0].astype("float32"), true.keys.astype("float32"))
        np.testing.assert_array_equal(mine[1].astype("float32"), true.values.astype("float32"))
        np.testing.assert_allclose(mine[2], true.key_norms, rtol=1e-6)
        assert not np.array_equal(mine[0].astype("float32"), cache[0].astype("float32"))
