"""Lazy Attention over all heads, differentiable, one head after the other.

Heads are walked one by one because each goes only as far as its own span.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.chunked.backward import HeadGradients, backward
from pallas_kernels.chunked.forward import HeadInputs, forward
from pallas_kernels.own_settings import traced_by_own_settings
from pallas_kernels.types import AttentionSettings, Residuals, Visibility
from pallas_kernels.varying import vary_alike
from pallas_kernels.visit import TileSizes, VisitRanges, visit_ranges

# Large enough that a tile's matrix products outweigh the loop around them.
_TILE_SIZE = 128


@traced_by_own_settings
def attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch key_length kv_heads head_dim"],
    value: Float[Array, "batch key_length kv_heads value_dim"],
    bias: Float[Array, "heads key_length"] | None,
    offset: Float[Array, " heads"] | None,
    visibility: Visibility,
    settings: AttentionSettings,
) -> Float[Array, "batch length heads value_dim"]:
    """Returns Lazy Attention's output; memory is linear in length, backward too.

    Where keys are more than queries, the queries stand at the last ones.

    Args:
      query: rotated queries, float32, bfloat16, float16 or float64.
      key: rotated keys of the same dtype; `kv_heads` divides `heads`. How many more
        than queries must be a multiple of `tile_size(length)`.
      value: values of the same dtype or, if they are float16, also float32.
      bias: b(x) of every distance 0 <= x < key_length, from `bias.expand`; None: 0.
      offset: tau of each head; None: ordinary softmax.
      visibility: what each query sees, `first` an index into `key`.
      settings: scale, skip_mass and the output's dtype.

    Source: docs/lazy_attention.md, sections "Definition" and "Gradients".
    """
    leaves, tree = jax.tree.flatten((query, key, value, bias, offset, visibility))
    return _attention(*jax.tree.unflatten(tree, vary_alike(*leaves)), settings)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
@traced_by_own_settings
def _attention(
    query, key, value, bias, offset, visibility, settings
) -> Float[Array, "batch length heads value_dim"]:
    out, _ = _forward(query, key, value, bias, offset, visibility, settings, want_value_sum=False)
    return out


def tile_size(length: int) -> int:
    """Returns how many queries, and keys, a tile holds where there are `length` queries."""
    return min(_TILE_SIZE, length)


def _to_tiles(x: Shaped[Array, "batch length *rest"], size: int) -> Shaped[Array, "..."]:
    """[batch, length, heads, dim] -> [heads, tiles, batch, size, dim], zero-padded."""
    batch, length, heads, dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % size), (0, 0), (0, 0)))
    return x.reshape(batch, -1, size, heads, dim).transpose(3, 1, 0, 2, 4)


def _from_tiles(x: Shaped[Array, "heads tiles batch size dim"], length: int) -> Array:
    """[heads, tiles, batch, size, dim] -> [batch, length, heads, dim]."""
    heads, _, batch, _, dim = x.shape
    return x.transpose(2, 1, 3, 0, 4).reshape(batch, -1, heads, dim)[:, :length]


def _rows_to_tiles(x: Shaped[Array, "batch length"], size: int) -> Array:
    """[batch, length] -> [tiles, batch, size], the last row repeated as padding."""
    batch, length = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % size)), mode="edge")
    return x.reshape(batch, -1, size).transpose(1, 0, 2)


class _Heads:
    """A call cut into tiles, from which each query head takes its part."""

    def __init__(self, query, key, value, bias, offset, visibility, span):
        self.length, self.num_heads = query.shape[1:3]
        self.key_length = key.shape[1]
        self.size = tile_size(self.length)
        self.group = self.num_heads // key.shape[2]
        self.query = _to_tiles(query, self.size)
        self.key = _to_tiles(key, self.size)
        self.value = _to_tiles(value, self.size)
        self.bias, self.offset, self.span = bias, offset, span
        self.first = _rows_to_tiles(visibility.first, self.size)
        self.offset_scale = _rows_to_tiles(visibility.offset_scale, self.size)

    def head(self, index: Int[Array, ""]) -> HeadInputs:
        return HeadInputs(
            query=self.query[index],
            key=self.key[index // self.group],
            value=self.value[index // self.group],
            bias=None if self.bias is None else self.bias[index],
            offset=None if self.offset is None else self.offset[index],
            first=self.first,
            offset_scale=self.offset_scale,
            span=self.span[index],
        )


def _forward(query, key, value, bias, offset, visibility, settings, *, want_value_sum):
    length = query.shape[1]
    ranges = _visit_ranges(query, key, bias, offset, visibility.first, settings)
    # A diagonal is walked for all rows and batch entries at once: the widest counts.
    span = jnp.max(ranges.visited - 1, axis=(0, 2))
    heads = _Heads(query, key, value, bias, offset, visibility, span)
    run = functools.partial(forward, scale=settings.scale, want_value_sum=want_value_sum)
    out, log_sum_exp, value_sum, live = jax.lax.map(
        lambda index: run(heads.head(index)), jnp.arange(heads.num_heads)
    )
    out = _from_tiles(out, length)
    if value_sum is not None:
        value_sum = _from_tiles(value_sum, length)
    residuals = Residuals(out, log_sum_exp, value_sum, span, live)
    return out.astype(settings.out_dtype or query.dtype), residuals


def _visit_ranges(query, key, bias, offset, first, settings) -> VisitRanges:
    """Returns the ranges of the query tiles there are, in tiles of `key`."""
    size = tile_size(query.shape[1])
    missing = key.shape[1] - query.shape[1]
    # Queries are first filled up to one a key: it is cheap, and `visit.py` stays simple.
    own = jnp.broadcast_to(jnp.arange(missing, dtype=first.dtype), (first.shape[0], missing))
    ranges = visit_ranges(
        jnp.pad(query, ((0, 0), (missing, 0), (0, 0), (0, 0))),
        key,
        bias,
        offset,
        jnp.concatenate([own, first], axis=1),
        scale=settings.scale,
        skip_mass=settings.skip_mass,
        tiles=TileSizes(size, size),
    )
    ahead = missing // size
    return VisitRanges(ranges.first[..., ahead:], ranges.last[ahead:])


@traced_by_own_settings
def _attention_fwd(query, key, value, bias, offset, visibility, settings):
    out, residuals = _forward(
        query,
        key,
        value,
        bias,
        offset,
        visibility,
        settings,
        want_value_sum=offset is not None,
    )
    # Named, so that a checkpoint policy can keep what loops made.
    residuals = jax.tree.map(lambda x: checkpoint_name(x, "attention"), residuals)
    return out, (query, key, value, bias, offset, visibility, residuals)


@traced_by_own_settings
def _attention_bwd(settings, saved, d_out):
    query, key, value, bias, offset, visibility, residuals = saved
    heads = _Heads(query, key, value, bias, offset, visibility, residuals.span)
    length, size = heads.length, heads.size
    out, d_out = _to_tiles(residuals.out, size), _to_tiles(d_out, size)
    value_sum = residuals.masked_value_sum
    if value_sum is not None:
        value_sum = _to_tiles(value_sum, size)

    def one_head(index: Int[Array, ""]) -> HeadGradients:
        return backward(
            heads.head(index),
            out[index],
            residuals.log_sum_exp[index],
            None if value_sum is None else value_sum[index],
            residuals.live[index],
            d_out[index],
            settings.scale,
        )

    gradients = jax.lax.map(one_head, jnp.arange(heads.num_heads))

    def sum_group(x: Array) -> Array:
        return x.reshape(-1, heads.group, *x.shape[1:]).sum(axis=1)

    return (
        _from_tiles(gradients.query, length).astype(query.dtype),
        _from_tiles(sum_group(gradients.key), heads.key_length).astype(key.dtype),
        _from_tiles(sum_group(gradients.value), heads.key_length).astype(value.dtype),
        gradients.bias,
        None if offset is None else gradients.offset.astype(offset.dtype),
        None,
    )


_attention.defvjp(_attention_fwd, _attention_bwd)
