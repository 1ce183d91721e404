"""`lazy_attention`: one public function, checked here, computed by a backend.

Backends stand in a registry, best first. A call goes to the first that supports it
on the platform at hand; one asked for by name either supports the call or says why
it does not.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Float, Int

from lazyattn import reference
from lazyattn.errors import InputError, bad_value, require
from pallas_kernels import bias as bias_lib
from pallas_kernels import chunked
from pallas_kernels.mosaic_gpu import support as mosaic_gpu_support
from pallas_kernels.tpu import support as tpu_support
from pallas_kernels.triton import support as triton_support
from pallas_kernels.types import AttentionSettings, Visibility

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
    query_start: Int[Array, " batch"] | None
    scale: float
    skip_mass: float
    return_weights: bool

    def position(self) -> Int[Array, "batch length"]:
        """Returns the index of the key at each query's own position."""
        batch, length = self.query.shape[:2]
        start = jnp.zeros(batch, jnp.int32) if self.query_start is None else self.query_start
        return start[:, None] + jnp.arange(length, dtype=jnp.int32)

    def visibility(self) -> Visibility:
        """Returns the first key each query sees, and its factor of tau."""
        position = self.position()
        if self.segment_ids is None:
            first = jnp.zeros_like(position)
        else:
            first = document_starts(self.segment_ids)
            if self.query_start is not None:
                first = jnp.take_along_axis(first, position, axis=1)
        dtype = jnp.promote_types(self.query.dtype, jnp.float32)
        if self.offset_divisor == "visible":
            scale = 1 / (position - first + 1).astype(dtype)
        else:
            scale = jnp.full(position.shape, 1 / self.offset_divisor, dtype)
        return Visibility(first, scale)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A backend of `lazy_attention`.

    Attributes:
      name: what `implementation=` calls it.
      unsupported: why it can't do a call, as the end of "... since ..."; None: it can.
      run: does the call; returns out, or (out, weights) if the call wants weights.
      platforms: JAX platforms whose default it may be ("cpu", "gpu", "tpu"); None:
        every one.
      untested: why a call that it can do is left to the next one unless it is asked for by
        name, in the same form; None: it isn't.
    """

    name: str
    unsupported: Callable[[Call], str | None]
    run: Callable[[Call], Any]
    platforms: tuple[str, ...] | None = None
    untested: Callable[[Call], str | None] = lambda call: None


def document_starts(segment_ids: Int[Array, "batch length"]) -> Int[Array, "batch length"]:
    """Returns, for each position, where its run of equal segment ids starts."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = jnp.pad(jnp.where(changes, index[1:], 0), ((0, 0), (1, 0)))
    return jax.lax.cummax(starts, axis=1)


