"""Settings in checkpoints of older versions: brought up to date, or refused by name.

A checkpoint's settings say of which schema they are. A setting added later is not in
them and gets its default, so a new setting's default must be what was done before it
was there. Whatever else changes (a key renamed, removed, or with another meaning)
raises `SCHEMA`, and an upgrade says what older settings mean today.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lazyattn.errors import InputError
from lazyattn.experiment import from_config_dict

SCHEMA = 2
_KEY = "schema"

Settings = dict[str, Any]


def _from_0(settings: Settings) -> Settings:
    """Before they were stamped: all keys are as in 1, where they are there."""
    return settings


def _from_1(settings: Settings) -> Settings:
    """Before a bias had a kind, it was a table; what is "decay" now was not there."""
    attention = settings.get("model", {}).get("attention")
    if attention is not None:
        settings["model"]["attention"] = {"bias_kind": "table", **attention}
    return settings


# The n-th brings settings of schema n to n + 1.
UPGRADES: tuple[Callable[[Settings], Settings], ...] = (_from_0, _from_1)


def stamped(settings: Mapping[str, Any]) -> Settings:
    """Returns settings for a checkpoint, with their schema."""
    return {_KEY: SCHEMA, **settings}


def upgraded(settings: Mapping[str, Any], where: Path) -> Settings:
    """Returns a checkpoint's settings as those of today, without the stamp.

    Args:
      settings: as `stamped` by this or an older version.
      where: the checkpoint, for messages.

    Raises:
      InputError: if they are of a newer version, or have a key or a value that this
        one doesn't know.
    """
    found = copy.deepcopy(dict(settings))
    schema = found.pop(_KEY, 0)
    if not isinstance(schema, int) or not 0 <= schema <= SCHEMA:
        raise InputError(
            f"The checkpoint {where} has settings of schema {schema!r}, but this version of"
            f" lazyattn reads schemas 0 to {SCHEMA}; use the version that wrote it, or a later one."
        )
    for upgrade in UPGRADES[schema:]:
        found = upgrade(found)
    try:
        from_config_dict(found)
    except InputError as error:
        raise InputError(
            f"The checkpoint {where} has settings that this version of lazyattn can't read:"
            f" {error} Use the version that wrote it, or choose another --workdir."
        ) from None
    return found
