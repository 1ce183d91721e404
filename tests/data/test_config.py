import pytest

from lazyattn.data.config import DataConfig
from lazyattn.errors import InputError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sequence_length", 0),
        ("batch_size", 0),
        ("vocab_size", 258),
        ("packing", "tight"),
        ("validation_fraction", 0.0),
        ("validation_fraction", 1.0),
        ("num_workers", -1),
        ("prefetch", -1),
    ],
)
def test_a_bad_value_is_named(name, value):
    with pytest.raises(InputError, match=rf"^data\.{name} is .*, but it must be .*\.$"):
        DataConfig(**{name: value})
