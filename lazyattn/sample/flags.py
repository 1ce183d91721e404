"""The flags of `--mode=sample`."""

from typing import Any

from absl import flags

from lazyattn import command_line
from lazyattn.generation.cache import CacheOptions
from lazyattn.generation.sampling import SamplingConfig


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags."""
    where: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_multi_string(
        "prompt", [""], "sample: text to continue; several times for several.", **where
    )
    flags.DEFINE_integer("max_new_tokens", 128, "sample: tokens to add at most.", **where)
    flags.DEFINE_float("temperature", 0.8, "sample: 0 takes the likeliest token.", **where)
    flags.DEFINE_float("top_p", 0.95, "sample: share of probability to draw from.", **where)
    flags.DEFINE_integer("top_k", 0, "sample: likeliest tokens to draw from; 0: all.", **where)
    flags.DEFINE_float(
        "min_p", 0.0, "sample: least probability, as a share of the likeliest token's.", **where
    )
    flags.DEFINE_float(
        "repetition_penalty", 1.0, "sample: how much less likely a token becomes by use.", **where
    )
    flags.DEFINE_multi_string(
        "stop", [], "sample: text to end before; several times for several.", **where
    )
    flags.DEFINE_integer(
        "seed", 0, "eval, sample: seed of the draws, of --retrieval in eval.", **where
    )
    flags.DEFINE_string(
        "cache",
        "spans",
        "sample: spans holds of each head the keys that it can need, full holds all.",
        **where,
    )
    flags.DEFINE_string(
        "cache_dtype",
        "compute",
        "sample: what keys and values are held in: compute (the model's dtype) or int8.",
        **where,
    )
    flags.DEFINE_list(
        "cache_buckets",
        None,
        "sample: lengths that the caches of heads may have, besides the whole length; default:"
        " those with which least is held.",
        **where,
    )


def sampling_config(values: flags.FlagValues = flags.FLAGS) -> SamplingConfig:
    """Returns how to draw.

    Raises:
      InputError: for a value out of range.
    """
    return command_line.settings(SamplingConfig, values)


def cache_options(values: flags.FlagValues = flags.FLAGS) -> CacheOptions:
    """Returns what to hold of keys and values.

    Raises:
      InputError: for a value out of range.
    """
    lengths = command_line.whole_numbers(values, "cache_buckets")
    buckets = None if values.cache_buckets is None else lengths
    return CacheOptions(values.cache, values.cache_dtype, buckets)
