"""`decode_attention`: new queries against a cache of keys and values.

Checked here; computed by a backend of `pallas_kernels.decode`.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lazyattn.call import check_parameters, check_settings
from lazyattn.errors import InputError, bad_value, require
from pallas_kernels.decode import op
from pallas_kernels.decode.types import PAGE, Cache, Call, Settings
from pallas_kernels.own_settings import own_settings

__all__ = ["MAX_NEW", "PAGE", "decode_attention"]

# Queries of a row in one call: one, or a few that are verified together.
MAX_NEW = 8

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def decode_attention(
    query: Float[Array, "batch new heads head_dim"],
    key_cache: Array | Sequence[Array],
    value_cache: Array | Sequence[Array],
    lengths: Int[Array, " batch"],
    *,
    distance_bias: Float[Array, "heads width"] | None = None,
    distance_slope: Float[Array, " heads"] | None = None,
    offset: Float[Array, " heads"] | None = None,
    offset_divisor: Literal["visible"] | float = "visible",
    renormalize: bool = False,
    window: int | Sequence[int | None] | None = None,
    scale: float | None = None,
    ring: bool = False,
    head_groups: Sequence[Sequence[int]] | None = None,
    key_norms: Array | Sequence[Array] | None = None,
    key_scales: Array | Sequence[Array] | None = None,
    value_scales: Array | Sequence[Array] | None = None,
    layer: Int[Array, ""] | int | None = None,
    skip_mass: float = 1e-6,
    implementation: str | None = None,
) -> Float[Array, "batch new heads head_dim"]:
    """Lazy Attention of the newest few positions of each row to a cache that holds their keys.

    The same function as `lazy_attention` with `query_start = lengths - new` on one document a
    row, made for reading the cache once: it is the bytes of the cache that a token costs.
    The caller writes the new keys and values into the cache first. It has no derivatives
    of its own; only "xla" can be differentiated.

    A cache of `slots` places holds position p in slot p mod slots, the newest that was
    written there. So a cache that is long enough holds position p in slot p. A shorter one is a
    ring: with `ring=True` rows may be longer than the cache, and queries see the positions that
    are left of those they would see. tau / n still counts them all. The oldest of the `new`
    queries sees slots - new + 1 positions of a full ring.

    With `head_groups`, heads hold unequally many keys: each group of key/value heads has arrays of
    its own, and `key_cache`, `value_cache`, `key_norms`, `key_scales`, `value_scales` and, where it
    isn't the same for all, `window` are sequences with one for each group. "triton" does all
    groups at once.

    With `layer`, the caches, norms and scales have a leading axis of layers, and the kernel
    reads one layer's part in place. Slicing it out before the call would copy it.

    Args:
      query: queries, rotated by RoPE if the model uses it; query i of row b stands at position
        `lengths[b] - new + i`; new is from 1 to 8. float32, bfloat16, float16 or float64.
      key_cache: [batch, slots, kv_heads, head_dim] rotated keys, in the query's dtype or int8.
        Slots that hold nothing may hold anything.
      value_cache: values, the same shape and dtype.
      lengths: int32, positions each row has had, the new ones included. A query before position
        0 does not exist, and its output is 0: so a row of length 0 is idle. May be traced.
      distance_bias: as in `lazy_attention`.
      distance_slope: as there.
      offset: as there.
      offset_divisor: as there; "visible" is min(position + 1, window).
      renormalize: as there.
      window: as there.
      scale: as there.
      ring: rows may be longer than the cache. If not, the outputs of such rows are NaN.
      head_groups: the key/value heads of each group, each head once: ((0, 1, 4), (2, 3)). Static.
        None: one group of all.
      key_norms: for each page of 128 slots a number that no key held there exceeds in
        Euclidean norm (of int8 keys: times their scale); float32. None: no page of keys
        is skipped for want of mass.
      key_scales: of int8 caches: what the keys of each page are to be multiplied by; float32.
      value_scales: of int8 caches: the same for values.
      layer: int32, which layer of caches that hold several; may be traced. None: they
        have no axis of layers.
      skip_mass: keys may be left out that together hold less than this share of a row's softmax
        mass, certainly and for any input; needs key_norms. 0: none.
      implementation: "triton" (NVIDIA GPUs), "tpu" (TPUs; float32 and bfloat16), "xla_chunked"
        (plain JAX that skips, for CPUs) or "xla" (the definition, which reads all); None: the
        best that applies.

    Returns:
      out, in the shape and dtype of `query`.

    Raises:
      InputError: (a ValueError) for shapes, dtypes or settings that don't fit, or an
        implementation asked for by name that can't do the call.
    """
    query = jnp.asarray(query)
    cached: dict[str, Any] = {
        "key_cache": key_cache,
        "value_cache": value_cache,
        "key_norms": key_norms,
        "key_scales": key_scales,
        "value_scales": value_scales,
    }
    shared: dict[str, Any] = {
        "distance_bias": distance_bias,
        "distance_slope": distance_slope,
        "offset": offset,
    }
    shared = {name: None if x is None else jnp.asarray(x) for name, x in shared.items()}
    if not isinstance(lengths, jax.Array):
        lengths = np.asarray(lengths)
    _check_shared(query, lengths, **shared)
    if head_groups is None:
        groups = [cached | {"window": window}]
    else:
        groups = _split(cached, window, len(head_groups))
    groups = [
        {k: x if x is None or k == "window" else jnp.asarray(x) for k, x in one.items()}
        for one in groups
    ]
    heads = _heads(head_groups, groups[0]["key_cache"])
    number = sum(map(len, heads))
    for own, one in zip(heads, groups, strict=True):
        _check_cache(query, len(own), number, layer, **one)
        dtype = groups[0]["key_cache"].dtype
        found = one["key_cache"].dtype
        require(found == dtype, "key_cache.dtype", str(found), f"{dtype} in all groups")
    check_settings(offset_divisor, renormalize, offset, scale, skip_mass)
    with own_settings():
        caches = tuple(
            Cache(
                tuple(own),
                one["window"],
                *(
                    x if x is None or layer is not None else x[None]
                    for x in (one[name] for name in cached)
                ),
            )
            for own, one in zip(heads, groups, strict=True)
        )
        call = Call(
            query=query,
            lengths=jnp.asarray(lengths, jnp.int32),
            layer=jnp.asarray(0 if layer is None else layer, jnp.int32),
            caches=caches,
            settings=Settings(
                scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
                skip_mass=float(skip_mass),
                window=None,
                offset_scale=None if isinstance(offset_divisor, str) else 1 / float(offset_divisor),
                renormalize=renormalize,
                ring=bool(ring),
            ),
            **shared,
        )
        if implementation is None:
            implementation = op.choose(call)
        else:
            names = ", ".join(op.BACKENDS)
            known = implementation in op.BACKENDS
            require(known, "implementation", implementation, f"one of {names} or None")
            reason = op.unsupported(implementation, call)
            if reason is not None:
                raise InputError(
                    f"implementation {implementation!r} of decode_attention can't do this call,"
                    f" since {reason}."
                )
        return op.attention(implementation, call)


def _split(cached: dict[str, Any], window: Any, number: int) -> list[dict[str, Any]]:
    """Returns the arguments of each group."""
    for name, x in cached.items():
        if x is None:
            continue
        several = isinstance(x, Sequence)
        found = len(x) if several else f"of shape {jnp.shape(x)}"
        require(several and len(x) == number, name, found, f"{number} arrays, one for each group")
    if isinstance(window, Sequence):
        require(len(window) == number, "window", window, f"{number} of them, one for each group")
    else:
        window = [window] * number
    every: dict[str, Any] = {
        name: [None] * number if x is None else x for name, x in cached.items()
    }
    every["window"] = window
    return [{name: x[n] for name, x in every.items()} for n in range(number)]


def _heads(head_groups: Sequence[Sequence[int]] | None, key: Array) -> list[list[int]]:
    """Returns the key/value heads of each group."""
    if head_groups is None:
        return [list(range(key.shape[-2] if key.ndim > 1 else 0))]
    heads = [[int(head) for head in group] for group in head_groups]
    every = [head for group in heads for head in group]
    require(
        bool(heads) and all(heads) and sorted(every) == list(range(len(every))),
        "head_groups",
        heads,
        "groups that together have each key/value head once, none of them empty",
    )
    return heads


def _check_shared(query: Array, lengths: Any, **parameters: Array | None) -> None:
    """Raises InputError unless what all heads share fits together."""
    if query.ndim != 4 or 0 in query.shape or query.shape[1] > MAX_NEW:
        axes = f"[batch, new, heads, head_dim], none of them 0 and new at most {MAX_NEW}"
        raise bad_value("query.shape", query.shape, axes)
    batch, _, heads, _ = query.shape
    names = ", ".join(_DTYPES)
    require(str(query.dtype) in _DTYPES, "query.dtype", str(query.dtype), f"one of {names}")
    check_parameters(heads, **parameters)
    require(jnp.shape(lengths) == (batch,), "lengths.shape", jnp.shape(lengths), f"({batch},)")
    integer = jnp.issubdtype(lengths.dtype, jnp.integer)
    require(integer, "lengths.dtype", str(lengths.dtype), "integer")


def _check_cache(
    query: Array,
    own: int,
    kv_heads: int,
    layer: Any,
    *,
    key_cache: Array,
    value_cache: Array,
    window: Any,
    key_norms: Array | None,
    key_scales: Array | None,
    value_scales: Array | None,
) -> None:
    """Raises InputError unless a cache of `own` of `kv_heads` heads fits the queries."""
    batch, new, heads, head_dim = query.shape
    key, value = key_cache, value_cache
    axes = "[batch, slots, kv_heads, head_dim], after an axis of layers if layer is given"
    require(key.ndim == (4 if layer is None else 5), "key_cache.shape", key.shape, axes)
    *layers, rows, slots, found, key_dim = key.shape
    fits = (rows, found, key_dim) == (batch, own, head_dim) and own > 0 and heads % kv_heads == 0
    require(
        fits and slots >= new and 0 not in layers,
        "key_cache.shape",
        key.shape,
        f"({batch}, at least {new} slots, the heads of a group, {head_dim}), with a divisor of"
        f" {heads} heads in all, to go with query {query.shape}",
    )
    require(value.shape == key.shape, "value_cache.shape", value.shape, f"that of keys {key.shape}")
    allowed = f"{query.dtype} as query's, or int8"
    require(key.dtype in (query.dtype, jnp.int8), "key_cache.dtype", str(key.dtype), allowed)
    allowed = f"{key.dtype} as that of the keys"
    require(value.dtype == key.dtype, "value_cache.dtype", str(value.dtype), allowed)
    shape = (*layers, batch, own, -(-slots // PAGE))
    scales = (("key_scales", key_scales), ("value_scales", value_scales))
    for name, x in (("key_norms", key_norms), *scales):
        if x is not None:
            require(jnp.shape(x) == shape, f"{name}.shape", jnp.shape(x), str(shape))
            floating = jnp.issubdtype(x.dtype, jnp.floating)
            require(floating, f"{name}.dtype", str(x.dtype), "floating")
    quantized = key.dtype == jnp.int8
    for name, x in scales:
        require(
            (x is not None) == quantized,
            name,
            "given" if x is not None else None,
            "given for int8 caches" if quantized else f"None for caches of {key.dtype}",
        )
    require(
        window is None or (isinstance(window, int) and not isinstance(window, bool) and window > 0),
        "window",
        window,
        "None or an integer of at least 1",
    )
    if layer is not None:
        integer = jnp.ndim(layer) == 0 and jnp.issubdtype(jnp.result_type(layer), jnp.integer)
        require(integer, "layer", layer, "an integer")
        if not isinstance(layer, jax.Array):
            require(0 <= layer < layers[0], "layer", layer, f"from 0 to {layers[0] - 1}")
