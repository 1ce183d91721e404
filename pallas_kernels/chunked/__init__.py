"""Lazy Attention in plain JAX, memory linear in length: the kernels' readable twin."""
