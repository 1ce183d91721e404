"""One checked call of `lazy_attention`, as backends get it."""

import dataclasses
import math
import numbers
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Bool, Float, Int

from lazyattn.errors import InputError, bad_value, require
from pallas_kernels.problem import Inputs, Problem, current_options

_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class Call:
    """One checked call: the arguments of `lazy_attention`, defaults filled in."""

    query: Float[Array, "batch length heads head_dim"]
    key: Float[Array, "batch key_length kv_heads head_dim"]
    value: Float[Array, "batch key_length kv_heads value_dim"]
    distance_bias: Float[Array, "heads width"] | None
    distance_slope: Float[Array, " heads"] | None
    offset: Float[Array, " heads"] | None
    offset_divisor: Literal["visible"] | float
    renormalize: bool
    segment_ids: Int[Array, "batch key_length"] | None
    query_start: Int[Array | np.ndarray, " batch"] | None
    chunk_starts: Int[Array | np.ndarray, " chunks"] | None
    window: int | None
    scale: float
    skip_mass: float
    return_weights: bool
    # What tau is divided by, for each query; None: as offset_divisor says.
    divisor: Array | None = None
    # What only the definition has.
    sink: Float[Array, " heads"] | None = None
    soft_cap: float | None = None
    prefix: Bool[Array, "batch key_length"] | None = None
    # Every query sees the same keys: the first `key_lengths`; None: all.
    cross: bool = False
    key_lengths: Int[Array | np.ndarray, " batch"] | None = None

    @property
    def narrowed(self) -> bool:
        """Whether some query may not see all keys before it."""
        limits = (self.segment_ids, self.chunk_starts, self.window)
        return any(limit is not None for limit in limits)

    def position(self) -> Int[Array, "batch length"]:
        """Returns the index of the key at each query's own position."""
        batch, length = self.query.shape[:2]
        if self.cross:
            number = self.key.shape[1] if self.key_lengths is None else self.key_lengths
            last = jnp.asarray(number, jnp.int32).reshape(-1, 1) - 1
            return jnp.broadcast_to(last, (batch, length))
        if self.chunk_starts is not None:
            within = jnp.arange(length // self.chunk_starts.shape[0], dtype=jnp.int32)
            places = jnp.asarray(self.chunk_starts)[:, None] + within
            return jnp.broadcast_to(places.reshape(-1), (batch, length))
        start = jnp.zeros(batch, jnp.int32) if self.query_start is None else self.query_start
        return jnp.asarray(start)[:, None] + jnp.arange(length, dtype=jnp.int32)

    @property
    def symbolic_axes(self) -> list[str]:
        """Returns the axes whose sizes are no numbers yet, as in exports with symbolic shapes."""
        axes = ("batch", "length", "heads", "head_dim")
        pairs = zip(axes, self.query.shape, self.key.shape, strict=True)
        return [axis for axis, *sizes in pairs if any(map(export.is_symbolic_dim, sizes))]

    def poison(self) -> Float[Array, "batch length"] | None:
        """Returns NaN for each query without a key of its own and 1 for the others.

        None: all have one, which is checked where their places are known. Where they are
        traced, outputs and their gradients are multiplied by this: a query past the keys must
        not look like one that attends to something. A chunk stands or falls as a whole.
        """
        starts = self.query_start if self.chunk_starts is None else self.chunk_starts
        starts = starts if self.key_lengths is None else self.key_lengths
        if starts is None or is_known(starts):
            return None
        batch, length = self.query.shape[:2]
        key_length = self.key.shape[1]
        if self.chunk_starts is None:
            position = self.position()
            exists = (position >= 0) & (position < key_length)
        else:
            size, starts = length // starts.shape[0], jnp.asarray(starts)
            exists = (starts >= 0) & (starts <= key_length - size)
            # Kernels have one place a key: chunks that would share some are no good either.
            places = jnp.stack(self.places())
            near = jnp.abs(places[:, None] - places) < size
            exists &= near.sum(axis=1) == 1
            exists = jnp.broadcast_to(jnp.repeat(exists, size), (batch, length))
        return jnp.where(exists, 1.0, jnp.nan)

    def places(self) -> list[Any]:
        """Returns where each chunk stands; the nearest place within the keys if it is outside."""
        assert self.chunk_starts is not None
        last = self.key.shape[1] - self.query.shape[1] // self.chunk_starts.shape[0]
        if is_known(self.chunk_starts):
            return list(self.chunk_starts)
        return list(jnp.clip(self.chunk_starts, 0, last))

    def visibility(self) -> tuple[Int[Array, "batch length"], Float[Array, "batch length"]]:
        """Returns the first key that each query sees, and its factor of tau."""
        position = self.position()
        if self.segment_ids is None:
            first = jnp.zeros_like(position)
        else:
            first = document_starts(self.segment_ids)
            if self.query_start is not None or self.chunk_starts is not None:
                first = jnp.take_along_axis(first, position, axis=1)
        if self.window is not None:
            first = jnp.maximum(first, position - (self.window - 1))
        dtype = jnp.promote_types(self.query.dtype, jnp.float32)
        if self.divisor is not None:
            scale = 1 / jax.lax.stop_gradient(self.divisor).astype(dtype)
        elif self.offset_divisor == "visible":
            number = position - first + 1
            if self.prefix is not None:
                number += self._seen_ahead(position)
            scale = 1 / number.astype(dtype)
        else:
            scale = jnp.full(position.shape, 1 / self.offset_divisor, dtype)
        return first, scale

    def seen_from(self) -> Int[Array, "batch key_length"] | None:
        """Returns the first query that sees each key; None: the one at the key's place."""
        if self.prefix is None:
            return None
        own = jnp.broadcast_to(jnp.arange(self.key.shape[1], dtype=jnp.int32), self.prefix.shape)
        if self.segment_ids is None:
            return jnp.where(self.prefix, 0, own)
        return jnp.where(self.prefix, document_starts(self.segment_ids), own)

    def _seen_ahead(self, position: Int[Array, "batch length"]) -> Int[Array, "batch length"]:
        """Returns how many keys after its own place each query sees, those of a prefix."""
        assert self.prefix is not None
        until = jnp.cumsum(self.prefix, axis=1, dtype=jnp.int32)
        last = jnp.full_like(until, until.shape[1] - 1)
        if self.segment_ids is not None:
            last -= document_starts(self.segment_ids[:, ::-1])[:, ::-1]
        ahead = jnp.take_along_axis(until, last, axis=1) - until
        return jnp.take_along_axis(ahead, position, axis=1)

    def problem(self) -> Problem:
        """Returns what backends know of the call when it is traced."""
        length, kv_heads = self.key.shape[1:3]
        heads, head_dim = self.query.shape[2:]
        return Problem(
            length=length,
            heads=heads,
            group=heads // kv_heads,
            head_dim=head_dim,
            value_dim=self.value.shape[3],
            dtype=str(self.query.dtype),
            width=0 if self.distance_bias is None else min(self.distance_bias.shape[1], length),
            has_slope=self.distance_slope is not None,
            has_offset=self.offset is not None,
            packed=self.narrowed,
            scale=self.scale,
            skip_mass=self.skip_mass,
            **vars(current_options()),
        )

    def inputs(self) -> Inputs:
        """Returns the arrays as backends get them, parameters in the dtype of scores."""
        dtype = jnp.promote_types(self.query.dtype, jnp.float32)

        def parameter(x: Array | None) -> Array | None:
            return None if x is None else x.astype(dtype)

        segment_start, offset_scale = self.visibility()
        return Inputs(
            query=self.query,
            key=self.key,
            value=self.value,
            segment_start=segment_start,
            offset_scale=offset_scale,
            distance_bias=parameter(self.distance_bias),
            distance_slope=parameter(self.distance_slope),
            offset=parameter(self.offset),
        )


def document_starts(segment_ids: Int[Array, "batch length"]) -> Int[Array, "batch length"]:
    """Returns, for each position, where its run of equal segment ids starts."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = jnp.pad(jnp.where(changes, index[1:], 0), ((0, 0), (1, 0)))
    return jax.lax.cummax(starts, axis=1)


def document_positions(segment_ids: Int[Array, "batch length"]) -> Int[Array, "batch length"]:
    """Returns each token's place in its document: 0, 1, ... from every change of id."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    return index - document_starts(segment_ids)


def is_number(x: Any) -> bool:
    """Returns whether x is a finite number of Python's or numpy's, not a traced array."""
    return isinstance(x, numbers.Real) and math.isfinite(x)


def checked_window(window: Any, key_length: int) -> int | None:
    """Returns the window, or None where it leaves out no key.

    Raises:
      InputError: unless it is None or an integer of at least 1.
    """
    if window is None:
        return None
    is_integer = isinstance(window, numbers.Integral) and not isinstance(window, bool)
    require(is_integer and window >= 1, "window", window, "None or an integer of at least 1")
    whole = not export.is_symbolic_dim(key_length) and window >= key_length
    return None if whole else int(window)


def check_arrays(
    query, key, value, distance_bias, distance_slope, offset, segment_ids, query_start, chunk_starts
):
    """Raises InputError unless shapes and dtypes fit together."""
    for name, x, ndim, axes in (
        ("query", query, 4, "[batch, length, heads, head_dim]"),
        ("key", key, 4, "[batch, key_length, kv_heads, head_dim]"),
        ("value", value, 4, "[batch, key_length, kv_heads, value_dim]"),
    ):
        if jnp.ndim(x) != ndim or 0 in jnp.shape(x):
            raise bad_value(f"{name}.shape", jnp.shape(x), f"{axes}, none of them 0")
        require(
            str(x.dtype) in _DTYPES, f"{name}.dtype", str(x.dtype), "one of " + ", ".join(_DTYPES)
        )
    batch, length, heads, head_dim = query.shape
    key_length, kv_heads = key.shape[1:3]
    for name, x in (("key", key), ("value", value)):
        require(x.dtype == query.dtype, f"{name}.dtype", str(x.dtype), f"{query.dtype} as query's")
    require(
        key.shape == (batch, key_length, kv_heads, head_dim) and heads % kv_heads == 0,
        "key.shape",
        key.shape,
        f"({batch}, key_length, a divisor of {heads}, {head_dim}) to go with query {query.shape}",
    )
    require(
        value.shape[:3] == key.shape[:3],
        "value.shape",
        value.shape,
        f"({batch}, {key_length}, {kv_heads}, value_dim) to go with key",
    )
    check_parameters(heads, distance_bias, distance_slope, offset)
    for name, x, shape in (
        ("segment_ids", segment_ids, (batch, key_length)),
        ("query_start", query_start, (batch,)),
    ):
        if x is not None:
            require(jnp.shape(x) == shape, f"{name}.shape", jnp.shape(x), f"{shape}")
            require(jnp.issubdtype(x.dtype, jnp.integer), f"{name}.dtype", str(x.dtype), "integer")
    if chunk_starts is not None:
        if query_start is not None:
            raise InputError("query_start and chunk_starts are both given; one says it all.")
        require(
            jnp.ndim(chunk_starts) == 1
            and jnp.size(chunk_starts) > 0
            and length % jnp.size(chunk_starts) == 0,
            "chunk_starts.shape",
            jnp.shape(chunk_starts),
            f"(chunks,) with a divisor of {length} chunks, the length of query",
        )
        require(
            jnp.issubdtype(chunk_starts.dtype, jnp.integer),
            "chunk_starts.dtype",
            str(chunk_starts.dtype),
            "integer",
        )
        last = key_length - length // jnp.size(chunk_starts)
        require(
            last >= 0, "key length", key_length, f"at least that of a chunk, {key_length - last}"
        )
        _check_places("chunk_starts", chunk_starts, last)
        _check_apart(chunk_starts, key_length - last)
    elif query_start is not None:
        last = key_length - length
        require(last >= 0, "key length", key_length, f"at least the query length {length}")
        _check_places("query_start", query_start, last)
    else:
        require(
            key_length == length,
            "key length",
            key_length,
            f"the query length {length} where query_start and chunk_starts are None",
        )


def check_parameters(
    heads: int, distance_bias: Array | None, distance_slope: Array | None, offset: Array | None
) -> None:
    """Raises InputError unless shapes and dtypes of the learned arguments fit so many heads."""
    if distance_bias is not None:
        shape = jnp.shape(distance_bias)
        fits = len(shape) == 2 and shape[0] == heads and shape[1] >= 1
        allowed = f"({heads}, width) with width at least 1"
        require(fits, "distance_bias.shape", shape, allowed)
    elif distance_slope is not None:
        raise InputError("distance_slope is given without distance_bias, whose tail it is.")
    for name, x in (("distance_slope", distance_slope), ("offset", offset)):
        if x is not None:
            require(jnp.shape(x) == (heads,), f"{name}.shape", jnp.shape(x), f"({heads},)")
    learned = {"distance_bias": distance_bias, "distance_slope": distance_slope, "offset": offset}
    for name, x in learned.items():
        if x is not None:
            floating = jnp.issubdtype(x.dtype, jnp.floating)
            require(floating, f"{name}.dtype", str(x.dtype), "floating")


def check_settings(
    divisor: Any, renormalize: bool, offset: Any, scale: Any, skip_mass: Any, arrays: str = ""
) -> None:
    """Raises InputError unless each value is allowed; `arrays`: what a divisor may be, too."""
    visible = isinstance(divisor, str) and divisor == "visible"
    allowed = (
        f'"visible", a positive number{arrays}' if arrays else '"visible" or a positive number'
    )
    positive = is_number(divisor) and divisor > 0
    require(visible or positive, "offset_divisor", divisor, allowed)
    offsets = not renormalize or offset is not None
    require(offsets, "renormalize", renormalize, "False without an offset")
    require(scale is None or is_number(scale), "scale", scale, "None or a finite number")
    share = is_number(skip_mass) and 0 <= skip_mass < 1
    require(share, "skip_mass", skip_mass, "a number of at least 0 and below 1")


def _check_places(name: str, starts: Int[Array | np.ndarray, " n"], last: int) -> None:
    """Raises InputError if queries are known to stand at keys that don't exist."""
    if not is_known(starts):
        return
    places = np.asarray(starts)
    require(
        bool(((places >= 0) & (places <= last)).all()),
        name,
        places.tolist(),
        f"from 0 to {last}, so that every query has its key",
    )


def _check_apart(starts: Int[Array | np.ndarray, " n"], size: int) -> None:
    """Raises InputError if chunks are known to overlap."""
    if not is_known(starts):
        return
    places = np.sort(np.asarray(starts))
    require(
        bool((np.diff(places) >= size).all()),
        "chunk_starts",
        np.asarray(starts).tolist(),
        f"at least {size} apart, the length of a chunk",
    )


def is_known(x: Array | np.ndarray) -> bool:
    """Returns whether this process can read the values of x now."""
    if isinstance(x, jax.Array):
        return not isinstance(x, jax.core.Tracer) and x.is_fully_addressable
    return True
