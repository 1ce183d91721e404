"""Kernels for Lazy Attention: which tiles count, and what is computed on them.

Nothing here knows of models; models reach it through `lazyattn.lazy_attention`.
"""
