"""Where `LazyAttentionLM` was: it is in `lazyattn.eval.harness` now."""

from lazyattn.eval.harness import LazyAttentionLM

__all__ = ["LazyAttentionLM"]
