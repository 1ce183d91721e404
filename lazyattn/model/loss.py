"""Cross-entropy by chunks of positions, so that all logits never exist at once."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lazyattn import sharding
from lazyattn.errors import require
from pallas_kernels.varying import vary_alike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums over counted positions, float32 scalars; divide by `count` for means.

    Attributes:
      objective: sum of weight (nll + z_loss log_z^2), the only differentiable one.
      nll: sum of weight times negative log-likelihood, in nats.
      log_z_squared: sum of weight log_z^2, log_z the softmax's log-normaliser.
      count: sum of weights.
    """

    objective: Float[Array, ""]
    nll: Float[Array, ""]
    log_z_squared: Float[Array, ""]
    count: Float[Array, ""]


def cross_entropy(
    hidden: Float[Array, "batch length width"],
    embedding: Float[Array, "vocab width"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    *,
    chunk: int,
    z_loss: float = 0.0,
) -> LossSums:
    """Returns the summed cross-entropy of `targets` under the logits of `hidden`.

    Logits exist for one chunk of positions at a time. When differentiated, the
    forward pass also makes the gradient chunk by chunk, so nothing is computed
    twice and the backward pass only scales. Products take inputs in `hidden`'s
    dtype and accumulate in float32; logits, softmax and sums are float32. On a mesh
    each device works on its own rows, or its part of their length, and its own part
    of the vocabulary.

    Args:
      hidden: final hidden states, float.
      embedding: output embedding, float32; its gradient is summed in float32.
      targets: int32 ids below vocab; anything where the weight is 0.
      weights: how much each position counts, usually 1 or 0; no gradient.
      chunk: positions whose logits one device holds at once, at least one of every
        row of its batch.
      z_loss: weight of log_z^2, which keeps normalisers near 1 (Chowdhery et al.,
        arXiv 2204.02311, section 5).

    Returns:
      Sums; only `objective` carries gradients, to `hidden` and `embedding`.

    Raises:
      InputError: for shapes that do not go together or a chunk below 1.
    """
    _check(hidden, embedding, targets, chunk)
    require(
        weights.shape == targets.shape,
        "weights' shape",
        weights.shape,
        f"{targets.shape}, the shape of targets",
    )
    weights = weights.astype(jnp.float32)
    objective, nll, log_z_squared = _sums(hidden, embedding, targets, weights, chunk, z_loss)
    return LossSums(
        objective, jax.lax.stop_gradient(nll), jax.lax.stop_gradient(log_z_squared), weights.sum()
    )


def _check(hidden: Array, embedding: Array, targets: Array, chunk: int) -> None:
    require(chunk >= 1, "chunk", chunk, "at least 1")
    require(hidden.ndim == 3, "hidden's shape", hidden.shape, "[batch, length, width]")
    require(
        embedding.ndim == 2 and embedding.shape[1] == hidden.shape[2],
        "embedding's shape",
        embedding.shape,
        f"[vocab, {hidden.shape[2]}]",
    )
    require(
        targets.shape == hidden.shape[:2],
        "targets' shape",
        targets.shape,
        f"{hidden.shape[:2]}, the batch and length of hidden",
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _sums(
    hidden: Float[Array, "batch length width"],
    embedding: Float[Array, "vocab width"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    chunk: int,
    z_loss: float,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Returns the sums of objective, nll and log_z^2."""
    nll, log_z = _by_token(hidden, embedding.astype(hidden.dtype), targets, chunk)
    return _weighted(nll, log_z, weights, z_loss)


def _sums_fwd(
    hidden: Float[Array, "batch length width"],
    embedding: Float[Array, "vocab width"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    chunk: int,
    z_loss: float,
) -> tuple[tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]], tuple[Array, Array]]:
    """Returns the sums, and the objective's gradients for `_sums_bwd` to scale."""
    table = embedding.astype(hidden.dtype)
    nll, log_z, d_hidden, d_embedding = _with_gradients(
        hidden, table, targets, weights, chunk, z_loss
    )
    return _weighted(nll, log_z, weights, z_loss), (d_hidden, d_embedding)


def _sums_bwd(
    chunk: int, z_loss: float, gradients: tuple[Array, Array], cotangents: tuple[Array, ...]
) -> tuple[Array, Array, None, None]:
    """Returns the cotangents of `_sums`' arrays; `cross_entropy` stops all but the first."""
    d_hidden, d_embedding = gradients
    scale = cotangents[0]
    return (scale * d_hidden).astype(d_hidden.dtype), scale * d_embedding, None, None


_sums.defvjp(_sums_fwd, _sums_bwd)


def _weighted(
    nll: Float[Array, "batch length"],
    log_z: Float[Array, "batch length"],
    weights: Float[Array, "batch length"],
    z_loss: float,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    squared = jnp.square(log_z)
    return (
        jnp.sum(weights * (nll + z_loss * squared)),
        jnp.sum(weights * nll),
        jnp.sum(weights * squared),
    )


@dataclasses.dataclass(frozen=True)
class _Split:
    """Mesh axes over which a device's share was split from the whole, if any.

    Attributes:
      tokens: of rows and their length.
      vocab: of the vocabulary.
      width: some of `tokens`, over which the table's gradient is split once summed.
    """

    tokens: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    width: tuple[str, ...] = ()

    def sum_tokens(self, d_table: Float[Array, "vocab width"]) -> Float[Array, "vocab share"]:
        rest = tuple(axis for axis in self.tokens if axis not in self.width)
        if rest:
            d_table = jax.lax.psum(d_table, rest)
        if self.width:
            d_table = jax.lax.psum_scatter(d_table, self.width, scatter_dimension=1, tiled=True)
        return d_table

    def sum_vocab(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return jax.lax.psum(x, self.vocab) if self.vocab else x

    def max_vocab(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return jax.lax.pmax(x, self.vocab) if self.vocab else x

    def first_id(self, share: int) -> Int[Array, ""] | int:
        return jax.lax.axis_index(self.vocab) * share if self.vocab else 0


def _by_token(
    hidden: Float[Array, "batch length width"],
    table: Float[Array, "vocab width"],
    targets: Int[Array, "batch length"],
    chunk: int,
) -> tuple[Float[Array, "batch length"], Float[Array, "batch length"]]:
    """Returns the nll and log_z of each token; `table` has `hidden`'s dtype."""

    def share(split: _Split, hidden: Array, table: Array, targets: Array) -> tuple[Array, Array]:
        def step(_: None, part: tuple[Array, ...]) -> tuple[None, tuple[Array, Array]]:
            found = _statistics(split, part[0], table, part[1])
            return None, (found.nll, found.log_z)

        parts, join = _chunks((hidden, targets), chunk)
        _, (nll, log_z) = jax.lax.scan(step, None, parts)
        return join(nll), join(log_z)

    return _per_device(share, ("tokens", "tokens"), hidden, table, targets)


def _with_gradients(
    hidden: Float[Array, "batch length width"],
    table: Float[Array, "vocab width"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    chunk: int,
    z_loss: float,
) -> tuple[Array, Array, Array, Array]:
    """Returns nll and log_z by token, and the objective's gradients to hidden and table."""

    def share(
        split: _Split, hidden: Array, table: Array, targets: Array, weights: Array
    ) -> tuple[Array, Array, Array, Array]:
        def step(d_table: Array, part: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
            h, ids, w = part
            found = _statistics(split, h, table, ids)
            slope = (1.0 + 2.0 * z_loss * found.log_z)[..., None]
            d_logits = (w[..., None] * (slope * found.probabilities - found.hit)).astype(h.dtype)
            d_h = _product("bcv,vw->bcw", d_logits, table)
            d_table = d_table + _product("bcv,bcw->vw", d_logits, h)
            return d_table, (found.nll, found.log_z, split.sum_vocab(d_h).astype(h.dtype))

        parts, join = _chunks((hidden, targets, weights), chunk)
        (zeros,) = vary_alike(jnp.zeros(table.shape, jnp.float32), like=(hidden, table))
        d_table, (nll, log_z, d_hidden) = jax.lax.scan(step, zeros, parts)
        return join(nll), join(log_z), join(d_hidden), split.sum_tokens(d_table)

    outputs = ("tokens", "tokens", "tokens", "d_table")
    return _per_device(share, outputs, hidden, table, targets, weights)


class _Statistics(NamedTuple):
    """What one chunk's logits say; `hit` marks the target's entry."""

    nll: Float[Array, "batch size"]
    log_z: Float[Array, "batch size"]
    probabilities: Float[Array, "batch size vocab"]
    hit: Bool[Array, "batch size vocab"]


def _statistics(
    split: _Split,
    hidden: Float[Array, "batch size width"],
    table: Float[Array, "vocab width"],
    targets: Int[Array, "batch size"],
) -> _Statistics:
    logits = _product("bcw,vw->bcv", hidden, table)
    own, normaliser = jax.lax.platform_dependent(
        logits, cuda=_maximum_and_sum_at_once, default=_maximum_and_sum
    )
    top = split.max_vocab(own)
    normaliser = split.sum_vocab(normaliser * jnp.exp(own - top))
    log_z = (top + jnp.log(normaliser))[..., 0]
    ids = split.first_id(table.shape[0]) + jnp.arange(table.shape[0])
    hit = ids == targets[..., None]
    nll = log_z - split.sum_vocab(jnp.where(hit, logits, 0.0).sum(axis=-1))
    return _Statistics(nll, log_z, jnp.exp(logits - top) / normaliser, hit)


def _maximum_and_sum(
    logits: Float[Array, "batch size vocab"],
) -> tuple[Float[Array, "batch size 1"], Float[Array, "batch size 1"]]:
    """Returns the greatest logit, and the sum of exponentials of the logits' distances to it."""
    top = logits.max(axis=-1, keepdims=True)
    return top, jnp.exp(logits - top).sum(axis=-1, keepdims=True)


def _maximum_and_sum_at_once(
    logits: Float[Array, "batch size vocab"],
) -> tuple[Float[Array, "batch size 1"], Float[Array, "batch size 1"]]:
    """Returns the same from one pass over the logits: a GPU waits for memory, not for exponentials.

    Source: Milakov and Gimelshein, arXiv 1805.02867.
    """

    def join(a: list[Array], b: list[Array]) -> list[Array]:
        top = jnp.maximum(a[0], b[0])
        return [top, a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top)]

    # Not minus infinity, whose distance to itself is no number.
    least = jnp.asarray(jnp.finfo(logits.dtype).min, logits.dtype)
    nothing = vary_alike(least, jnp.zeros_like(least), like=(logits,))
    operands = [logits, jnp.ones_like(logits)]
    top, total = jax.lax.reduce(operands, nothing, join, (logits.ndim - 1,))
    return top[..., None], total[..., None]


def _product(equation: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _chunks(
    arrays: tuple[Array, ...], chunk: int
) -> tuple[tuple[Array, ...], Callable[[Array], Array]]:
    """Cuts [batch, length, ...] into [number, batch, size, ...] of about `chunk` positions.

    Chunks run along the length, never across rows, and are as even as can be; the
    last is filled with zeros, that is, with positions of weight 0.

    Returns:
      The cut arrays, and the function that joins what was computed from them.
    """
    batch, length = arrays[0].shape[:2]
    number = -(-length // max(1, chunk // batch))
    size = -(-length // number)
    number = -(-length // size)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, number * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, number, size, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(batch, number * size, *x.shape[3:])[:, :length]

    return tuple(cut(x) for x in arrays), join


def _per_device(
    share: Callable[..., Any],
    outputs: tuple[str, ...],
    hidden: Float[Array, "batch length width"],
    table: Float[Array, "vocab width"],
    *by_token: Array,
) -> Any:
    """Calls `share` on each device's tokens and vocabulary, or once on everything.

    Args:
      share: takes a `_Split` and the arrays, returns a tuple.
      outputs: how each of its results is split: "tokens" or "d_table".
      hidden, table: the arrays split by tokens and by vocabulary.
      *by_token: further arrays split by tokens.
    """
    mesh = sharding.active_mesh()
    if mesh is None:
        return share(_Split(), hidden, table, *by_token)
    tokens = sharding.fitting_spec(mesh, hidden.shape[:2], "batch", "length")
    rows = sharding.fitting_spec(mesh, table.shape, "vocab", "embed")
    split = _Split(
        tokens=_axis_names(tokens[0]) + _axis_names(tokens[1]), vocab=_axis_names(rows[0])
    )
    # A device needs the table's whole width, but keeps its part of the gradient alone.
    if set(_axis_names(rows[1])) <= set(split.tokens):
        split = dataclasses.replace(split, width=_axis_names(rows[1]))
    vocab = jax.sharding.PartitionSpec(rows[0])
    specs = {"tokens": tokens, "d_table": rows if split.width else vocab}
    # Nothing is differentiated through here: all sums are written out.
    return jax.shard_map(
        functools.partial(share, split),
        in_specs=(tokens, vocab, *(tokens for _ in by_token)),
        out_specs=tuple(specs[output] for output in outputs),
    )(hidden, table, *by_token)


def _axis_names(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes that one entry of a `PartitionSpec` names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
