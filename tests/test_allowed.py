import dataclasses
import math
from typing import Annotated, Literal

import pytest

from lazyattn.allowed import (
    BELOW_ONE,
    FINITE,
    NON_NEGATIVE,
    POSITIVE,
    SHARE,
    at_least,
    check_settings,
    one_of,
)
from lazyattn.errors import InputError
from lazyattn.experiment import ExperimentConfig


@dataclasses.dataclass(frozen=True)
class Settings:
    kind: Literal["a", "b", "c"] = "a"
    pair: Literal["a", "b"] | None = None
    name: Annotated[str, one_of(("x", "y"))] = "x"
    count: Annotated[int, at_least(2)] = 2
    limit: Annotated[int, at_least(1)] | None = None
    width: Annotated[int | None, at_least(1)] = None
    free: int = -7
    tau: Annotated[float, FINITE] = -1.0
    rate: Annotated[float, POSITIVE] = 1e-9
    cost: Annotated[float, NON_NEGATIVE] = 0.0
    share: Annotated[float, SHARE] = 1.0
    decay: Annotated[float, BELOW_ONE] = 0.0

    def __post_init__(self):
        check_settings(self, "where.")


def test_what_is_allowed():
    assert Settings() == Settings(limit=None, width=None, pair=None)
    Settings("c", "b", "y", 10**9, 1, 1, 0, 1e30, 1e30, 1e30, 0.0, 0.999)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("kind", "d", "a, b or c"),
        ("kind", None, "a, b or c"),
        ("pair", "c", "a or b"),
        ("name", "z", "one of x, y"),
        ("count", 1, "at least 2"),
        ("count", math.nan, "at least 2"),
        ("limit", 0, "at least 1"),
        ("width", 0, "None or at least 1"),
        ("tau", -math.inf, "finite"),
        ("rate", 0.0, "positive and finite"),
        ("cost", math.inf, "non-negative and finite"),
        ("share", 1.01, "from 0 to 1"),
        ("decay", 1.0, "from 0 to below 1"),
        ("decay", math.nan, "from 0 to below 1"),
    ],
)
def test_what_is_not(name, value, words):
    with pytest.raises(InputError) as refused:
        Settings(**{name: value})
    assert str(refused.value) == f"where.{name} is {value!r}, but it must be {words}."


# Numbers for which each value is right; all else says what it must be.
FREE = {"data.shuffle_seed", "training.seed"}


def _numbers(config, where=""):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, f"{where}{field.name}.")
        elif type(value) in (int, float):
            yield f"{where}{field.name}", config, field.name


def test_every_number_of_an_experiment_is_checked():
    unchecked = set()
    for key, config, name in _numbers(ExperimentConfig()):
        try:
            dataclasses.replace(config, **{name: -math.inf})
        except InputError as refused:
            assert str(refused).startswith(f"{key} is -inf, but it must be "), refused
        else:
            unchecked.add(key)
    assert unchecked == FREE
