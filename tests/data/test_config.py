import pytest

from lazyattn.data.config import DataConfig
from lazyattn.errors import InputError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sequence_length", 0),
        ("batch_size", 0),
        ("streams_per_row", 0),
        ("vocab_size", 258),
        ("packing", "tight"),
        ("long_documents", "drop"),
        ("sources", (("a", 0.0),)),
        ("sources", (("a", 1.0), ("a", 2.0))),
        ("sources", ("a", "b")),
        ("validation_fraction", 0.0),
        ("validation_fraction", 1.0),
        ("num_workers", -1),
        ("prefetch", -1),
    ],
)
def test_a_bad_value_is_named(name, value):
    with pytest.raises(InputError, match=rf"^data\.{name} is .*, but it must be .*\.$"):
        DataConfig(**{name: value})


def test_folders_of_shards():
    one = DataConfig(path="a", long_documents="truncate")
    several = DataConfig(sources=[["a", 1], ["b", 3.0]])
    assert one.tokenised and one.weighted_paths == (("a", 1.0),)
    assert several.tokenised and several.weighted_paths == (("a", 1.0), ("b", 3.0))
    assert not DataConfig().tokenised and DataConfig().weighted_paths == ()
    with pytest.raises(InputError, match=r"data\.path is 'c', but data\.sources names folders"):
        DataConfig(path="c", sources=(("a", 1.0),))
