"""Text from a model: key/value cache and sampling; docs/decoding.md says how.

prepare                        the model as decoding reads it, made once
plan_cache, full_plan          which keys a cache holds
init_cache, KVCache            the cache
prefill, extend, decode_step   tokens into its rows, logits out
free, rewind                   tokens out of its rows
next_token, SamplingConfig     a token from logits
generate                       whole continuations in one compiled loop
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lazyattn.generation.cache import CacheOptions, CachePlan, KVCache, full_plan, init_cache
    from lazyattn.generation.decode import generate
    from lazyattn.generation.prepared import PreparedModel, prepare
    from lazyattn.generation.sampling import SamplingConfig, next_token
    from lazyattn.generation.serving import NO_TOKEN, decode_step, extend, free, prefill, rewind
    from lazyattn.generation.spans import head_spans, plan_cache

# Imported when they are asked for: flags that live here need no model.
_HOMES = {
    "cache": ("CacheOptions", "CachePlan", "KVCache", "full_plan", "init_cache"),
    "decode": ("generate",),
    "prepared": ("PreparedModel", "prepare"),
    "sampling": ("SamplingConfig", "next_token"),
    "serving": ("NO_TOKEN", "decode_step", "extend", "free", "prefill", "rewind"),
    "spans": ("head_spans", "plan_cache"),
}

__all__ = [
    "NO_TOKEN",
    "CacheOptions",
    "CachePlan",
    "KVCache",
    "PreparedModel",
    "SamplingConfig",
    "decode_step",
    "extend",
    "free",
    "full_plan",
    "generate",
    "head_spans",
    "init_cache",
    "next_token",
    "plan_cache",
    "prefill",
    "prepare",
    "rewind",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