def lazy_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch key_length kv_heads head_dim"],
    value: Float[Array, "batch key_length kv_heads value_dim"],
    *,
    distance_bias: Float[Array, "heads width"] | None = None,
    distance_slope: Float[Array, " heads"] | None = None,
    offset: Float[Array, " heads"] | None = None,
    offset_divisor: Literal["visible"] | float = "visible",
    renormalize: bool = False,
    segment_ids: Int[Array, "batch key_length"] | None = None,
    query_start: Int[Array, " batch"] | None = None,
    scale: float | None = None,
    skip_mass: float = 1e-6,
    implementation: str | None = None,
    return_weights: bool = False,
) -> Any:
    """Causal Lazy Attention (arXiv 2601.00919): out_i = sum_j a_ij v_j, where

        s_ij = scale q_i . k_j + b(i - j)
        a_ij = max(0, softmax_j(s_ij) + tau / n_i)

    and n_i counts the keys that query i sees. The weights of a row need not sum to
    one; they may all be zero. With neither bias nor offset this is ordinary causal
    softmax attention.

    Args:
      query: queries, rotated by RoPE if the model uses it; float32, bfloat16,
        float16 or float64. Scores, softmax and threshold are float32 (float64 for
        float64 inputs).
      key: keys of the same dtype. `kv_heads` divides `heads`; query head h reads
        key head h // (heads / kv_heads).
      value: values of the same dtype; `value_dim` is `head_dim` as a rule.
      distance_bias: b_h(x) of the distances 0 <= x < width. None: no bias.
      distance_slope: continues the bias past its table as
        b(width - 1) - slope (x - (width - 1)). None: it is 0 there.
      offset: tau of each head; negative values suppress. None: ordinary softmax.
      offset_divisor: "visible" for tau / n_i; a positive number for tau over that
        number (1.0: constant tau; the context length: tau / L).
      renormalize: divide each row of weights by its sum, where that isn't 0.
      segment_ids: packed documents; a document is a maximal run of equal ids, and
        queries see their own document only.
      query_start: for a key/value cache: query i of row b stands at key
        `query_start[b] + i`, and sees no key after that. None: query i stands at key
        i, and both lengths are equal.
      scale: factor of the scores; None: 1 / sqrt(head_dim).
      skip_mass: an implementation may leave out far keys that together hold less
        than this share of a row's softmax mass, certainly and for any input. 0: none.
      implementation: "xla" (the definition, quadratic memory), "xla_chunked" (linear
        memory), "mosaic_gpu" (Hopper GPUs), "triton" (NVIDIA GPUs) or "tpu"; None: the
        best that applies.
      return_weights: also return the weights, float32; "xla" only.

    Returns:
      out [batch, length, heads, value_dim] in the dtype of `query`, or
      (out, weights [batch, heads, length, key_length]).

    Raises:
      InputError: (a ValueError) for shapes, dtypes or settings that don't fit, or an
        implementation asked for by name that can't do the call.
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    distance_bias, distance_slope, offset, segment_ids, query_start = (
        None if x is None else jnp.asarray(x)
        for x in (distance_bias, distance_slope, offset, segment_ids, query_start)
    )
    _check(query, key, value, distance_bias, distance_slope, offset, segment_ids, query_start)
    require(
        (isinstance(offset_divisor, str) and offset_divisor == "visible")
        or (_is_number(offset_divisor) and offset_divisor > 0),
        "offset_divisor",
        offset_divisor,
        '"visible" or a positive number',
    )
    require(
        not renormalize or offset is not None, "renormalize", renormalize, "False without an offset"
    )
    require(scale is None or _is_number(scale), "scale", scale, "None or a finite number")
    require(
        _is_number(skip_mass) and 0 <= skip_mass < 1,
        "skip_mass",
        skip_mass,
        "a number of at least 0 and below 1",
    )
    call = Call(
        query,
        key,
        value,
        distance_bias,
        distance_slope,
        offset,
        offset_divisor,
        renormalize,
        segment_ids,
        query_start,
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        float(skip_mass),
        return_weights,
    )
    return choose(call, implementation).run(call)


def choose(call: Call, name: str | None = None) -> Implementation:
    """Returns the implementation that does the call.

    Raises:
      InputError: if `name` is unknown or can't do it.
    """
    if name is not None:
        require(name in IMPLEMENTATIONS, "implementation", name, "one of " + _names() + " or None")
        reason = IMPLEMENTATIONS[name].unsupported(call)
        if reason is not None:
            raise InputError(f"implementation {name!r} can't do this call, since {reason}.")
        return IMPLEMENTATIONS[name]
    platform = jax.default_backend()
    for candidate in IMPLEMENTATIONS.values():
        if candidate.platforms is not None and platform not in candidate.platforms:
            continue
        reason = candidate.unsupported(call) or candidate.untested(call)
        if reason is None:
            return candidate
        _log_once(f"lazy_attention does not use {candidate.name!r}, since {reason}.")
    raise AssertionError("xla does every call")


@functools.cache
def _log_once(message: str) -> None:
    logging.info("%s", message)


def _names() -> str:
    return ", ".join(IMPLEMENTATIONS)


def _run_xla(call: Call) -> Any:
    visibility = call.visibility()
    out, weights = reference.lazy_attention(
        call.query,
        call.key,
        call.value,
        call.distance_bias,
        call.distance_slope,
        call.offset,
        call.position(),
        visibility.first,
        offset_scale=visibility.offset_scale,
        renormalize=call.renormalize,
        scale=call.scale,
    )
    return (out, weights) if call.return_weights else out


def _chunked_unsupported(call: Call) -> str | None:
    if call.return_weights:
        return "return_weights is True and only 'xla' holds the weights"
    if call.query_start is not None:
        return "query_start is given"
    return None


def _run_chunked(call: Call) -> Float[Array, "batch length heads value_dim"]:
    dtype = jnp.promote_types(call.query.dtype, jnp.float32)
    bias = None
    if call.distance_bias is not None:
        slope = call.distance_slope
        bias = bias_lib.expand(
            call.distance_bias.astype(dtype),
            None if slope is None else slope.astype(dtype),
            call.query.shape[1],
        )
    value = call.value
    if call.renormalize:
        # A column of ones makes the sum of each row's weights an output like others.
        value = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1)
    out = chunked.attention(
        call.query,
        call.key,
        value,
        bias,
        None if call.offset is None else call.offset.astype(dtype),
        call.visibility(),
        AttentionSettings(call.scale, call.skip_mass),
    )
    if call.renormalize:
        total = out[..., -1:]
        out = out[..., :-1] / jnp.where(total > 0, total, 1)
    return out


def _fused_unsupported(call: Call) -> str | None:
    """Returns what no fused kernel does."""
    if call.return_weights:
        return "return_weights is True and only 'xla' holds the weights"
    if call.query_start is not None:
        return "query_start is given"
    if call.renormalize:
        return "renormalize is True"
    return None


def _mosaic_gpu_unsupported(call: Call) -> str | None:
    _, length, heads, head_dim = call.query.shape
    return _fused_unsupported(call) or mosaic_gpu_support.unsupported(
        head_dim,
        call.value.shape[-1],
        call.query.dtype,
        heads // call.key.shape[2],
        length,
        0 if call.distance_bias is None else call.distance_bias.shape[1],
    )


def _mosaic_gpu_untested(call: Call) -> str | None:
    if jax.typeof(call.query).manual_axis_type.varying:
        return "it is not tested on a GPU inside a shard_map that checks what varies"
    return None


def _triton_unsupported(call: Call) -> str | None:
    return _fused_unsupported(call) or triton_support.unsupported(
        call.query.shape[-1], call.value.shape[-1], call.query.dtype
    )


def _tpu_unsupported(call: Call) -> str | None:
    return _fused_unsupported(call) or tpu_support.unsupported(
        call.query.shape, call.key.shape[2], call.value.shape[-1], call.query.dtype
    )


def _run_tpu(call: Call) -> Float[Array, "batch length heads head_dim"]:
    from pallas_kernels.tpu import op  # Pallas takes a second to import.

    return _run_fused(op, call)


def _run_triton(call: Call) -> Float[Array, "batch length heads head_dim"]:
    from pallas_kernels.triton import op  # Triton takes a second to import.

    return _run_fused(op, call)


def _run_mosaic_gpu(call: Call) -> Float[Array, "batch length heads head_dim"]:
    from pallas_kernels.mosaic_gpu import op

    return _run_fused(op, call)


def _run_fused(op: Any, call: Call) -> Float[Array, "batch length heads head_dim"]:
    def parameter(x: Array | None) -> Array | None:
        return None if x is None else x.astype(jnp.float32)

    return op.attention(
        call.query,
        call.key,
        call.value,
        parameter(call.distance_bias),
        parameter(call.distance_slope),
        parameter(call.offset),
        call.visibility(),
        AttentionSettings(call.scale, call.skip_mass),
        packed=call.segment_ids is not None,
    )


# Best first. A kernel joins by an entry here; callers never name one.
IMPLEMENTATIONS: dict[str, Implementation] = {
    implementation.name: implementation
    for implementation in (
        Implementation(
            "mosaic_gpu",
            _mosaic_gpu_unsupported,
            _run_mosaic_gpu,
            ("gpu",),
            _mosaic_gpu_untested,
        ),
        Implementation("tpu", _tpu_unsupported, _run_tpu, ("tpu",)),
        Implementation("triton", _triton_unsupported, _run_triton, ("gpu",)),
        Implementation("xla_chunked", _chunked_unsupported, _run_chunked),
        Implementation("xla", lambda call: None, _run_xla),
    )
}


def _is_number(x: Any) -> bool:
    """Returns whether x is a finite number of Python's or numpy's, not a traced array."""
    return isinstance(x, numbers.Real) and math.isfinite(x)


def _check(query, key, value, distance_bias, distance_slope, offset, segment_ids, query_start):
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
    if distance_bias is not None:
        require(
            jnp.ndim(distance_bias) == 2
            and distance_bias.shape[0] == heads
            and distance_bias.shape[1] >= 1,
            "distance_bias.shape",
            jnp.shape(distance_bias),
            f"({heads}, width) with width at least 1",
        )
    elif distance_slope is not None:
        raise InputError("distance_slope is given without distance_bias, whose tail it is.")
    for name, x in (("distance_slope", distance_slope), ("offset", offset)):
        if x is not None:
            require(jnp.shape(x) == (heads,), f"{name}.shape", jnp.shape(x), f"({heads},)")
    for name, x in (
        ("distance_bias", distance_bias),
        ("distance_slope", distance_slope),
        ("offset", offset),
    ):
        if x is not None:
            require(
                jnp.issubdtype(x.dtype, jnp.floating), f"{name}.dtype", str(x.dtype), "floating"
            )
    for name, x, shape in (
        ("segment_ids", segment_ids, (batch, key_length)),
        ("query_start", query_start, (batch,)),
    ):
        if x is not None:
            require(jnp.shape(x) == shape, f"{name}.shape", jnp.shape(x), f"{shape}")
            require(jnp.issubdtype(x.dtype, jnp.integer), f"{name}.dtype", str(x.dtype), "integer")
    if query_start is None:
        require(
            key_length == length,
            "key length",
            key_length,
            f"the query length {length} where query_start is None",
        )
