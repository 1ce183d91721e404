"""What the Triton compiler makes of the decode kernels, without a GPU: registers, spills.

    python -m benchmarks.decode_static --capability=90

One line a kernel of a few calls: the 340M model's with all keys and with five rings, softmax, int8,
and grouped queries of eight tokens. Exits with status 1 if a kernel spills more than --spills
or asks for more shared memory than the GPU has.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import triton_static
from lazyattn import decode_attention
from lazyattn.decode_attention import PAGE

# Slots of each group, and its heads; new tokens; query heads a key head; head size; what else.
_FULL = ((32_768, 16),)
_RINGS = ((384, 7), (1152, 3), (3200, 3), (6528, 2), (9344, 1))
CALLS: dict[str, dict[str, Any]] = {
    "full": {"groups": _FULL},
    "rings": {"groups": _RINGS},
    "softmax": {"groups": _FULL, "offset": False, "bias": False},
    "softmax with bias": {"groups": _FULL, "offset": False},
    "int8": {"groups": _FULL, "quantized": True},
    "8 tokens, 4 x 8 heads of 128": {
        "groups": ((32_768, 8),),
        "new": 8,
        "queries": 4,
        "head_dim": 128,
    },
}


def launches(
    capability: int,
    groups: tuple[tuple[int, int], ...],
    *,
    batch: int = 8,
    new: int = 1,
    queries: int = 1,
    head_dim: int = 64,
    offset: bool = True,
    bias: bool = True,
    quantized: bool = False,
) -> list[triton_static.Launch]:
    """Returns the launches of one call, in bfloat16.

    Args:
      capability: compute capability, e.g. 90.
      groups: slots and key heads of each cache.
      batch, new, queries, head_dim: rows, tokens, query heads a key head, head size.
      offset, bias, quantized: Elastic-Softmax; a bias with a tail; int8 caches.
    """
    kv_heads = sum(heads for _, heads in groups)
    heads = kv_heads * queries

    def shape(*dims: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype)

    given: dict[str, Any] = {
        "query": shape(batch, new, heads, head_dim, dtype=jnp.bfloat16),
        "lengths": shape(batch, dtype=jnp.int32),
    }
    if bias:
        given |= {"distance_bias": shape(heads, 1024), "distance_slope": shape(heads)}
    if offset:
        given["offset"] = shape(heads)
    kind = jnp.int8 if quantized else jnp.bfloat16
    caches = [shape(batch, slots, own, head_dim, dtype=kind) for slots, own in groups]
    by_page = [shape(batch, own, -(-slots // PAGE)) for slots, own in groups]
    given |= {"key_cache": caches, "value_cache": caches, "key_norms": by_page}
    if quantized:
        given |= {"key_scales": by_page, "value_scales": by_page}
    every = iter(range(kv_heads))
    head_groups = [[next(every) for _ in range(own)] for _, own in groups]

    def run(given: dict[str, Any]) -> jax.Array:
        how: dict[str, Any] = {"head_groups": head_groups, "ring": True}
        return decode_attention(**given, **how, implementation="triton")

    with triton_static.captured(capability, None) as found:
        jax.eval_shape(run, given)
    return found


def main(argv: list[str]) -> None:
    """Prints one line a kernel."""
    del argv
    options = flags.FLAGS
    bad = False
    print(f"sm_{options.capability}, bfloat16")
    print("| call | kernel | registers | spilled | shared | programs |")
    print("|---|---|---|---|---|---|")
    for name in options.only or CALLS:
        for launch in launches(options.capability, **CALLS[name]):
            found = triton_static.report(launch, options.capability)
            print(
                f"| {name} | {launch.kernel.__name__} | {found.registers} | {found.spilled}"
                f" | {found.shared} | {found.programs} |",
                flush=True,
            )
            bad |= found.spilled > options.spills or found.programs == 0
    sys.exit(int(bad))


if __name__ == "__main__":
    flags.DEFINE_integer("capability", 90, "Compute capability.")
    flags.DEFINE_integer("spills", 0, "Bytes a thread may spill.")
    flags.DEFINE_list("only", [], "Calls of those listed; none: all.")
    app.run(main)
