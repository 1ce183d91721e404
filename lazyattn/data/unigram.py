"""The loss of a model that knows only how often each token occurs."""

import numpy as np
from jaxtyping import Int64

from lazyattn.data.prepare import PreparedData
from lazyattn.data.rows import PackedRows


def unigram_entropy(prepared: PreparedData) -> float:
    """Returns the cross-entropy of the validation targets under training frequencies.

    The model is the unigram distribution of the training targets, with one added to
    every count of the vocabulary. A trained model has learned something about order
    when its validation loss is below this.

    Returns:
      Nats a target token.
    """
    counts = _target_counts(prepared.train, prepared.tokenizer.vocab_size) + 1
    nats = np.log(counts.sum()) - np.log(counts)
    weights = _target_counts(prepared.validation, prepared.tokenizer.vocab_size)
    return float((weights * nats).sum() / weights.sum())


def _target_counts(rows: PackedRows, vocab_size: int) -> Int64[np.ndarray, " vocab"]:
    targets = rows.column("targets")[rows.column("segment_ids") > 0]
    return np.bincount(targets, minlength=vocab_size)
