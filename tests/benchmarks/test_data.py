import itertools

from absl.testing import flagsaver

from benchmarks import data
from lazyattn.data.config import DataConfig
from lazyattn.data.pipeline import prepare, train_iterator


@flagsaver.flagsaver
def test_made_up_shards_are_read_and_timed(tmp_path):
    if not data.FLAGS.is_parsed():
        data.FLAGS.mark_as_parsed()
    documents = data.make_up(tmp_path, 300_000)
    data.FLAGS.read, data.FLAGS.rounds = 20_000, 2
    config = DataConfig(path=str(tmp_path), sequence_length=512, batch_size=4, packing="first_fit")
    opened = prepare(config)
    assert opened.counts["train"].documents == documents - 100
    result = data.measure(opened, config)
    assert 0.5 < result.efficiency < 1
    assert 0 < result.least <= result.tokens_per_second <= result.greatest
    again = data.make_up(tmp_path, 300_000)
    assert again == documents  # and the same tokens: the batches don't change
    batches = [next(train_iterator(prepare(config), config)) for _ in range(2)]
    assert all((a == b).all() for a, b in itertools.pairwise(b["inputs"] for b in batches))
    assert data.table([result]).count("|\n") == 3
