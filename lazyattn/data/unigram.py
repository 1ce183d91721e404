"""The loss of a model that knows only how often each token occurs."""

import numpy as np
from jaxtyping import Int64

from lazyattn.data.folders import TrainingData
from lazyattn.data.mixture import DocumentOrder
from lazyattn.data.streams import Documents

_SAMPLE = 2048  # documents of each folder


def unigram_entropy(prepared: TrainingData) -> float:
    """Returns the cross-entropy of the validation targets under training frequencies.

    The model is the unigram distribution of the training targets, with one added to
    every count of the vocabulary. A trained model has learned something about order
    when its validation loss is below this. Of a folder with many documents a sample
    is counted.

    Returns:
      Nats a target token.
    """
    counts, weights = (
        np.sum([_counts(source, prepared) for source in sources], axis=0)
        for sources in (prepared.train, prepared.validation)
    )
    nats = np.log((counts + 1).sum()) - np.log(counts + 1)
    return float((weights * nats).sum() / weights.sum())


def _counts(documents: Documents, prepared: TrainingData) -> Int64[np.ndarray, " vocab"]:
    """Returns how often each token is a target in a sample of documents."""
    number = min(len(documents), _SAMPLE)
    order = DocumentOrder(len(documents), seed=0)
    sample = documents.read([order[place] for place in range(number)])
    counts = np.bincount(np.concatenate(sample), minlength=prepared.tokenizer.vocab_size)
    counts[prepared.ids[1]] += number
    return counts
