"""Lazy Attention of new queries to a cache: which backend does it, and what all must do.

For query i of row b at position t = lengths[b] - new + i, over the positions j that the cache
holds (`types.py` says which) with 0 <= t - j, and t - j < window where there is one:

    s_j = scale q . k_j + b(t - j)
    a_j = max(0, softmax(s)_j + tau / n)         n = min(t + 1, window)
    out = sum_j a_j v_j

n counts what the query would see in a full cache, so that a ring divides tau by the same number.

What a backend need not read:

- a page of keys whose softmax mass is negligible (`pages.py` states the rule);
- a page of values whose weights are all 0.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import target
from pallas_kernels.decode import xla, xla_chunked
from pallas_kernels.decode.types import Inputs, Settings, positions

Decode = Callable[[Inputs, Settings], Float[Array, "batch new heads head_dim"]]


def _does_all(inputs: Inputs, settings: Settings) -> str | None:
    del inputs, settings
    return None


# Best first: what does a call, why it can't (None: it can), and the platforms whose default it
# may be (None: every one).
BACKENDS: dict[
    str,
    tuple[Decode, Callable[[Inputs, Settings], str | None], tuple[str, ...] | None],
] = {
    "xla_chunked": (xla_chunked.attention, _does_all, ("cpu",)),
    "xla": (xla.attention, _does_all, None),
}


def unsupported(name: str, inputs: Inputs, settings: Settings) -> str | None:
    """Returns why a backend can't do a call, as the end of "... since ..."; None: it can."""
    return BACKENDS[name][1](inputs, settings)


def choose(inputs: Inputs, settings: Settings) -> str:
    """Returns the name of the best backend for a call."""
    for name, (_, reason, platforms) in BACKENDS.items():
        if platforms is not None and target.platform() not in platforms:
            continue
        if reason(inputs, settings) is None:
            return name
    raise AssertionError("xla does every call")


def attention(
    name: str, inputs: Inputs, settings: Settings, *, ring: bool
) -> Float[Array, "batch new heads head_dim"]:
    """Returns the output of the named backend.

    Args:
      name: of the backend.
      inputs: arrays.
      settings: what is static.
      ring: rows longer than the cache are meant; if not, their outputs are NaN.
    """
    out = BACKENDS[name][0](inputs, settings)
    if not ring:
        fits = (inputs.lengths <= inputs.slots)[:, None, None, None]
        out = jnp.where(fits, out, jnp.nan)
    exists = (positions(inputs) >= 0)[:, :, None, None]
    return jnp.where(exists, out, 0)
