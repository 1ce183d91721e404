"""Where copies and pass keys were: they are in `lazyattn.eval.retrieval` now."""

from lazyattn.eval.retrieval import (
    copy_rows,
    measure_copy,
    measure_passkey,
    passkey_rows,
)

__all__ = ["copy_rows", "measure_copy", "measure_passkey", "passkey_rows"]
