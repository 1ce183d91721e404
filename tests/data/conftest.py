import numpy as np
import pytest

from lazyattn.data.config import DataConfig
from lazyattn.data.pipeline import TrainingData, prepare

WORDS = ["the", "of", "a", "lazy", "model", "looks", "at", "nothing", "when", "every", "word"]


def write_texts(folder, documents=40, seed=0):
    """Fills a folder with small made-up documents."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    for i in range(documents):
        words = rng.choice(WORDS, size=rng.integers(5, 50))
        (folder / f"{i:03}.txt").write_text(" ".join(words) + ".\n")
    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def config(source) -> DataConfig:
    return DataConfig(
        source=str(source),
        vocab_size=300,
        sequence_length=16,
        batch_size=8,
        validation_fraction=0.2,
        prefetch=0,
    )


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def prepared(config, cache) -> TrainingData:
    return prepare(config, cache)
