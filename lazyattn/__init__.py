"""Lazy Attention for JAX: attention that is allowed to look at nothing."""

from lazyattn.attention import cross_attention, lazy_attention
from lazyattn.compile_target import compile_for
from lazyattn.decode_attention import decode_attention
from lazyattn.errors import InputError
from lazyattn.op_parameters import alibi_slopes, init_offset, t5_buckets_to_table

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "__version__",
    "alibi_slopes",
    "compile_for",
    "cross_attention",
    "decode_attention",
    "init_offset",
    "lazy_attention",
    "t5_buckets_to_table",
]
