"""Lazy Attention in plain JAX, memory linear in length: the kernels' readable twin."""

from pallas_kernels.chunked.op import attention
from pallas_kernels.chunked.placed import placed_attention

__all__ = ["attention", "placed_attention"]
