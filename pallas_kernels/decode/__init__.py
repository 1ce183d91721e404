"""Attention of one or a few new queries a row to a cache of keys and values.

`op.py` states the semantics and picks a backend; each backend is a file.
"""
