"""The study's commands.

    python -m benchmarks.study run --data=FOLDER --variants=softmax,sharp --seeds=0,1,2 \
        --tokens=100e6 --workdir=runs/study --cache=runs/compiled
    python -m benchmarks.study trial --data=FOLDER --variants=sharp --try=model.remat=dots
    python -m benchmarks.study uptrain --data=FOLDER --kept=runs/study --output=lines.jsonl
    python -m benchmarks.study report
"""

import time

_START = time.monotonic()  # before what takes seconds to import

# ruff: noqa: E402
import os
import sys
from collections.abc import Sequence

from absl import flags, logging

from lazyattn import flag_help
from lazyattn.errors import InputError, require

_COMMANDS = ("run", "trial", "uptrain", "report")


def main(argv: Sequence[str]) -> int:
    """Does what the command line says; returns the exit status."""
    logging.set_verbosity(logging.WARNING)
    try:
        _command(argv)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _help(values: flags.FlagValues) -> None:
    print(f"{__doc__}\n{values.get_help()}")


def _command(argv: Sequence[str]) -> None:
    command = argv[1] if len(argv) > 1 else ""
    asked_for_help = flag_help.is_asked(argv)
    if asked_for_help and command not in _COMMANDS:
        print(__doc__, end="")
        return
    require(command in _COMMANDS, "the command", command, "one of " + ", ".join(_COMMANDS))
    values = flags.FlagValues()
    arguments = [argv[0], *argv[2:]]
    if command == "report":
        from benchmarks.study import report

        report.define(values)
        if asked_for_help:
            _help(values)
            return
        report.main(arguments, values)
        return
    from benchmarks.study import options, run, trial, uptrain

    options.define(values)
    if command == "trial":
        options.define_trial(values)
    elif command == "uptrain":
        uptrain.define(values)
    if asked_for_help:
        _help(values)
        return
    options.parse(arguments, values)
    if command == "uptrain":
        found = uptrain.read(values, lambda: time.monotonic() - _START)
        run.run(found, uptrain.Uptraining)
        return
    asked = options.read(values, lambda: time.monotonic() - _START)
    if command == "run":
        run.run(asked)
    else:
        tries = values["try"].value or []
        require(values.steps >= 1, "--steps", values.steps, "at least 1")
        require(values.rounds >= 1, "--rounds", values.rounds, "at least 1")
        trial.trial(asked, tries, steps=values.steps, rounds=values.rounds)


if __name__ == "__main__":
    status = main(sys.argv)
    sys.stdout.flush()
    # A program that is still being compiled for a run that won't come is not waited for.
    os._exit(status)
