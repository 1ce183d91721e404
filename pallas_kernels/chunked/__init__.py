"""Lazy Attention in plain JAX, memory linear in length: the kernels' readable twin."""

from pallas_kernels.chunked.op import attention

__all__ = ["attention"]
