"""How a task of lm-evaluation-harness wants to be continued."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lazyattn.errors import InputError, bad_value, require
from lazyattn.generation.sampling import SamplingConfig


class Generation(NamedTuple):
    """What a task's `generation_kwargs` ask for.

    Attributes:
      sampling: how to draw, and how many tokens.
      stop: texts to end before.
      seed: of the draws; None: none is given.
    """

    sampling: SamplingConfig
    stop: list[str]
    seed: int | None


# Names for the greatest number of new tokens; the first one given counts.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

# What `SamplingConfig` knows.
_SAMPLING = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
}
# Of these, what matters only where tokens are drawn.
_DRAWING = ("temperature", "top_p", "top_k", "min_p")

# Settings of other models that ask for nothing where they have this value.
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "use_beam_search": False,
    "num_return_sequences": 1,
    "n": 1,
    "best_of": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_tokens": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "diversity_penalty": 0,
    "penalty_alpha": 0,
    "guidance_scale": 1,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "echo": False,
    "stream": False,
}
# The same of settings that matter only where tokens are drawn.
_NEUTRAL_DRAWING = {"typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0, "top_a": 0}

# Settings that change no text whatever they say: of beams, of which there are none, and of
# how a model computes.
_IGNORED = (
    "early_stopping",
    "length_penalty",
    "use_cache",
    "cache_implementation",
    "low_memory",
    "remove_invalid_values",
    "renormalize_logits",
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
)


def read_settings(
    settings: Mapping[str, Any], default_length: int, where: str = "a task"
) -> Generation:
    """Returns what a task's settings mean.

    Draws only where `do_sample` says so or, without it, `temperature` is positive, as
    the harness's own models do. A setting that is None counts as not given.

    Args:
      settings: `generation_kwargs` of the task.
      default_length: tokens to add at most where they don't say.
      where: what the settings are of, for errors.

    Raises:
      InputError: for a setting that would have to change the text and is not known, or a
        value out of range.
    """
    given = {name: value for name, value in settings.items() if value is not None}

    def called(name: str) -> str:
        return f"The generation setting {name} of {where}"

    def number(name: str, value: Any, kind: type) -> Any:
        try:
            found = kind(value)
        except (TypeError, ValueError):
            raise bad_value(called(name), value, "a number") from None
        require(kind is float or found == float(value), called(name), value, "a whole number")
        return found

    stop = given.pop("until", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list | tuple) or not all(isinstance(s, str | None) for s in stop):
        raise bad_value(called("until"), stop, "a text or a list of texts")
    lengths = [number(name, given.pop(name), int) for name in _LENGTHS if name in given]
    seed = number("seed", given.pop("seed"), int) if "seed" in given else None
    values = {
        name: number(name, given.pop(name), kind)
        for name, kind in _SAMPLING.items()
        if name in given
    }
    if values.get("top_k") == -1:  # some say "all" like that
        del values["top_k"]
    draws = given.pop("do_sample", values.get("temperature", 0.0) > 0)
    if not draws:
        values = {name: value for name, value in values.items() if name not in _DRAWING}
        values["temperature"] = 0.0
    for name, value in sorted(given.items()):
        if name in _IGNORED or (name in _NEUTRAL_DRAWING and not draws):
            continue
        neutral = _NEUTRAL | _NEUTRAL_DRAWING
        if name not in neutral:
            raise InputError(
                f"{called(name)} is {value!r}, but it is unknown; it must be one of until,"
                f" {_LENGTHS[0]}, do_sample, seed, {', '.join(_SAMPLING)}."
            )
        require(value == neutral[name], called(name), value, f"{neutral[name]} here")
    try:
        sampling = SamplingConfig(
            max_new_tokens=lengths[0] if lengths else default_length, **values
        )
    except InputError as error:
        raise InputError(f"A generation setting of {where} is wrong: {error}") from error
    return Generation(sampling, [s for s in stop if s], seed)
