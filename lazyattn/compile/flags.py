"""The flags of `--mode=compile`."""

from typing import Any

from absl import flags

from lazyattn.errors import InputError


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags."""
    where: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string(
        "topology",
        None,
        "compile: chips to compile for, as v5p:8x8x8, 2*v5e:16x16, h100:64 or cpu:8.",
        **where,
    )


def topology(values: flags.FlagValues = flags.FLAGS) -> str:
    """Returns the topology's name.

    Raises:
      InputError: if it is not given.
    """
    if not values.topology:
        raise InputError(
            "--topology is not given, but --mode=compile needs one, as v5p:8x8x8 or h100:64."
        )
    return values.topology
