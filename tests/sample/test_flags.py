"""The flags of the cache."""

import pytest
from absl import flags

from lazyattn.errors import InputError
from lazyattn.generation.cache import CacheOptions
from lazyattn.sample import flags as sample_flags


def _parse(*arguments):
    values = flags.FlagValues()
    sample_flags.define(values)
    values(["train.py", *arguments])
    return sample_flags.cache_options(values)


def test_what_to_hold():
    assert _parse() == CacheOptions("spans", "compute", None)
    given = _parse("--cache=spans", "--cache_dtype=int8", "--cache_buckets=128,1000")
    assert given == CacheOptions("spans", "int8", (128, 1000))
    assert _parse("--cache=full") == CacheOptions("full", "compute", None)
    assert _parse("--cache_buckets=").buckets == ()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--cache=half", "--cache is 'half', but it must be spans or full"),
        ("--cache=full --cache_buckets=128", "--cache is 'full', but it must be spans with"),
        ("--cache_dtype=int4", "--cache_dtype is 'int4', but it must be compute or int8"),
        ("--cache_buckets=128,many", "--cache_buckets is '128,many', but it must be whole numbers"),
        ("--cache_buckets=512,128", r"\(--cache_buckets\) are \[512, 128\], .* and rising"),
    ],
)
def test_bad_flags(flag, message):
    with pytest.raises(InputError, match=message):
        _parse(*flag.split())
