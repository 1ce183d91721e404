"""Lazy Attention for JAX: attention that is allowed to look at nothing."""

from lazyattn.attention import lazy_attention
from lazyattn.compile_target import compile_for
from lazyattn.errors import InputError

__all__ = ["InputError", "compile_for", "lazy_attention"]
