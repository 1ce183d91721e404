import math

import numpy as np

from lazyattn.data.unigram import unigram_entropy


def test_unigram_entropy_by_its_definition(prepared):
    def targets(sources):
        return [
            int(target)
            for ids in sources[0].read(range(len(sources[0])))
            for target in (*ids, prepared.tokenizer.eos_id)
        ]

    train = targets(prepared.train)
    total = len(train) + prepared.tokenizer.vocab_size
    nats = [-math.log((train.count(t) + 1) / total) for t in targets(prepared.validation)]
    np.testing.assert_allclose(unigram_entropy(prepared), np.mean(nats), rtol=1e-12)
    assert 0 < unigram_entropy(prepared) < math.log(prepared.tokenizer.vocab_size)
