"""What compilers make of the decode kernels, without a GPU or a TPU.

    python -m benchmarks.decode_static --capability=90

One line a kernel of a few calls: the 340M model's with all keys and with five rings, softmax, int8,
and grouped queries of eight tokens. Of Triton's kernels registers, spills and shared memory; exits
with status 1 if a kernel spills more than --spills or asks for more than the GPU has.

    python -m benchmarks.decode_static --generations=v4,v5e,v5p,v6e,7x

Of the TPU's kernel the bundles of its final schedule (instructions that issue in one cycle each):
for a chunk of keys and one of values that all queries see, for every eight chunks that are told
live or dead, and for what a program does besides; the bundles in whose time memory moves a chunk at
its full bandwidth; and the share of that time in the whole call, where all is live.
"""

import os
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import triton_static
from benchmarks.tpu_compiler import TOPOLOGIES, Compiler, Part, Schedule
from benchmarks.tpu_estimate import BYTES_A_BUNDLE
from lazyattn import InputError, decode_attention
from lazyattn.decode_attention import PAGE
from pallas_kernels.decode.tpu import CHUNK_PAGES

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


def launches(capability: int, **call: Any) -> list[triton_static.Launch]:
    """Returns the launches of one call.

    Args:
      capability: compute capability, e.g. 90.
      call: arguments of `arguments`.
    """
    given, heads = arguments(**call)
    with triton_static.captured(capability, None) as found:
        jax.eval_shape(lambda given: run(given, heads, "triton"), given)
    return found


def run(given: dict[str, Any], head_groups: list[list[int]], implementation: str) -> jax.Array:
    """Returns the op's output."""
    how: dict[str, Any] = {"head_groups": head_groups, "ring": True}
    return decode_attention(**given, **how, implementation=implementation)


def arguments(
    groups: tuple[tuple[int, int], ...],
    *,
    batch: int = 8,
    new: int = 1,
    queries: int = 1,
    head_dim: int = 64,
    offset: bool = True,
    bias: bool = True,
    quantized: bool = False,
) -> tuple[dict[str, Any], list[list[int]]]:
    """Returns shapes of the op's arguments, in bfloat16, and the heads of each group.

    Args:
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
    return given, [[next(every) for _ in range(own)] for _, own in groups]


def _seen_in_full(schedule: Schedule, loop: Part) -> int:
    """Returns the bundles of a turn but for its last branch, of chunks not seen in full."""
    last = [
        part.bundles
        for part in schedule.regions
        if part.start > loop.start + 8 and loop.stop - 2 <= part.stop <= loop.stop
    ]
    return loop.bundles - max(last, default=0)


def tpu_line(compiler: Compiler, generation: str, name: str) -> str:
    """Returns a line of the TPU's table; calls of one cache only."""
    ((slots, kv_heads),) = CALLS[name]["groups"]
    given, heads = arguments(**CALLS[name])
    compiled, _ = compiler.compile(lambda given: run(given, heads, "tpu"), (given,), generation)
    schedule = compiler.schedule("lazy_decode")
    (whole,) = [loop for depth, loop in schedule.loops if depth == 1]
    inner = [loop for depth, loop in schedule.loops if depth == 2]
    keys, values = (loop for loop in inner if loop.products)
    marks = sum(loop.bundles for loop in inner if not loop.products)
    rest = whole.bundles - sum(loop.bundles for loop in inner)
    a_key, a_value = (_seen_in_full(schedule, loop) for loop in (keys, values))
    cache = given["key_cache"][0]
    batch, head_dim = cache.shape[0], cache.shape[-1]
    chunk = CHUNK_PAGES * PAGE
    memory = chunk * head_dim * cache.dtype.itemsize / BYTES_A_BUNDLE[generation]
    chunks = slots / chunk
    issued = chunks * (max(a_key, memory) + max(a_value, memory) + marks / 8) + rest
    bytes_read = 2 * batch * slots * kv_heads * head_dim * cache.dtype.itemsize
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return (
        f"| {generation} | {name} | {a_key} | {a_value} | {marks} | {rest} | {memory:.0f}"
        f" | {2 * chunks * memory / issued:.2f} | {whole.spills} | {bytes_read / 1e6:,.0f} MB"
        f" | {temporary / 1e6:,.0f} MB |"
    )


def of_tpus(generations: list[str], only: list[str]) -> bool:
    """Prints the TPU's table; returns whether all compiles."""
    try:
        compiler, good = Compiler(), True
    except InputError as error:
        sys.exit(str(error))
    print("| TPU | call | keys | values | marks | besides | memory | its share | spills", end="")
    print(" | keys and values | HBM temporaries |")
    print("|" + "---|" * 11)
    for generation in generations:
        for name in only or [name for name in CALLS if len(CALLS[name]["groups"]) == 1]:
            try:
                print(tpu_line(compiler, generation, name), flush=True)
            except Exception as error:
                good = False
                print(f"| {generation} | {name} | {str(error)[:200]!r} |", flush=True)
    return good


def main(argv: list[str]) -> None:
    """Prints one line a kernel."""
    del argv
    options = flags.FLAGS
    if options.generations:
        sys.exit(int(not of_tpus(options.generations, options.only)))
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
    flags.DEFINE_list("generations", [], f"TPUs, of {', '.join(TOPOLOGIES)}.")
    flags.DEFINE_integer("spills", 0, "Bytes a thread may spill.")
    flags.DEFINE_list("only", [], "Calls of those listed; none: all.")
    app.run(main)
