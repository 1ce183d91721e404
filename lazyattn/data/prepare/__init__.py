"""Text to what training reads: packed rows of a small source, or tokenised shards.

`prepare` packs the text of a `DataConfig` into rows, in the cache, when training
starts. `python -m lazyattn.data.prepare` tokenises a corpus of any size into a folder
of shards, once; `lazyattn.data.prepare.run.prepare_shards` is that as a function.
"""

from lazyattn.data.prepare.packed_text import PreparedData, SplitCounts, prepare

__all__ = ["PreparedData", "SplitCounts", "prepare"]
