"""Text to tokenized shards, which training reads.

`python -m lazyattn.data.prepare` does it for a corpus of any size;
`lazyattn.data.prepare.run.prepare_shards` is that as a function, and `source` calls it
for the text of a `DataConfig` when training starts.
"""
