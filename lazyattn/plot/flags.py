"""The flags of `--mode=plot`."""

from absl import flags

from lazyattn import paths
from lazyattn.errors import InputError


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flag that no other mode has; --output is shared."""
    paths.define_list(
        "runs",
        [],
        "plot: folders of more runs for the same picture, with commas between.",
        values,
        buckets=True,
    )


def runs(values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Returns the folders of all runs to draw: --workdir, if given, and --runs.

    Raises:
      InputError: if there is none.
    """
    first = [values.workdir] if values.workdir else []
    found = [*first, *(path.strip() for path in values.runs if path.strip())]
    if not found:
        raise InputError("--workdir is not given, but it must be the folder of the run.")
    return list(dict.fromkeys(found))
