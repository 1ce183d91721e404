"""The command line of the study."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.study.run import Options
from benchmarks.study.settings import BATCH, LENGTH, parse_overrides
from lazyattn.errors import InputError, bad_value, require


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `run` and `trial`."""
    where: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string("data", None, "Folder of tokens.", **where)
    flags.DEFINE_string("variants", "softmax,sharp", "Of benchmarks/study/variants.py.", **where)
    flags.DEFINE_string("seeds", "0", "Of parameters and order; a list.", **where)
    flags.DEFINE_string("tokens", "100e6", "Tokens of a run, such as 100e6.", **where)
    flags.DEFINE_string("learning_rate", "2e-3", "Peak; a list.", **where)
    flags.DEFINE_string(
        "log_slope_factor", None, "Of the slopes' learning rate; a list; default: the default.",
        **where,
    )  # fmt: skip
    flags.DEFINE_integer("length", LENGTH, "Tokens of a row.", **where)
    flags.DEFINE_integer("batch", BATCH, "Rows of a step.", **where)
    flags.DEFINE_multi_string("set", [], "A setting, such as model.remat=dots.", **where)
    flags.DEFINE_string("output", "benchmarks/results/study.jsonl", "File of lines.", **where)
    flags.DEFINE_string(
        "workdir", None, "Folder of checkpoints, shared by the processes of a machine.", **where
    )
    flags.DEFINE_string("cache", None, "Folder of compiled programs.", **where)
    flags.DEFINE_float("deadline", None, "Seconds that the process may take.", **where)
    flags.DEFINE_string("measure", "all", "all, or loss: validation and time alone.", **where)
    flags.DEFINE_bool("cudnn", False, "Time the variant softmax with cuDNN too.", **where)
    flags.DEFINE_string(
        "first", "variants", "variants or seeds: what to go through first.", **where
    )
    flags.DEFINE_bool(
        "time_attention", False, "Time attention alone on trained queries and keys.", **where
    )
    flags.DEFINE_bool(
        "keep", False, "Keep the last checkpoint of each run in --workdir, with the tokenizer.",
        **where,
    )  # fmt: skip
    flags.DEFINE_string(
        "turn", None, "File; processes that name it take turns at the GPU: one trains while"
        " others compile.", **where,
    )  # fmt: skip
    flags.DEFINE_string("commit", None, "Of the code, where there is no .git.", **where)


def define_trial(values: flags.FlagValues) -> None:
    """Defines what `trial` has besides."""
    where: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_multi_string(
        "try", [], "Settings to time, blanks between them: model.remat=dots batch=8.", **where
    )
    flags.DEFINE_integer("steps", 10, "Steps of a round.", **where)
    flags.DEFINE_integer("rounds", 3, "Rounds; the median counts.", **where)


def parse(argv: Sequence[str], values: flags.FlagValues) -> None:
    """Parses the flags.

    Raises:
      InputError: for a flag that isn't known or has a bad value.
    """
    try:
        rest = values(list(argv))
    except flags.Error as error:
        raise InputError(f"{str(error).splitlines()[0]}.") from None
    if len(rest) > 1:
        raise InputError(f"The argument {rest[1]!r} is not a flag; flags look like --data=DIR.")


def read(values: flags.FlagValues, elapsed: Callable[[], float]) -> Options:
    """Returns what the flags ask for.

    Raises:
      InputError: for a bad value.
    """
    require(bool(values.data), "--data", values.data, "a folder of tokens")
    output = Path(values.output)
    require(not output.is_dir(), "--output", values.output, "a file of lines, not a folder")
    require(values.first in ("variants", "seeds"), "--first", values.first, "variants or seeds")
    require(values.measure in ("all", "loss"), "--measure", values.measure, "all or loss")
    require(
        values.deadline is None or values.deadline > 0, "--deadline", values.deadline, "positive"
    )
    factors: tuple[float | None, ...] = (None,)
    if values.log_slope_factor is not None:
        factors = numbers("--log_slope_factor", values.log_slope_factor, float)
    return Options(
        data=values.data,
        variants=tuple(_parts("--variants", values.variants)),
        seeds=numbers("--seeds", values.seeds, int),
        learning_rates=numbers("--learning_rate", values.learning_rate, float),
        tokens=whole("--tokens", values.tokens),
        output=output,
        log_slope_factors=factors,
        length=values.length,
        batch=values.batch,
        overrides=parse_overrides(values.set),
        workdir=None if values.workdir is None else Path(values.workdir).expanduser(),
        cache=None if values.cache is None else Path(values.cache).expanduser(),
        deadline=values.deadline,
        measure=values.measure,
        cudnn=values.cudnn,
        time_attention=values.time_attention,
        first=values.first,
        keep=values.keep,
        turn=None if values.turn is None else Path(values.turn).expanduser(),
        commit=values.commit,
        elapsed=elapsed,
    )


def _parts(name: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    require(bool(parts), name, text, "at least one, commas between them")
    require(len(set(parts)) == len(parts), name, text, "without repetition")
    return parts


def numbers(name: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """Returns the numbers of a list with commas between them.

    Raises:
      InputError: for anything else.
    """
    try:
        return tuple(kind(part) for part in _parts(name, text))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise bad_value(name, text, "numbers, commas between them") from None


def whole(name: str, text: str) -> int:
    """Returns a whole number written as 100e6 is.

    Raises:
      InputError: for anything else.
    """
    try:
        number = float(text)
    except ValueError:
        raise bad_value(name, text, "a number such as 100e6") from None
    require(number >= 1 and number.is_integer(), name, text, "a whole number such as 100e6")
    return int(number)
