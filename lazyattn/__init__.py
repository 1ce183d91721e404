"""Lazy Attention for JAX: attention that is allowed to look at nothing."""

from lazyattn.attention import lazy_attention
from lazyattn.compile_target import compile_for
from lazyattn.decode_attention import decode_attention
from lazyattn.errors import InputError

__all__ = ["InputError", "compile_for", "decode_attention", "lazy_attention"]
