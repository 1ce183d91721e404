"""The flags of `--mode=export`."""

import dataclasses
from typing import Annotated, Any, Literal

from absl import flags

from lazyattn import command_line, paths
from lazyattn.allowed import at_least, check_settings
from lazyattn.errors import InputError, require

FORMATS = ("orbax", "safetensors", "hub")


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What to write.

    Attributes:
      formats: of `FORMATS`, at least one.
      dtype: of the matrices.
      layout: of the Orbax checkpoint.
      bias_length: distances to write the bias table out to, in place of its tail;
        None: as it is.
      import_from: folder of safetensors to read the model from; None: a checkpoint
        of the run.
      output: folder to make; None: `export` in the run's.
    """

    formats: tuple[str, ...] = ("orbax",)
    dtype: Literal["float32", "bfloat16"] = "float32"
    layout: Literal["unsharded", "sharded"] = "unsharded"
    bias_length: Annotated[int, at_least(1)] | None = None
    import_from: str | None = None
    output: str | None = None

    def __post_init__(self):
        require(
            bool(self.formats)
            and set(self.formats) <= set(FORMATS)
            and ("hub" not in self.formats or self.formats == ("hub",)),
            "--formats",
            ",".join(self.formats),
            "orbax, safetensors, or both with a comma between them, or hub alone",
        )
        check_settings(self, "--")
        if self.import_from is not None and self.output is None:
            raise InputError(
                "--output is not given, but --import_from needs it: the folder to write the model"
                " to."
            )


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags that no other mode has; --output is shared."""
    where: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_list("formats", ["orbax"], "export: orbax, safetensors or both; or hub.", **where)
    flags.DEFINE_string("dtype", "float32", "export: float32 or bfloat16, for matrices.", **where)
    flags.DEFINE_string(
        "layout", "unsharded", "export: of the Orbax checkpoint, unsharded or sharded.", **where
    )
    flags.DEFINE_integer(
        "bias_length", None, "export: distances of a bias table without a tail.", **where
    )
    paths.define(
        "import_from",
        None,
        "export: safetensors to read instead of a run's checkpoint.",
        values,
        buckets=True,
    )


def options(values: flags.FlagValues = flags.FLAGS) -> ExportOptions:
    """Returns what to write.

    Raises:
      InputError: for a value out of range, or flags that do not go together.
    """
    formats = tuple(dict.fromkeys(name.strip() for name in values.formats))
    return command_line.settings(ExportOptions, values, formats=formats)
