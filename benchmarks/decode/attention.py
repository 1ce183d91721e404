"""The attention of one token in a few layers, each with a cache of its own."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from benchmarks import timing
from benchmarks.decode.heads import Heads
from benchmarks.decode.plan import Line
from lazyattn import decode_attention, lazy_attention
from lazyattn.decode_attention import PAGE
from lazyattn.generation.cache import CachePlan, GroupCache, HeadGroup
from pallas_kernels.decode import pages, xla
from pallas_kernels.decode.types import Inputs, Settings

# Bytes that the layers timed hold together at least: twice the cache of an H200.
ENOUGH = 2**27


def unit(key: Array, shape: tuple[int, ...], norm: float = 1.0) -> Array:
    """Returns random numbers whose last axis has `norm` times what RMS normalization gives."""

    def row(key: Array) -> Array:
        x = jax.random.normal(key, shape[1:], jnp.float32)
        x *= norm * math.sqrt(shape[-1]) / jnp.linalg.norm(x, axis=-1, keepdims=True)
        return x.astype(jnp.bfloat16)

    return jax.lax.map(row, jax.random.split(key, shape[0]))


@functools.partial(jax.jit, static_argnums=(1, 2))
def queries(seed: Array, shape: tuple[int, ...], norm: float) -> Array:
    """Returns queries [batch, 1, heads, head_dim]."""
    return unit(jax.random.key(seed, impl="rbg"), shape, norm)


@functools.partial(jax.jit, static_argnums=(1, 2))
def filled(seed: Array, shape: tuple[int, ...], norm: float) -> GroupCache:
    """Returns a cache of keys and values [batch, slots, heads, head_dim], all slots filled.

    Args:
      seed: of the random numbers.
      shape: of the keys.
      norm: of a key, over that which RMS normalization gives.
    """
    first, second = jax.random.split(jax.random.key(seed, impl="rbg"))
    batch, slots, heads, head_dim = shape
    longest = math.sqrt(head_dim) * (1 + 2.0**-7) * norm
    norms = jnp.full((batch, heads, -(-slots // PAGE)), longest, jnp.float32)
    return GroupCache(unit(first, shape, norm), unit(second, shape), norms)


@dataclasses.dataclass
class Attention:
    """One case of attention that is timed, and what is compiled for it.

    Attributes:
      line: its results.
      heads: what they have learned.
      plan: which keys the cache holds.
      number: layers that are timed.
      read: how many pages of a layer must be read.
      run: the attention of all these layers, of `calls` tokens.
      calls: tokens that follow each other on the device.
    """

    line: Line
    heads: Heads
    plan: CachePlan
    number: int = 0
    read: list[Any] = dataclasses.field(default_factory=list)
    run: Any = None
    calls: int = 10

    def __post_init__(self):
        held = self.held / len(self.plan.layers)
        distinct = self.heads.distinct
        number = min(len(self.plan.layers), max(2, math.ceil(ENOUGH / held)))
        self.number = self.line.layers_timed = -(-number // distinct) * distinct

    @property
    def held(self) -> int:
        """Returns the bytes of keys and values of all layers."""
        slots = sum(len(g.heads) * g.slots for layer in self.plan.layers for g in layer)
        return slots * self._slot_bytes

    @property
    def whole(self) -> int:
        """Returns what they would be if every key were held."""
        number = self.heads.config.attention.kv_heads * len(self.plan.layers)
        return number * self.line.context * self._slot_bytes

    @property
    def timed_bytes(self) -> int:
        """Returns the bytes of the layers that are timed."""
        return self.held * self.number // len(self.plan.layers)

    @property
    def _slot_bytes(self) -> int:
        return 2 * 2 * self.line.batch * self.heads.config.head_dim

    @property
    def same_inputs(self) -> Any:
        """Returns what is equal for cases that can share queries, keys and values."""
        groups = tuple(self._groups(n) for n in range(self.heads.distinct))
        return self.line.context, self.line.batch, groups, self.number, self.heads.score_bound

    def _groups(self, layer: int) -> tuple[HeadGroup, ...]:
        return self.plan.layers[layer % len(self.plan.layers)]

    def _shapes(self) -> list[tuple[int, ...]]:
        """Returns the shapes of all keys, and last that of the queries."""
        att, dim = self.heads.config.attention, self.heads.config.head_dim
        found = {
            (self.line.batch, group.slots, len(group.heads), dim)
            for n in range(self.heads.distinct)
            for group in self._groups(n)
        }
        return [*sorted(found), (self.line.batch, 1, att.num_heads, dim)]

    def inputs(self) -> list[dict[str, Any]]:
        """Returns random queries and caches of the layers that are timed."""
        *_, query = self._shapes()
        found = []
        for n in range(self.number):
            caches = [
                filled(
                    jnp.int32(64 * n + i),
                    (self.line.batch, group.slots, len(group.heads), query[-1]),
                    self.heads.norm,
                )
                for i, group in enumerate(self._groups(n))
            ]
            lengths = jnp.full(self.line.batch, self.line.context, jnp.int32)
            given = {"query": queries(jnp.int32(n), query, self.heads.norm), "caches": caches}
            found.append(given | {"lengths": lengths})
        return found

    def compile(self) -> None:
        """Compiles what is timed, what makes its inputs, and what counts pages."""
        seed = jax.ShapeDtypeStruct((), jnp.int32)
        *keys, query = self._shapes()
        for shape in keys:
            filled.lower(seed, shape, self.heads.norm).compile()
        queries.lower(seed, query, self.heads.norm).compile()
        given = jax.eval_shape(self.inputs)
        if self._is_ours and self.line.attention == "lazy":
            self.read = [
                jax.jit(functools.partial(self._read_pages, n)).lower(given[n]).compile()
                for n in range(self.heads.distinct)
            ]
        if self.line.implementation != "torch":
            self.run = jax.jit(self._all).lower(given).compile()

    @property
    def _is_ours(self) -> bool:
        return self.line.implementation == "lazyattn"

    def _all(self, layers: list[dict[str, Any]]) -> list[Array]:
        def attend(n: int, given: dict[str, Any]) -> Array:
            if self._is_ours:
                return self._attend(n, given)
            others = {"cudnn": _cudnn, "pallas": _pallas, "today": self._today}
            return others[self.line.implementation](given)

        def token(_: Array, queries: list[Array]) -> list[Array]:
            # As many layers as a token has: the host takes longer to start a loop's turn than a
            # few short kernels take.
            queries = list(queries)
            for n in range(len(self.plan.layers)):
                at = n % len(layers)
                out = attend(at, layers[at] | {"query": queries[at]})
                # The next call waits for this one, and rounding keeps its queries as they are.
                at = (n + 1) % len(layers)
                queries[at] = queries[at] + 2.0**-20 * out
            return queries

        # The host would take longer to start short kernels than they run.
        return jax.lax.fori_loop(0, self.calls, token, [given["query"] for given in layers])

    def _attend(self, layer: int, given: dict[str, Any]) -> Array:
        """Returns the output of a layer, called as `lazyattn.generation` calls it."""
        groups, caches = self._groups(layer), given["caches"]
        return decode_attention(
            given["query"],
            [x.keys for x in caches],
            [x.values for x in caches],
            given["lengths"],
            key_norms=[x.key_norms for x in caches],
            head_groups=[group.heads for group in groups],
            ring=min(group.slots for group in groups) < self.line.context,
            skip_mass=self.plan.skip_mass,
            **self.heads.arguments(layer),
        )

    def _today(self, given: dict[str, Any]) -> Array:
        (cache,) = given["caches"]
        return lazy_attention(
            given["query"],
            cache.keys,
            cache.values,
            query_start=given["lengths"] - 1,
            implementation="xla",
            **self.heads.arguments(0),
        )

    def _read_pages(self, layer: int, given: dict[str, Any]) -> Float[Array, ""]:
        """Returns how many pages of keys, and pages of values, must be read, of one head each."""
        attention = self.heads.config.attention
        size = attention.num_heads // attention.kv_heads
        arguments = self.heads.arguments(layer)
        settings = Settings(
            given["query"].shape[-1] ** -0.5, self.plan.skip_mass, None, None, False, True
        )
        total = jnp.zeros((), jnp.float32)
        for group, cache in zip(self._groups(layer), given["caches"], strict=True):
            readers = jnp.asarray([head * size + i for head in group.heads for i in range(size)])
            learned = {name: x[readers] for name, x in arguments.items()}

            def of_row(row: tuple[Any, ...], learned: Any = learned) -> Array:
                query, cache, lengths = jax.tree.map(lambda x: x[None], row)
                cached = {"key": cache.keys, "value": cache.values, "key_norms": cache.key_norms}
                inputs = Inputs(
                    query=query,
                    lengths=lengths,
                    **{name: x[None] for name, x in cached.items()},
                    **learned,
                    key_scales=None,
                    value_scales=None,
                    layer=jnp.int32(0),
                )
                read = pages.visited(inputs, settings)
                live = xla.weights(inputs, settings) > 0
                live = jnp.pad(live, [(0, 0)] * 4 + [(0, -inputs.slots % PAGE)])
                live = live.reshape(*live.shape[:4], -1, PAGE).any(axis=(2, 3, 5))
                return (read.sum() + (live & read).sum()).astype(jnp.float32)

            rows = given["query"][:, :, readers], cache, given["lengths"]
            total += jax.lax.map(of_row, rows).sum()
        return total

    def measure(self, layers: list[dict[str, Any]], rate: float, rounds: int) -> None:
        """Times the attention and counts what it must read; notes both in the line.

        Args:
          layers: `inputs`.
          rate: of a copy, bytes a second.
          rounds: times each is timed.
        """
        line, number = self.line, len(self.plan.layers)
        read = self.held / number
        if self.read:
            page = 2 * PAGE * self.heads.config.head_dim
            read = page * sum(float(f(layers[n])) for n, f in enumerate(self.read))
            read /= len(self.read)
        line.bytes_attention = int(read * number)
        line.limit_attention_ms = 1e3 * line.bytes_attention / rate
        line.read_share = line.bytes_attention / self.whole
        run = self.callable(layers)
        line.ms_attention = timing.milliseconds(run, calls=1, rounds=rounds) / self.calls

    def callable(self, layers: list[dict[str, Any]]) -> Callable[[], Any]:
        """Returns what is timed."""
        if self.line.implementation == "torch":
            return torch_run(layers, self.calls * len(self.plan.layers))
        return functools.partial(self.run, layers)


def _cudnn(given: dict[str, Any]) -> Array:
    (cache,) = given["caches"]
    return jax.nn.dot_product_attention(
        given["query"],
        cache.keys,
        cache.values,
        key_value_seq_lengths=given["lengths"],
        query_seq_lengths=jnp.ones_like(given["lengths"]),
        implementation="cudnn",
    )


def _pallas(given: dict[str, Any]) -> Array:
    from jax.experimental.pallas.ops.gpu.decode_attention import mqa  # Of GPUs alone.

    (cache,), query = given["caches"], given["query"]
    batch, slots, heads, dim = cache.keys.shape
    # Its own order of keys, read from the same memory: they are random.
    keys, values = (x.reshape(batch * heads, slots, dim) for x in (cache.keys, cache.values))
    lengths = jnp.repeat(given["lengths"], heads)
    out = mqa(query.reshape(batch * heads, 1, dim), keys, values, kv_seq_len=lengths)
    return out.reshape(query.shape).astype(query.dtype)


def torch_run(layers: list[dict[str, Any]], calls: int) -> Callable[[], Any]:
    """Returns so many calls of torch's fused attention to these layers, as a graph if possible."""
    import torch

    arrays = []
    for given in layers:
        (cache,) = given["caches"]
        parts = given["query"], cache.keys, cache.values
        arrays.append([torch.from_dlpack(x).transpose(1, 2) for x in parts])
    attention = torch.nn.functional.scaled_dot_product_attention

    class Result:
        """What `jax.block_until_ready` waits for."""

        def block_until_ready(self) -> None:
            torch.cuda.synchronize()

    def several() -> None:
        for n in range(calls):
            attention(*arrays[n % len(arrays)])

    several()
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            several()
        start = graph.replay
    except RuntimeError as error:
        print(f"torch without a graph: {str(error)[:200]}", flush=True)
        start = several

    def run() -> Any:
        start()
        return Result()

    return run
