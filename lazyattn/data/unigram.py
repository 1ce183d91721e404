"""The loss of a model that knows only how often each token occurs."""

import numpy as np
from jaxtyping import Int64

from lazyattn.data.lanes import Documents
from lazyattn.data.mixture import DocumentOrder
from lazyattn.data.pipeline_shards import ShardedData
from lazyattn.data.prepare import PreparedData
from lazyattn.data.rows import PackedRows

_SAMPLE = 2048  # documents of each folder of shards


def unigram_entropy(prepared: PreparedData | ShardedData) -> float:
    """Returns the cross-entropy of the validation targets under training frequencies.

    The model is the unigram distribution of the training targets, with one added to
    every count of the vocabulary. A trained model has learned something about order
    when its validation loss is below this.

    Returns:
      Nats a target token.
    """
    counts, weights = (_split_counts(prepared, split) for split in ("train", "validation"))
    counts = counts + 1
    nats = np.log(counts.sum()) - np.log(counts)
    return float((weights * nats).sum() / weights.sum())


def _split_counts(prepared: PreparedData | ShardedData, split: str) -> Int64[np.ndarray, " vocab"]:
    size = prepared.tokenizer.vocab_size
    if isinstance(prepared, PreparedData):
        return _target_counts(getattr(prepared, split), size)
    samples = [
        _sampled_counts(source, prepared.ids[1], size) for source in getattr(prepared, split)
    ]
    return np.sum(samples, axis=0)


def _target_counts(rows: PackedRows, vocab_size: int) -> Int64[np.ndarray, " vocab"]:
    targets = rows.column("targets")[rows.column("segment_ids") > 0]
    return np.bincount(targets, minlength=vocab_size)


def _sampled_counts(
    documents: Documents, eos_id: int, vocab_size: int
) -> Int64[np.ndarray, " vocab"]:
    """Returns how often each token is a target in a sample of documents."""
    number = min(len(documents), _SAMPLE)
    order = DocumentOrder(len(documents), seed=0)
    sample = documents.read([order[place] for place in range(number)])
    counts = np.bincount(np.concatenate(sample), minlength=vocab_size)
    counts[eos_id] += number
    return counts
