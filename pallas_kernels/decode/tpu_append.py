"""Writing new keys and values into caches on TPUs, in place, with slots innermost.

The kernel that reads the cache wants its slots along lanes. XLA's own scatter would not, and the
cache would be copied from one form to the other in each step. A vector has 128 slots, so a step
of the grid writes a page of a row anew: what it held, with the new positions put in.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels.decode.types import PAGE, Held
from pallas_kernels.own_settings import traced_by_own_settings
from pallas_kernels.problem import current_options
from pallas_kernels.tpu.call import Operand, launch
from pallas_kernels.tpu.kernel_types import Refs

# Numbers of a slot, up to which a page of so many heads has room in any VMEM.
_MOST = 4096


def heads_a_block(heads: int, head_dim: int) -> int:
    """Returns how many heads of a page a program takes at once, a divisor of all."""
    most = max(1, _MOST // head_dim)
    return max(n for n in range(1, min(heads, most) + 1) if heads % n == 0)


@traced_by_own_settings(narrow=True)
def append(
    held: Sequence[Held],
    heads: Sequence[Sequence[int]],
    keys: Float[Array, "batch new kv_heads d"],
    values: Float[Array, "batch new kv_heads d"],
    start: Int[Array, " batch"],
    count: Int[Array, " batch"],
) -> list[Held]:
    """Returns the caches with new positions; see `append.append`."""
    found = []
    for cache, own in zip(held, heads, strict=True):
        key, value = (x[:, :, jnp.asarray(own)].astype(cache[0].dtype) for x in (keys, values))
        found.append(_one(cache, key, value, start.astype(jnp.int32), count.astype(jnp.int32)))
    return found


def _one(
    held: Held,
    keys: Float[Array, "batch new heads d"],
    values: Float[Array, "batch new heads d"],
    start: Int[Array, " batch"],
    count: Int[Array, " batch"],
) -> Held:
    batch, slots, heads, dim = held[0].shape
    new = keys.shape[1]

    size = heads_a_block(heads, dim)

    def page(b, h, turn, starts, counts):
        # The first new position's page and the last one's, which are one as a rule.
        position = starts[b] + turn * (new - 1)
        return b, h, 0, jax.lax.rem(position, slots) // PAGE

    def own(b, h, turn, *refs):
        return b, h, 0, 0

    operands = []
    for name, x in (("new_key", keys), ("new_value", values)):
        # Vectors of float32 have each number alone.
        wide = x.transpose(0, 2, 3, 1).astype(jnp.float32)
        operands.append(Operand(name, wide, (1, size, dim, new), own))
    cached = [x.transpose(0, 2, 3, 1) for x in held[:2]]
    block = (1, size, dim, PAGE)
    operands += [
        Operand(name, x, block, page) for name, x in zip(("key", "value"), cached, strict=True)
    ]
    outputs = [
        Operand(name, jax.ShapeDtypeStruct(x.shape, x.dtype), block, page)
        for name, x in zip(("key_out", "value_out"), cached, strict=True)
    ]
    out = launch(
        functools.partial(_kernel, new, slots),
        "lazy_append",
        (batch, heads // size, min(new, 2)),
        2,
        {"starts": start, "counts": count},
        operands,
        outputs,
        {},
        aliases={"key": "key_out", "value": "value_out"},
        interpret=current_options().interpret,
    )
    key, value = (out[name].transpose(0, 3, 1, 2) for name in ("key_out", "value_out"))
    return key, value, _norms(held[2], keys, start, count, slots)


def _kernel(new: int, slots: int, refs: Refs) -> None:
    """Writes one page: all new positions that it has."""
    row, turn = pl.program_id(0), pl.program_id(2)
    start, count = refs.starts[row], refs.counts[row]
    own = jax.lax.rem(start + turn * (new - 1), slots) // PAGE
    for name in ("key", "value"):
        old = getattr(refs, name)[0].astype(jnp.float32)
        lane = jax.lax.broadcasted_iota(jnp.int32, old.shape, 2)
        for i in range(new):
            slot = jax.lax.rem(start + i, slots)
            there = (i < count) & (slot // PAGE == own)
            at = jnp.where(there, slot % PAGE, -1)
            old = jnp.where(lane == at, getattr(refs, f"new_{name}")[0, :, :, i : i + 1], old)
        out = getattr(refs, f"{name}_out")
        out[0] = old.astype(out.dtype)


def _norms(
    norms: Float[Array, "batch heads pages"],
    keys: Float[Array, "batch new heads d"],
    start: Int[Array, " batch"],
    count: Int[Array, " batch"],
    slots: int,
) -> Float[Array, "batch heads pages"]:
    """Returns the pages' norms; a page that a row comes to for the first time begins anew."""
    each = jnp.linalg.norm(keys.astype(jnp.float32), axis=-1)
    number = jnp.arange(norms.shape[2], dtype=jnp.int32)
    for i in range(keys.shape[1]):
        position = start + i
        slot = position % slots
        fresh = (slot % PAGE == 0) & (position < slots)
        old = jnp.where(fresh[:, None, None], 0, norms)
        here = (i < count)[:, None] & (number == (slot // PAGE)[:, None])
        norms = jnp.where(here[:, None], jnp.maximum(old, each[:, i, :, None]), norms)
    return norms
