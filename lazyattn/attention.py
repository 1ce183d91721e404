"""`lazy_attention`: one public function, checked here, computed by a backend.

Backends stand in a registry, best first. A call goes to the first that supports it
on the platform at hand; one asked for by name either supports the call or says why
it does not.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import export
from jaxtyping import Array, Bool, Float, Int

from lazyattn import blocks, explicit_mesh, reference
from lazyattn.call import (
    Call,
    check_arrays,
    check_settings,
    checked_window,
    document_starts,
    is_known,
    is_number,
)
from lazyattn.compile_target import check_platform
from lazyattn.derivatives import first_order_reverse_mode
from lazyattn.errors import InputError, bad_value, require
from pallas_kernels import attention, target
from pallas_kernels.mosaic_gpu import support as mosaic_gpu_support
from pallas_kernels.own_settings import own_settings
from pallas_kernels.tpu import support as tpu_support
from pallas_kernels.triton import support as triton_support

__all__ = [
    "IMPLEMENTATIONS",
    "Call",
    "Implementation",
    "choose",
    "cross_attention",
    "document_starts",
    "lazy_attention",
]


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A backend of `lazy_attention`.

    Attributes:
      name: what `implementation=` calls it.
      unsupported: why it can't do a call, as the end of "... since ..."; None: it can.
      run: does the call; returns out, or (out, weights) if the call wants weights.
      platforms: JAX platforms whose default it may be ("cpu", "gpu", "tpu"); None:
        every one.
    """

    name: str
    unsupported: Callable[[Call], str | None]
    run: Callable[[Call], Any]
    platforms: tuple[str, ...] | None = None


