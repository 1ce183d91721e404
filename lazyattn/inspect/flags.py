"""The flags of `--mode=inspect`."""

import dataclasses
import re
from typing import Annotated, Any

from absl import flags

from lazyattn import command_line, paths
from lazyattn.allowed import Allowed, at_least, check_settings
from lazyattn.errors import InputError


@dataclasses.dataclass(frozen=True)
class InspectionOptions:
    """What to look at.

    Attributes:
      against: folder of a second run, shown beside the first; None: none.
      text: file or folder of text, or of tokenised shards; None: the run's own
        validation documents.
      length: tokens of a row; None: that of the training rows, or of the longest
        document where that is shorter.
      rows: rows looked at, at most.
      heads: (layer, head) of the attention maps, both from 0; none: some of all layers.
      output: folder for the report; None: `inspection` in the run's.
      beyond_table: go on where a bias table without a tail ends.
    """

    against: str | None = None
    text: str | None = None
    length: Annotated[int, Allowed(lambda x: x >= 2, "at least 2 tokens")] | None = None
    rows: Annotated[int, at_least(1)] = 4
    heads: tuple[tuple[int, int], ...] = ()
    output: str | None = None
    beyond_table: bool = False

    def __post_init__(self):
        check_settings(self, "--")


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags that no other mode has; --text, --output and --beyond_table are shared."""
    where: dict[str, Any] = {"flag_values": values}
    paths.define(
        "against",
        None,
        "inspect: folder of a run to show beside.",
        values,
        buckets=True,
    )
    flags.DEFINE_integer("length", None, "inspect: tokens of a row.", **where)
    flags.DEFINE_integer("rows", 4, "inspect: rows looked at, at most.", **where)
    flags.DEFINE_list(
        "heads", [], "inspect: attention maps to draw, as LAYER.HEAD from 0.0 on.", **where
    )


def options(values: flags.FlagValues = flags.FLAGS) -> InspectionOptions:
    """Returns what to look at.

    Raises:
      InputError: for a value out of range or of another form.
    """
    texts = values.text
    if len(texts) > 1:
        raise InputError(
            f"--text is given {len(texts)} times, but --mode=inspect looks at one text."
        )
    heads = tuple(_head(name) for name in values.heads if name.strip())
    text = texts[0] if texts else None
    return command_line.settings(InspectionOptions, values, text=text, heads=heads)


def _head(name: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d+)\.(\d+)\s*", name)
    if match is None:
        raise InputError(
            f"--heads has {name!r}, but it must be a layer and a head with a point between them,"
            " such as 0.3."
        )
    return int(match[1]), int(match[2])
