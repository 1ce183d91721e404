"""Lazy Attention for JAX: attention that is allowed to look at nothing."""

from lazyattn.attention import lazy_attention
from lazyattn.errors import InputError

__all__ = ["InputError", "lazy_attention"]