def lazy_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch key_length kv_heads head_dim"],
    value: Float[Array, "batch key_length kv_heads value_dim"],
    *,
    distance_bias: Float[Array, "heads width"] | None = None,
    distance_slope: Float[Array, " heads"] | None = None,
    offset: Float[Array, " heads"] | None = None,
    offset_divisor: Literal["visible"] | float | Float[Array, "batch length"] = "visible",
    renormalize: bool = False,
    sink: Float[Array, " heads"] | None = None,
    soft_cap: float | None = None,
    segment_ids: Int[Array, "batch key_length"] | None = None,
    prefix: Bool[Array, "batch key_length"] | None = None,
    query_start: Int[Array, " batch"] | None = None,
    chunk_starts: Int[Array, " chunks"] | None = None,
    window: int | None = None,
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

    NaN stays NaN: in a query, a key or a value it reaches all queries that see it. It may reach
    earlier queries too, since what they do not see is multiplied by 0, and 0 times NaN is NaN:
    from a value with every implementation, from a key with "mosaic_gpu". These are the
    queries of its tile of keys, up to 255 of them; with "xla" all. A query that sees nothing, for a
    bias of -inf, is NaN itself. With "triton", "tpu" and "mosaic_gpu" it has no part in any
    gradient; with "xla" and "xla_chunked" the gradients of all that it sees are NaN, too.

    Args:
      query: queries, rotated by RoPE if the model uses it; float32, bfloat16,
        float16 or float64. Scores, softmax and threshold are float32 (float64 for
        float64 inputs).
      key: keys of the same dtype. `kv_heads` divides `heads`; query head h reads
        key head h // (heads / kv_heads).
      value: values of the same dtype; `value_dim` is `head_dim` as a rule.
      distance_bias: b_h(x) of the distances 0 <= x < width; -inf: such keys have no mass. A
        query that sees no others is NaN. None: no bias.
      distance_slope: continues the bias past its table as
        b(width - 1) - slope (x - (width - 1)). None: it is 0 there.
      offset: tau of each head; negative values suppress. None: ordinary softmax.
      offset_divisor: "visible" for tau / n_i; a positive number for tau over that
        number (1.0: constant tau; the context length: tau / L); an array of positive
        numbers, one for each query, where the keys given are not all that n_i counts.
      renormalize: divide each row of weights by its sum, where that isn't 0.
      sink: a learned logit of each head, floating, for a key that has no value: exp(sink) joins
        the sum that the softmax divides by, and n_i does not count it. 0: softmax that adds
        one. With it the softmax is 0, not NaN, where the bias is -inf for all that a query
        sees. None: no such key. "xla" only.
      soft_cap: scores become soft_cap tanh(score / soft_cap) before the bias is added; positive.
        None: as they are. "xla" only.
      segment_ids: packed documents; a document is a maximal run of equal ids, and
        queries see their own document only.
      prefix: bool, keys that earlier queries of their document see too, as in a prefix-LM. The
        bias is then b(|i - j|), and n_i counts them. All True: not causal at all. A window
        leaves out none of those ahead. With query_start all keys of the prefix must be in the
        cache. "xla" only.
      query_start: for a key/value cache: query i of row b stands at key
        `query_start[b] + i`, which must exist, and sees no key after that. None: query i
        stands at key i, and both lengths are equal. May be traced: then the outputs of a
        query whose key does not exist are NaN.
      chunk_starts: for a part of a sequence that others hold the rest of: the queries are
        equal chunks, one after the other, and chunk c of every row stands at keys
        `chunk_starts[c]` and on, all of which must exist; chunks must not overlap. Keys are
        those of the whole sequence. May be traced: then the outputs of a chunk that does not
        lie within the keys, or overlaps another, are NaN. Not with query_start.
      window: a query sees the last `window` keys of its document only, its own included,
        and n_i counts those. Work grows with the window then, not with the length (but
        "xla" always does it all). Static, at least 1. None: all of its document.
      scale: factor of the scores; None: 1 / sqrt(head_dim).
      skip_mass: an implementation may leave out far keys that together hold less
        than this share of a row's softmax mass, certainly and for any input. 0: none.
      implementation: "xla" (the definition, quadratic memory), "xla_chunked" (linear
        memory), "mosaic_gpu" (Hopper GPUs), "triton" (NVIDIA GPUs) or "tpu"; None: the
        best that applies. Only "xla" has forward mode and higher derivatives. For what
        "xla" only has it takes some queries after the others, in linear memory.
      return_weights: also return the weights, float32; "xla" only.

    Returns:
      out [batch, length, heads, value_dim] in the dtype of `query`, or
      (out, weights [batch, heads, length, key_length]). Where arrays are sharded over Explicit
      axes of a mesh, these are over those of rows and heads.

    Raises:
      InputError: (a ValueError) for shapes, dtypes or settings that don't fit, an
        implementation asked for by name that can't do the call, or derivatives that the
        implementation does not have.

    Source: arXiv 2601.00919; the sink: Miller, "Attention is off by one", 2023, learned as in
    OpenAI's gpt-oss; the cap: Gemma 2, arXiv 2408.00118; the prefix: arXiv 1910.10683.
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    distance_bias, distance_slope, offset, sink, segment_ids, prefix = (
        None if x is None else jnp.asarray(x)
        for x in (distance_bias, distance_slope, offset, sink, segment_ids, prefix)
    )
    # JAX's own `asarray` would make known places traced ones, inside jit.
    query_start, chunk_starts = (
        x if x is None or isinstance(x, jax.Array) else np.asarray(x)
        for x in (query_start, chunk_starts)
    )
    check_arrays(
        *(query, key, value, distance_bias, distance_slope, offset),
        *(segment_ids, query_start, chunk_starts),
    )
    _check_variants(query.shape[2], sink, soft_cap)
    if prefix is not None:
        wanted = key.shape[:2]
        require(prefix.shape == wanted, "prefix.shape", prefix.shape, f"{wanted}")
        require(prefix.dtype == bool, "prefix.dtype", str(prefix.dtype), "bool")
    divisor = None
    if isinstance(offset_divisor, jax.Array | np.ndarray) and jnp.ndim(offset_divisor) > 0:
        divisor, offset_divisor = jnp.asarray(offset_divisor), "visible"
        wanted = query.shape[:2]
        require(divisor.shape == wanted, "offset_divisor.shape", divisor.shape, f"{wanted}")
    scalar: Any = offset_divisor
    check_settings(scalar, renormalize, offset, scale, skip_mass, arrays=" or an array of them")
    call = Call(
        query,
        key,
        value,
        distance_bias,
        distance_slope,
        offset,
        scalar,
        renormalize,
        segment_ids,
        None if query_start is None else query_start.astype(jnp.int32),
        None if chunk_starts is None else chunk_starts.astype(jnp.int32),
        checked_window(window, key.shape[1]),
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        float(skip_mass),
        return_weights,
        divisor,
        sink=sink,
        soft_cap=None if soft_cap is None else float(soft_cap),
        prefix=prefix,
    )
    return explicit_mesh.on_own_share(Run(implementation), call)


