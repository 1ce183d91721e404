"""Lazy Attention of new queries to a cache: which backend does it, and what all must do.

For query i of row b at position t = lengths[b] - new + i, over the positions j that the cache
holds (`types.py` says which) with 0 <= t - j, and t - j < window where there is one:

    s_j = scale q . k_j + b(t - j)
    a_j = max(0, softmax(s)_j + tau / n)         n = min(t + 1, window)
    out = sum_j a_j v_j

and 0 for a query before position 0, and NaN for a row longer than a cache that is no ring.
n counts what the query would see in a full cache, so that a ring divides tau by the same number.

What a backend need not read:

- a page of keys whose softmax mass is negligible (`pages.py` states the rule);
- a page of values whose weights are all 0.
"""

import functools
from collections.abc import Callable

from jaxtyping import Array, Float

from pallas_kernels import target
from pallas_kernels.decode import xla, xla_chunked
from pallas_kernels.decode.types import Call, one_by_one
from pallas_kernels.tpu import support as tpu_support
from pallas_kernels.triton import support as triton_support


def _triton(call: Call) -> Array:
    from pallas_kernels.decode import triton  # Triton takes a second to import.

    return triton.attention(call)


def _triton_unsupported(call: Call) -> str | None:
    head_dim = call.query.shape[-1]
    for cache in call.caches:
        # Places within a row are 32-bit numbers.
        if cache.slots * len(cache.heads) * head_dim >= 2**31:
            return f"a row of {cache.slots} keys has 2**31 numbers or more"
    return triton_support.refusal(head_dim, head_dim, call.query.dtype)


def _tpu(call: Call) -> Array:
    from pallas_kernels.decode import tpu  # Pallas's TPU part takes a while to import.

    return one_by_one(tpu.attention, call)


def _tpu_unsupported(call: Call) -> str | None:
    reason = tpu_support.unavailable()
    if reason is not None:
        return reason
    from pallas_kernels.decode import tpu

    return tpu.unsupported(call)


def _does_all(call: Call) -> str | None:
    del call
    return None


# Best first: what does a call, why it can't (None: it can), and the platforms whose default it
# may be (None: every one).
BACKENDS: dict[
    str,
    tuple[Callable[[Call], Array], Callable[[Call], str | None], tuple[str, ...] | None],
] = {
    "triton": (_triton, _triton_unsupported, ("gpu",)),
    "tpu": (_tpu, _tpu_unsupported, ("tpu",)),
    "xla_chunked": (functools.partial(one_by_one, xla_chunked.attention), _does_all, ("cpu",)),
    "xla": (functools.partial(one_by_one, xla.attention), _does_all, None),
}


def unsupported(name: str, call: Call) -> str | None:
    """Returns why a backend can't do a call, as the end of "... since ..."; None: it can."""
    return BACKENDS[name][1](call)


def choose(call: Call) -> str:
    """Returns the name of the best backend for a call."""
    for name, (_, reason, platforms) in BACKENDS.items():
        if platforms is not None and target.platform() not in platforms:
            continue
        if reason(call) is None:
            return name
    raise AssertionError("xla does every call")


def attention(name: str, call: Call) -> Float[Array, "batch new heads head_dim"]:
    """Returns the output of the named backend."""
    return BACKENDS[name][0](call)
