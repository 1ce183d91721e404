"""A whole token: all layers, the logits, and the greedy choice of the next token."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks import timing
from benchmarks.decode.attention import filled
from benchmarks.decode.heads import Heads
from benchmarks.decode.plan import Line
from lazyattn.generation import cache as cache_lib
from lazyattn.generation import serving
from lazyattn.generation.cache import CachePlan
from lazyattn.generation.prepared import PreparedModel, prepare
from lazyattn.model.parameters import init_params


@functools.cache
def model(heads: Heads) -> PreparedModel:
    """Returns a model with random weights and these heads."""
    return jax.jit(lambda: _model(heads))()


def _model(heads: Heads) -> PreparedModel:
    params = init_params(heads.config, jax.random.key(0))
    attention = params["blocks"]["attention"]
    own = {k: jax.tree.map(jnp.asarray, x) for k, x in heads.attention.items() if k in attention}
    blocks = params["blocks"] | {"attention": attention | own}
    return prepare(params | {"blocks": blocks}, heads.config)


def shapes(heads: Heads) -> PreparedModel:
    """Returns the shapes of that model's arrays."""
    return jax.eval_shape(functools.partial(_model, heads))


def weight_bytes(ready: Any) -> int:
    """Returns the bytes of weights that a token reads: layers and unembedding."""
    layers = {k: x for k, x in ready.params.items() if k.startswith("blocks")}
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((layers, ready.output)))


def free_bytes(weights: int) -> int:
    """Returns the bytes there are for a cache beside the weights and what a step takes."""
    stats = jax.devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit", 2**33)
    # Activations, logits and scores.
    return int(0.94 * limit) - weights - limit // 64


@dataclasses.dataclass
class Token:
    """Whole tokens of one case.

    Attributes:
      line: its results; the bytes of attention are known before tokens are timed.
      heads: what they have learned.
      plan: which keys the cache holds.
      calls: tokens in a row.
      rounds: times they are timed.
      run: several tokens.
    """

    line: Line
    heads: Heads
    plan: CachePlan
    calls: int
    rounds: int
    run: Any = None

    def compile(self) -> None:
        """Compiles several tokens; raises MemoryError where the cache does not fit."""
        ready = shapes(self.heads)
        free = free_bytes(weight_bytes(ready))
        self.line.largest_batch = free // self.plan.row_bytes
        if self.line.batch > self.line.largest_batch:
            raise MemoryError(
                f"the cache takes {self.plan.row_bytes * self.line.batch / 1e9:.0f} GB"
            )
        cache = jax.eval_shape(lambda: cache_lib.init_cache(self.plan, self.line.batch))
        token = jax.ShapeDtypeStruct((self.line.batch, 1), jnp.int32)
        # As in `generate`: tokens follow each other without the host.
        run = jax.jit(self._tokens, donate_argnums=1)
        self.run = run.lower(ready, (cache, token)).compile()
        seed = jax.ShapeDtypeStruct((), jnp.int32)
        for shape in {group.keys.shape for layer in cache.layers for group in layer}:
            filled.lower(seed, shape, self.heads.norm).compile()

    def _tokens(self, ready: Any, state: Any) -> Any:
        def one(_: Array, state: Any) -> Any:
            cache, token = state
            logits, cache = serving.step_rows(ready, cache, token)
            return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, self.calls, one, state)

    def measure(self, rate: float) -> Callable[[], Any]:
        """Times whole tokens and returns what does some; arguments as of `Attention.measure`."""
        line, ready = self.line, model(self.heads)
        assert line.bytes_attention is not None
        line.bytes = weight_bytes(ready) + line.bytes_attention
        line.limit_ms = 1e3 * line.bytes / rate
        layers = []
        for n, groups in enumerate(self.plan.layers):
            layers.append(
                tuple(
                    filled(
                        jnp.int32(64 * n + i),
                        (line.batch, group.slots, len(group.heads), self.plan.head_dim),
                        self.heads.norm,
                    )
                    for i, group in enumerate(groups)
                )
            )
        # The last are those of a profile.
        steps = self.calls * (self.rounds + 2)
        lengths = jnp.full(line.batch, line.context - steps, jnp.int32)
        cache = cache_lib.KVCache(tuple(layers), lengths, self.plan)
        del layers
        state = [(cache, jnp.ones((line.batch, 1), jnp.int32))]
        del cache

        def several() -> Array:
            state.append(self.run(ready, state.pop()))
            return state[0][1]

        ms = timing.milliseconds(several, calls=1, rounds=self.rounds)
        line.ms_token = ms / self.calls
        return several