def cross_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch key_length kv_heads head_dim"],
    value: Float[Array, "batch key_length kv_heads value_dim"],
    *,
    key_lengths: Int[Array, " batch"] | None = None,
    offset: Float[Array, " heads"] | None = None,
    offset_divisor: Literal["visible"] | float = "visible",
    renormalize: bool = False,
    sink: Float[Array, " heads"] | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    return_weights: bool = False,
) -> Any:
    """Lazy Attention of queries to keys of another sequence: every query sees every key.

    There are no distances, so there is no bias. n_i is the number of keys. Only "xla" does it,
    some queries after the others: memory is linear in the number of queries.

    Args:
      query: float32, bfloat16, float16 or float64.
      key: of the same dtype; `kv_heads` divides `heads`, as in `lazy_attention`.
      value: of the same dtype.
      key_lengths: integer, how many keys a row has, the first ones, at least 1; the others are
        padding. May be traced: then the outputs of rows for which it is not from 1 to
        key_length are NaN. None: all.
      offset: as in `lazy_attention`.
      offset_divisor: as there, but no array.
      renormalize: as there.
      sink: as there.
      soft_cap: as there.
      scale: as there.
      implementation: "xla" or None.
      return_weights: also return the weights, float32, all queries at once.

    Returns:
      out [batch, length, heads, value_dim] in the dtype of `query`, or
      (out, weights [batch, heads, length, key_length]).

    Raises:
      InputError: (a ValueError) for shapes, dtypes or settings that don't fit, or another
        implementation.

    Source: as `lazy_attention`; the paper has no cross attention, n_i is counted alike.
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    offset, sink = (None if x is None else jnp.asarray(x) for x in (offset, sink))
    if query.ndim != 4 or 0 in query.shape:
        axes = "[batch, length, heads, head_dim]"
        raise bad_value("query.shape", query.shape, f"{axes}, none of them 0")
    # One query would do at key 0: whether the arrays go together does not hang on the length.
    start = jnp.zeros(query.shape[0], jnp.int32)
    check_arrays(query[:, :1], key, value, None, None, offset, None, start, None)
    _check_variants(query.shape[2], sink, soft_cap)
    scalar: Any = offset_divisor
    check_settings(scalar, renormalize, offset, scale, skip_mass=0.0)
    batch, key_length = key.shape[:2]
    lengths: Any = key_lengths
    if lengths is not None:
        lengths = lengths if isinstance(lengths, jax.Array) else np.asarray(lengths)
        require(jnp.shape(lengths) == (batch,), "key_lengths.shape", lengths.shape, f"({batch},)")
        integer = jnp.issubdtype(lengths.dtype, jnp.integer)
        require(integer, "key_lengths.dtype", str(lengths.dtype), "integer")
        if is_known(lengths):
            known = np.asarray(lengths)
            within = bool(((known >= 1) & (known <= key_length)).all())
            require(within, "key_lengths", known.tolist(), f"from 1 to {key_length}")
    call = Call(
        *(query, key, value, None, None, offset, scalar, renormalize),
        *(None, None, None, None),
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        skip_mass=0.0,
        return_weights=return_weights,
        sink=sink,
        soft_cap=None if soft_cap is None else float(soft_cap),
        cross=True,
        key_lengths=lengths,
    )
    return explicit_mesh.on_own_share(Run(implementation), call)


def _check_variants(heads: int, sink: Array | None, soft_cap: Any) -> None:
    if sink is not None:
        require(sink.shape == (heads,), "sink.shape", sink.shape, f"({heads},)")
        floating = jnp.issubdtype(sink.dtype, jnp.floating)
        require(floating, "sink.dtype", str(sink.dtype), "floating")
    capped = soft_cap is None or (is_number(soft_cap) and soft_cap > 0)
    require(capped, "soft_cap", soft_cap, "None or a positive number")


@dataclasses.dataclass(frozen=True)
class Run:
    """Does a call by the named implementation, or the best.

    Attributes:
      name: as `implementation` of `lazy_attention`.
    """

    name: str | None

    def __call__(self, call: Call) -> Any:
        with own_settings():
            return _run(call, self.name)


def _run(call: Call, name: str | None) -> Any:
    chosen, poison = choose(call, name), call.poison()
    if name is None:
        call = check_platform(call)
    if chosen.name == "xla":
        result = chosen.run(call)
    else:
        result = first_order_reverse_mode(chosen.name, chosen.run, call)
    if poison is None:
        return result
    if not call.return_weights:
        return result * poison[:, :, None, None].astype(result.dtype)
    out, weights = result
    out = out * poison[:, :, None, None].astype(out.dtype)
    return out, weights * poison[:, None, :, None].astype(weights.dtype)


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
    platform = target.platform()
    for candidate in IMPLEMENTATIONS.values():
        if candidate.platforms is not None and platform not in candidate.platforms:
            continue
        reason = candidate.unsupported(call)
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
    segment_start, offset_scale = call.visibility()
    run: Any = functools.partial(
        reference.lazy_attention,
        *(call.query, call.key, call.value),
        *(call.distance_bias, call.distance_slope, call.offset),
        position=call.position(),
        segment_start=segment_start,
        offset_scale=offset_scale,
        renormalize=call.renormalize,
        scale=call.scale,
        sink=call.sink,
        soft_cap=call.soft_cap,
        seen_from=call.seen_from(),
    )
    if _definition_only(call) is not None and not call.return_weights:
        length = call.query.shape[1]
        if not export.is_symbolic_dim(length) and length > blocks.BLOCK:
            return blocks.in_blocks(*run.args, **run.keywords)
    out, weights = run()
    return (out, weights) if call.return_weights else out


def _definition_only(call: Call) -> str | None:
    """Returns what of the call only the definition has."""
    if call.cross:
        return "it is cross attention, which only 'xla' does"
    if call.sink is not None:
        return "sink is given and only 'xla' has one"
    if call.soft_cap is not None:
        return "soft_cap is given and only 'xla' caps scores"
    if call.prefix is not None:
        return "prefix is given and only 'xla' lets queries see later keys"
    return None


def _chunked_unsupported(call: Call) -> str | None:
    if call.return_weights:
        return "return_weights is True and only 'xla' holds the weights"
    if (reason := _definition_only(call)) is not None:
        return reason
    if call.query_start is not None:
        return "query_start is given"
    if call.symbolic_axes not in ([], ["batch"]):
        return _symbolic(call)
    return None


def _symbolic(call: Call) -> str:
    return f"{' and '.join(call.symbolic_axes)} of its arrays are symbolic, unlike with 'xla'"


def _fused_unsupported(call: Call) -> str | None:
    """Returns what no fused kernel does."""
    if call.return_weights:
        return "return_weights is True and only 'xla' holds the weights"
    if (reason := _definition_only(call)) is not None:
        return reason
    if call.query_start is not None:
        return "query_start is given"
    if call.symbolic_axes:
        return _symbolic(call)
    if call.renormalize:
        return "renormalize is True"
    return None


def _run_backend(name: str, call: Call) -> Float[Array, "batch length heads value_dim"]:
    return attention.attention(
        name,
        call.problem(),
        call.inputs(),
        chunk_starts=None if call.chunk_starts is None else call.places(),
        renormalize=call.renormalize,
    )


def _fused(name: str, support: ModuleType, *platforms: str) -> Implementation:
    def unsupported(call: Call) -> str | None:
        return _fused_unsupported(call) or support.unsupported(call.problem(), call.query.shape[0])

    return Implementation(name, unsupported, functools.partial(_run_backend, name), platforms)


# Best first. A kernel joins by an entry here; callers need not name one.
IMPLEMENTATIONS: dict[str, Implementation] = {
    implementation.name: implementation
    for implementation in (
        _fused("mosaic_gpu", mosaic_gpu_support, "gpu"),
        _fused("tpu", tpu_support, "tpu"),
        _fused("triton", triton_support, "gpu"),
        Implementation(
            "xla_chunked", _chunked_unsupported, functools.partial(_run_backend, "xla_chunked")
        ),
        Implementation("xla", lambda call: None, _run_xla),
    )
}
