"""What the TPU compiler makes of the kernels, without a TPU, beside jax's splash attention.

    python -m benchmarks.tpu_static --generations=v5p,v6e --lengths=4096

compiles both for each generation, reads the final instruction schedules, and prints

- a table of loops: bundles a visited tile of 128 x 128 entries, share of bundles in which a
  matrix unit issues, loads and stores of spilled vector registers;
- an estimate of whole calls: every part's bundles times how often these inputs run it, or
  the time memory needs for the bytes that move, whichever is longer. Splash attention is
  taken at the block sizes, of those tried, at which its own estimate is lowest.

`--compile` instead prints memory and seconds for every generation, length and head size.

A schedule is what issues if nothing ever waits. It does not see waits for memory within a
step, contention of matrix units beyond what the compiler spaces out, the clock, or how
XLA's own operations around the kernels run.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Iterable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import Array, Float, Int

from benchmarks import cases
from benchmarks.tpu_compiler import TOPOLOGIES, Compiler, Part
from benchmarks.tpu_estimate import Kernel, chunk_visits, memory_bundles, splash, waiting_bundles
from lazyattn import lazy_attention
from pallas_kernels import bias as bias_lib
from pallas_kernels.tpu import config
from pallas_kernels.visit import TileSizes, visit_ranges

_TILE = 128
WIDTH = 1024


@dataclasses.dataclass(frozen=True)
class Counts:
    """How many tiles of keys each query tile of each head visits besides its diagonal.

    Attributes:
      visited, live: [heads, query_tiles].
    """

    visited: Int[np.ndarray, "heads query_tiles"]
    live: Int[np.ndarray, "heads query_tiles"]


def arguments(shape: cases.Shape, dtype: Any = jnp.bfloat16) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes of the op's arguments."""
    size = jax.ShapeDtypeStruct

    def heads(count: int) -> jax.ShapeDtypeStruct:
        return size((shape.batch, shape.length, count, shape.head_dim), dtype)

    return {
        "query": heads(shape.heads),
        "key": heads(shape.kv_heads),
        "value": heads(shape.kv_heads),
        "distance_bias": size((shape.heads, WIDTH), jnp.float32),
        "distance_slope": size((shape.heads,), jnp.float32),
        "offset": size((shape.heads,), jnp.float32),
    }


def run(args: dict[str, Array]) -> Array:
    """The op."""
    return lazy_attention(**args, implementation="tpu")


def gradient(args: dict[str, Array]) -> dict[str, Array]:
    """Its gradient, which takes the forward pass that leaves residuals."""
    return jax.grad(lambda args: jnp.sum(run(args).astype(jnp.float32)))(args)


