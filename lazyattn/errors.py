"""One way to say that an input is wrong, so that every message reads alike."""

from typing import Any


class InputError(ValueError):
    """Something the user gave is wrong; the message is one sentence naming it.

    `train.py` prints the message alone and exits with status 2. Library callers
    catch it as the `ValueError` it is.
    """


def bad_value(name: str, value: Any, allowed: str) -> InputError:
    """Returns the error for an argument, flag or config key with a bad value.

    Args:
      name: what the user wrote, e.g. "model.attention.variant" or "query".
      value: the value found.
      allowed: what would have been right, continuing "it must be ...".
    """
    return InputError(f"{name} is {value!r}, but it must be {allowed}.")


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Raises `bad_value(name, value, allowed)` unless `condition` holds."""
    if not condition:
        raise bad_value(name, value, allowed)
