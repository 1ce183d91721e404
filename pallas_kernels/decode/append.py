"""Writing new keys and values into caches by one kernel, where there is one for it."""

from collections.abc import Sequence

from jaxtyping import Array, Float, Int

from pallas_kernels.decode.types import MAX_CACHES, PAGE, Held
from pallas_kernels.tpu import support as tpu_support
from pallas_kernels.triton import support


def append(
    held: Sequence[Held],
    heads: Sequence[Sequence[int]],
    keys: Float[Array, "batch new kv_heads d"],
    values: Float[Array, "batch new kv_heads d"],
    start: Int[Array, " batch"],
    count: Int[Array, " batch"],
) -> list[Held] | None:
    """Returns the caches with new positions, in the old ones' memory; None: no kernel does it.

    The old ones are copied first, unless they are donated.

    Args:
      held: of each cache keys and values [batch, slots, heads, d], not of int8, and norms
        [batch, heads, pages].
      heads: the key/value heads of each.
      keys, values: of positions start[b], start[b] + 1 and on.
      start: int32, positions each row has had.
      count: int32, how many of the new ones each row has; the others are not written.
    """
    if tpu_unsupported(held) is None:
        from pallas_kernels.decode import tpu_append  # As `op` imports the TPU's kernels.

        return tpu_append.append(held, heads, keys, values, start, count)
    if unsupported(held, keys.shape[1]) is not None:
        return None
    from pallas_kernels.decode import triton_append  # Triton takes a second to import.

    return triton_append.append(held, heads, keys, values, start, count)


def tpu_unsupported(held: Sequence[Held]) -> str | None:
    """Returns why the TPU's kernel can't do it, as the end of "... since ..."; None: it can."""
    for keys, _, _ in held:
        if keys.shape[1] % PAGE:
            return f"{keys.shape[1]} slots are no whole pages"
        if keys.dtype not in ("float32", "bfloat16"):
            return f"the cache is {keys.dtype}"
    return tpu_support.unavailable()


def unsupported(held: Sequence[Held], new: int) -> str | None:
    """Returns why Triton can't do it, as the end of "... since ..."; None: it can."""
    if len(held) > MAX_CACHES:
        return f"there are {len(held)} caches, above {MAX_CACHES}"
    for keys, _, _ in held:
        if PAGE < keys.shape[1] < PAGE + new:
            return f"a ring of {keys.shape[1]} keys comes back to its first page in one step"
    keys = held[0][0]
    refused = support.refusal(keys.shape[-1], keys.shape[-1], keys.dtype)
    return refused or support.refuses_in_place()
