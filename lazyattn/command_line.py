"""Config flags whose mistakes come out as one clear sentence.

`ml_collections.config_flags` does the parsing. Its own errors are a mixture of
`KeyError`, `AttributeError` and flag errors with tracebacks in them, raised before
a program gets a say; so the overrides are checked here first, against the same
dataclasses that define the settings.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from absl import flags

from lazyattn.errors import InputError, bad_value
from lazyattn.experiment import ExperimentConfig, check_override, from_config_dict
from lazyattn.paths import check_local

_OVERRIDE = re.compile(r"--?(?P<no>no)?config\.(?P<key>[^=]+)(=(?P<value>.*))?", re.DOTALL)
_CONFIG = re.compile(r"--?config(=(?P<value>.*))?", re.DOTALL)


def parse(
    argv: Sequence[str],
    flag_values: flags.FlagValues = flags.FLAGS,
    example: str = "--workdir=DIR",
) -> list[str]:
    """Parses the command line.

    A config may be the name of one that comes with the package, with or without `configs/`
    before and `.py` behind it; a file of that path goes first.

    Args:
      argv: program name and arguments.
      flag_values: the flags to set, `config` (a config file) among them if there is one.
      example: a flag as the program's flags are written, for a message.

    Returns:
      `[argv[0]]`: there are no positional arguments.

    Raises:
      InputError: for anything wrong with the flags or the config file.
    """
    arguments = _checked(list(argv[1:]))
    try:
        rest = flag_values([argv[0], *arguments])
    except Exception as error:
        raise _translated(error) from None
    if len(rest) > 1:
        raise InputError(f"The argument {rest[1]!r} is not a flag; flags look like {example}.")
    return rest


def workdir(values: flags.FlagValues = flags.FLAGS) -> str:
    """Returns the folder of the run.

    Raises:
      InputError: if it is not given.
    """
    if not values.workdir:
        raise InputError("--workdir is not given, but it must be the folder of the run.")
    return values.workdir


def step(values: flags.FlagValues = flags.FLAGS) -> int | str | None:
    """Returns which checkpoint is chosen: a step, "best", or None for the newest.

    Raises:
      InputError: for anything else.
    """
    text: str | None = values.step
    if text is None or text == "best":
        return text
    if not text.isascii() or not text.isdecimal():
        raise bad_value("--step", text, "the step of a checkpoint, or best")
    return int(text)


def settings[Settings](
    kind: type[Settings], values: flags.FlagValues = flags.FLAGS, **made: Any
) -> Settings:
    """Returns settings made of the flags that are called as their fields are.

    Args:
      kind: a dataclass of settings.
      values: where the flags are.
      made: fields whose flags have another name or form.

    Raises:
      InputError: for a value out of range, or flags that do not go together.
    """
    names = [field.name for field in dataclasses.fields(cast(Any, kind))]
    return kind(**{name: made[name] if name in made else values[name].value for name in names})


def whole_numbers(values: flags.FlagValues, name: str) -> tuple[int, ...]:
    """Returns the numbers of a flag that is a list; () if it is not given.

    Raises:
      InputError: if there is anything else in it.
    """
    given: list[str] = values[name].value or []
    try:
        return tuple(int(text) for text in given)
    except ValueError:
        allowed = "whole numbers with commas between them"
        raise bad_value(f"--{name}", ",".join(given), allowed) from None


def experiment(values: flags.FlagValues = flags.FLAGS) -> ExperimentConfig | None:
    """Returns the settings of the config file and its overrides; None: no config file is given.

    Raises:
      InputError: for a setting that is wrong.
    """
    return None if values.config is None else from_config_dict(values.config)


def required_experiment(values: flags.FlagValues = flags.FLAGS) -> ExperimentConfig:
    """Returns `experiment`.

    Raises:
      InputError: as there, and if no config file is given.
    """
    found = experiment(values)
    if found is None:
        raise InputError(f"--config is not given, but --mode={values.mode} needs a config file.")
    return found


def _checked(arguments: list[str]) -> list[str]:
    """Returns the arguments, the config file found and it and each override checked."""
    config = None
    found = list(arguments)
    for index, argument in enumerate(arguments):
        following = arguments[index + 1] if index + 1 < len(arguments) else None
        if match := _CONFIG.fullmatch(argument):
            config = match["value"] if match["value"] is not None else following
            config = _config_file(*(config or "").partition(":")[::2])
            if match["value"] is not None:
                found[index] = f"--config={config}"
            else:
                found[index + 1] = config
        elif match := _OVERRIDE.fullmatch(argument):
            key = match["key"]
            if config is None:
                raise InputError(f"config.{key} is set, but no --config=FILE comes before it.")
            value = match["value"] if match["value"] is not None else following
            check_override(key, "false" if match["no"] else "" if value is None else value)
    return found


def shipped_configs() -> dict[str, Path]:
    """Returns the config files that come with the package, by name: "quickstart"."""
    here = Path(__file__).parent
    # A wheel has them below this folder, the repository beside it.
    folder = here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
    files = sorted(folder.rglob("[!_]*.py"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def _config_file(path: str, kind: str) -> str:
    """Returns a config file and what its colon has: as given, or of that name in the package.

    The name of a run or of an ablation is enough; it once was a file.
    """
    behind = f":{kind}" if kind else ""
    if Path(path).is_file():
        return path + behind
    shipped = shipped_configs()
    name = path.removeprefix("configs/").removesuffix(".py")
    if name in shipped:
        return str(shipped[name]) + behind
    from lazyattn.recipes import ABLATIONS, RUNS

    behind = f"+{kind}" if kind else ""
    if name in RUNS:
        return f"{shipped['fineweb_edu']}:{name}{behind}"
    folder, _, ablation = name.partition("/")
    if folder == "ablations" and ablation in ABLATIONS:
        return f"{shipped['ablations']}:{ablation}{behind}"
    # Only now: "hub:/a/folder" is no URL.
    check_local("--config", f"{path}:{kind}" if kind else path)
    names = ", ".join([*shipped, *RUNS])
    raise bad_value("--config", path, f"a config file that exists, or one of {names}")


def _translated(error: BaseException) -> InputError:
    """Returns the InputError inside `error`, or its message as one."""
    cause: BaseException | None = error
    innermost = None
    while cause is not None:
        if isinstance(cause, InputError):
            innermost = cause
        cause = cause.__cause__ or cause.__context__
    if innermost is not None:
        return innermost
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if isinstance(error, flags.Error) and "Traceback" not in str(error):
        return InputError(" ".join(lines).rstrip(".") + ".")
    # A mistake inside a config file: the last line of its traceback says what it was.
    problem = lines[-1] if lines else type(error).__name__
    return InputError(f"The config file can't be used: {problem.rstrip('.')}.")
