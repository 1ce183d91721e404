"""Lazy Attention on TPUs: Pallas kernels for Mosaic."""
