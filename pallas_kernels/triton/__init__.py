"""Fused Lazy Attention for NVIDIA GPUs, in Triton, launched by jax-triton.

`support.unsupported` says whether a call can be done, without importing Triton;
`backend` does it.
"""
