"""Times sampling on any device: prefill of a long prompt, then tokens one after the other.

    python -m benchmarks.generation --context=16384 --cache=spans

The model has 4 layers of 4 heads of 64, float32, random weights and `qk_norm`, so that it is quick
on a CPU too; --model=340m is that of 24 layers of 16 heads, bfloat16, for a GPU. Prints one line of
JSON: seconds of the prefill (compiled before), tokens a second over all rows, and what the cache
takes.
"""

import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from lazyattn import paths
from lazyattn.generation import CacheOptions, SamplingConfig, decode, prepare, spans
from lazyattn.model.config import AttentionConfig, ModelConfig
from lazyattn.model.parameters import init_params

_CONTEXT = flags.DEFINE_integer("context", 16_384, "Tokens of a row when it is full.")
_ROWS = flags.DEFINE_integer("rows", 1, "Rows.")
_TOKENS = flags.DEFINE_integer("tokens", 64, "Tokens to draw; the prompt is the rest.")
_CACHE = flags.DEFINE_enum("cache", "spans", ["spans", "full"], "Keys that are held.")
_CACHE_DTYPE = flags.DEFINE_enum("cache_dtype", "compute", ["compute", "int8"], "In what.")
_ATTENTION = flags.DEFINE_enum("attention", "lazy", ["lazy", "softmax"], "Variant.")
_MODEL = flags.DEFINE_enum("model", "small", ["small", "340m"], "Its size.")
_OUTPUT = paths.define("output", None, "File that gets the line too.")

# Heads, and what else a model of each size has.
CONFIGS: dict[str, tuple[int, dict[str, Any]]] = {
    "small": (4, dict(vocab_size=4096, width=256, num_layers=4, compute_dtype="float32")),
    "340m": (16, dict(width=1024, num_layers=24)),
}


def main(argv: list[str]) -> None:
    """Prefills, draws and prints."""
    del argv
    heads, sizes = CONFIGS[_MODEL.value]
    attention = AttentionConfig(variant=_ATTENTION.value, num_heads=heads, qk_norm=True)
    config = ModelConfig(attention=attention, tie_embeddings=True, **sizes)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    rows, new = _ROWS.value, _TOKENS.value
    length = _CONTEXT.value - new
    options = CacheOptions(kind=_CACHE.value, dtype=_CACHE_DTYPE.value)
    plan = spans.plan_by(params, config, _CONTEXT.value, options)
    prompts = np.random.default_rng(0).integers(config.vocab_size, size=(rows, length))
    model = prepare(params, config)
    how: dict[str, Any] = {"sampling": SamplingConfig(max_new_tokens=new, temperature=0.0)}
    rest = jax.random.key(0), jnp.asarray(-1, jnp.int32)

    def start() -> decode.Progress:
        lengths = jnp.full(rows, length, jnp.int32)
        return decode.start(model, jnp.asarray(prompts), lengths, *rest, plan=plan, **how)

    def seconds(function: Any) -> tuple[float, Any]:
        begin = time.perf_counter()
        result = jax.block_until_ready(function())
        return time.perf_counter() - begin, result

    seconds(start)
    prefill, state = seconds(start)
    state = decode.advance(model, state, jnp.asarray(2), *rest, **how)
    jax.block_until_ready(state)
    decoding, _ = seconds(lambda: decode.advance(model, state, jnp.asarray(new), *rest, **how))
    found = {
        "context": _CONTEXT.value,
        "rows": rows,
        "attention": _ATTENTION.value,
        "cache": _CACHE.value,
        "cache_dtype": plan.dtype,
        "prefill_s": round(prefill, 3),
        "tokens_s": round(rows * (new - 2) / decoding, 2),
        "cache_bytes": plan.row_bytes * rows,
        "model": _MODEL.value,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    print(json.dumps(found))
    if _OUTPUT.value:
        with open(_OUTPUT.value, "a") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    app.run(main)