def counts(case: str, shape: cases.Shape, block: TileSizes) -> Counts:
    """Returns the tiles that real inputs visit, and those with a live entry."""
    query, key, _, _ = cases.tensors(shape, jnp.bfloat16, 0)
    parameters = cases.parameters(case, shape, WIDTH, None)
    slope = parameters.get("distance_slope")
    bias = bias_lib.expand(parameters["distance_bias"], slope, shape.length)
    ranges = visit_ranges(
        query,
        key,
        bias,
        parameters["offset"],
        jnp.zeros((shape.batch, shape.length), jnp.int32),
        scale=shape.head_dim**-0.5,
        skip_mass=1e-6,
        tiles=block,
    )
    ratio = block.queries // block.keys
    diagonal = np.arange(ranges.first.shape[-1]) * ratio
    if case == "dense":
        live = np.zeros(ranges.first[0].shape, int)
    else:
        finest = np.stack(
            [
                np.asarray(_first_live(query[0, :, h], key[0, :, h], bias[h]))
                for h in range(shape.heads)
            ]
        )
        live = finest.reshape(shape.heads, -1, block.queries // _TILE).min(-1)
        live = live * _TILE // block.keys
    first = np.asarray(ranges.first[0])
    return Counts(
        np.maximum(diagonal - first, 0), np.maximum(diagonal - np.maximum(live, first), 0)
    )


@jax.jit
def _first_live(
    query: Float[Array, "length head_dim"],
    key: Float[Array, "length head_dim"],
    bias: Float[Array, " length"],
) -> Int[Array, " query_tiles"]:
    """Returns the first tile of 128 keys with a live entry, for offset -1."""
    length, dim = query.shape

    def one(tile: Int[Array, ""]) -> Int[Array, ""]:
        rows = jax.lax.dynamic_slice_in_dim(query, tile * _TILE, _TILE).astype(jnp.float32)
        at = tile * _TILE + jnp.arange(_TILE)
        distance = at[:, None] - jnp.arange(length)
        scores = rows @ key.astype(jnp.float32).T * dim**-0.5 + bias[jnp.maximum(distance, 0)]
        scores = jnp.where(distance >= 0, scores, -jnp.inf)
        bar = jax.nn.logsumexp(scores, axis=1) - jnp.log1p(at)
        return jnp.argmax(jnp.any(scores > bar[:, None], axis=0)) // _TILE

    return jax.lax.map(one, jnp.arange(length // _TILE))


def report(compiler: Compiler, generation: str, shape: cases.Shape) -> None:
    """Prints both tables for one generation and shape."""
    block = config.block(generation, 2, shape.head_dim, shape.length)
    tiles = block.queries * block.keys / _TILE**2
    head_dim = config.padded_head_dim(shape.head_dim)
    tiles_a_step = config.tiles_a_step(generation, block, shape.length, head_dim, 2)
    _, _, chunks = config.layout(generation, block, shape.length, head_dim, 2)
    # Two heads would be one for each core of a chip with two, and no loop over heads.
    args = arguments(dataclasses.replace(shape, batch=1, heads=4, kv_heads=4))
    compiler.compile(lambda args: (run(args), gradient(args)), (args,), generation)
    turns = shape.length // block.queries + 1
    kernels = {}
    for name in ("lazy_inference", "lazy_forward", "lazy_backward"):
        kernels[name] = Kernel.of(compiler.schedule(name), turns, backward=name == "lazy_backward")
    peer = splash(compiler, generation, shape)
    print(f"\n{generation}, length {shape.length}, head size {shape.head_dim}, bfloat16")
    print(f"tiles {block.queries} x {block.keys}; splash attention {peer.blocks}\n")
    print("| loop | bundles a 128 x 128 tile | matrix units issue | spills |")
    print("|---|---|---|---|")
    for name, parts in (
        ("lazy_inference", ("first sweep", "second sweep")),
        ("lazy_forward", ("first sweep", "second sweep")),
        ("lazy_backward", ("live tiles", "dead tiles")),
    ):
        for loop, part in zip(kernels[name].loops, parts, strict=True):
            _line(f"{name}, {part}", loop, 2 * tiles)
    print(f"\n{kernels}" if flags.FLAGS.parts else "", end="")
    of_peer = peer.blocks[0] * peer.blocks[1] / _TILE**2
    for loop, part in zip(peer.loops, ("forward", "backward"), strict=True):
        _line(f"splash attention, {part}", loop, of_peer)
    both = peer.forward + peer.backward
    print("\n| case | what | estimated bundles a head | splash | ratio | visited | live |")
    print("|---|---|---|---|---|---|---|")
    for case in flags.FLAGS.cases:
        found = counts(case, shape, block)
        dead = found.visited - found.live
        cycles = {}
        for name, kernel in kernels.items():
            first, second = (
                (found.live, dead) if name == "lazy_backward" else (found.visited, found.live)
            )
            backward = name == "lazy_backward"
            cut = chunks if backward else 1
            visits = chunk_visits(block, shape.length // cut, found.visited)
            rows = zip(first.tolist(), second.tolist(), visits.tolist(), strict=True)
            bundles = np.mean(
                [kernel.cycles(a, b, tiles_a_step, cut, visit) for a, b, visit in rows]
            )
            if cut > 1:
                bundles += visits.sum(axis=1).mean() * waiting_bundles(generation, block, head_dim)
            moved = memory_bundles(generation, shape, backward=backward)
            cycles[name] = max(float(bundles), moved)
        query_tiles = found.visited.shape[1]
        below = len(found.visited) * query_tiles * (query_tiles - 1) / 2
        below *= block.queries // block.keys
        shares = [f"{part.sum() / max(below, 1):.2f}" for part in (found.visited, found.live)]
        training = cycles["lazy_forward"] + cycles["lazy_backward"]
        for what, ours, theirs in (
            ("forward", cycles["lazy_inference"], peer.forward),
            ("forward + backward", training, both),
        ):
            print(
                f"| {case} | {what} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.2f}"
                f" | {shares[0]} | {shares[1]} |",
                flush=True,
            )


def _line(name: str, loop: Part, tiles: float) -> None:
    share = loop.issuing / loop.bundles
    print(
        f"| {name} | {loop.bundles / tiles:.1f} | {share:.2f}"
        f" | {loop.spills} in {loop.bundles} bundles |"
    )


def compile_table(compiler: Compiler, generations: Iterable[str]) -> bool:
    """Prints what every combination needs; returns whether all compile."""
    print("| TPU | length | head size | tiles | VMEM, planned | HBM temporaries | seconds |")
    print("|---|---|---|---|---|---|---|")
    good = True
    for generation in generations:
        for length in map(int, flags.FLAGS.lengths):
            for head_dim in map(int, flags.FLAGS.head_dims):
                shape = cases.Shape(1, 2, length, head_dim, 2)
                block = config.block(generation, 2, head_dim, length)
                args = arguments(shape)
                try:
                    found, seconds = compiler.compile(gradient, (args,), generation)
                except Exception as error:
                    good = False
                    print(f"| {generation} | {length} | {head_dim} | {str(error)[:200]!r} |")
                    continue
                padded = config.padded_head_dim(head_dim)
                turned, _, chunks = config.layout(generation, block, length, padded, 2)
                planned = config.vmem_bytes(
                    block,
                    length,
                    length // chunks,
                    padded,
                    2,
                    backward=True,
                    turned=turned,
                    step_queries=block.queries
                    * config.tiles_a_step(generation, block, length, padded, 2),
                )
                temporary = found.memory_analysis().temp_size_in_bytes
                print(
                    f"| {generation} | {length} | {head_dim} | {block.queries} x {block.keys},"
                    f" {chunks} chunks | {planned / 2**20:.0f} MiB"
                    f" | {temporary / 2**20:.0f} MiB | {seconds:.0f} |",
                    flush=True,
                )
    return good


def main(argv: list[str]) -> None:
    """Prints a report for each generation."""
    del argv
    options = flags.FLAGS
    compiler = Compiler(dump=not options.compile)
    if options.compile:
        sys.exit(int(not compile_table(compiler, options.generations)))
    for generation in options.generations:
        for length in map(int, options.lengths):
            for head_dim in map(int, options.head_dims):
                if options.block:
                    queries, keys = map(int, options.block.split("x"))
                    found = TileSizes(queries, keys)
                    config.block = lambda *_, found=found: found
                shape = cases.Shape(1, options.heads, length, head_dim, options.heads)
                report(compiler, generation, shape)


if __name__ == "__main__":
    flags.DEFINE_list("generations", ["v5p", "v6e"], f"Of {', '.join(TOPOLOGIES)}.")
    flags.DEFINE_list("lengths", ["4096"], "Sequence lengths.")
    flags.DEFINE_list("head_dims", ["128"], "Head sizes.")
    flags.DEFINE_list("cases", ["dense", "alibi"], f"Of {', '.join(cases.CASES[:2])}.")
    flags.DEFINE_integer("heads", 16, "Heads whose inputs are drawn.")
    flags.DEFINE_string("block", "", 'Tiles to try instead of the table\'s, "512x256".')
    flags.DEFINE_boolean("parts", False, "Show all parts of our kernels.")
    flags.DEFINE_boolean("compile", False, "Only compile, and say what memory it takes.")
    app.run(functools.partial(main))
