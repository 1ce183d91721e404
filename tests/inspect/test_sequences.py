import numpy as np

from lazyattn.inspect.sequences import LENGTH, cut, inserted_token, sink_metric
from tests.inspect.models import model, tokens, weights_of


def test_cut():
    documents = [np.arange(130), np.arange(20), np.arange(64) + 500]
    found = cut(documents)
    assert [row[0] for row in found] == [0, 64, 500]
    assert all(len(row) == LENGTH for row in found)
    assert len(cut(documents, 2)) == 2
    assert cut([np.arange(63)]) == []


def test_sink_metric_and_inserted_token_from_the_weights():
    # That variant's rows are padded to the length it was trained with.
    config, params = model("lazy_length_offset")
    length = 80
    sequences = [tokens(LENGTH, seed) for seed in range(3)]

    def weights(rows):
        inputs = np.pad(np.stack(rows), ((0, 0), (0, length - LENGTH)))
        segments = np.pad(np.ones((len(rows), LENGTH), np.int32), ((0, 0), (0, length - LENGTH)))
        return weights_of(config, params, inputs, segments)[..., :LENGTH, :LENGTH]

    plain = weights(sequences)
    mean = plain.sum(-2) / (LENGTH - np.arange(LENGTH))
    found = sink_metric(params, config, sequences, length=length)
    np.testing.assert_allclose(found.by_position, (mean > 0.3).mean((0, 1, 2)))
    np.testing.assert_allclose(found.first_weight, mean[..., 0].mean(1), rtol=1e-5)
    assert found.sequences == 3

    found = inserted_token(params, config, sequences, 9, length=length)
    place = found.places.index(8)
    moved = [np.concatenate([row[:8], [9], row[8:-1]]).astype(np.int32) for row in sequences]
    after = weights(moved)[..., 9:, 8].mean((1, 3))
    np.testing.assert_allclose(found.weight[place], after, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(
        found.before[place], plain[..., 9:, 8].mean((1, 3)), rtol=1e-4, atol=1e-7
    )
