"""The command `lazyattn`: trains, tries out, evaluates, looks inside, samples, exports.

In the repository, `python train.py` is the same.

    lazyattn --config=quickstart --workdir=RUN --config.training.steps=50
    lazyattn --mode=check --config=quickstart --workdir=RUN
    lazyattn --mode=eval --workdir=runs/quickstart --contexts=256,512,1024
    lazyattn --mode=inspect --workdir=runs/quickstart --against=runs/softmax
    lazyattn --mode=plot --workdir=runs/quickstart --runs=runs/softmax
    lazyattn --mode=sample --workdir=runs/quickstart --prompt="The "
    lazyattn --mode=export --workdir=runs/quickstart --output=exports/quickstart
    lazyattn --mode=compile --config=lazy_7b_100b --topology=v5p:4x4x4

Training goes on from the newest checkpoint in --workdir. The modes eval, inspect, sample and
export read the settings from the checkpoint, so they need no --config; --step=N or --step=best
chooses another than the newest. --help lists all flags.

Exit status: 0 when done, 1 when training had to stop, a task could not be measured or what
--mode=check or compile looked at will not do, 2 when something given is wrong, 130 when stopped by
Ctrl-C, 143 when stopped by SIGTERM: the same command goes on.
"""

import _thread
import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from lazyattn import command_line, compile_cache, distributed, flag_help, paths
from lazyattn.compile import flags as compile_flags
from lazyattn.errors import InputError, require
from lazyattn.eval import flags as eval_flags
from lazyattn.experiment import ExperimentConfig
from lazyattn.export import flags as export_flags
from lazyattn.inspect import flags as inspect_flags
from lazyattn.plot import flags as plot_flags
from lazyattn.sample import flags as sample_flags

config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, or the name of one that comes with the package, such as quickstart; FILE:KIND or"
    " NAME:KIND for a kind of attention. Train, check and compile need one.",
)
paths.define(
    "workdir",
    None,
    "Folder of the run: checkpoints, logs, settings. It may be in a bucket, gs:// or s3://.",
    buckets=True,
)
_MODE = flags.DEFINE_string(
    "mode",
    "train",
    "What to do: train, check, eval, inspect, plot, sample, export or compile.",
)
flags.DEFINE_string(
    "step",
    None,
    "eval, inspect, sample, export: which checkpoint, by its step; 'best': the lowest validation"
    " loss; default: the newest.",
)
_INIT_FROM = paths.define(
    "init_from",
    None,
    "train, check: start from the weights of a run (RUN, RUN/checkpoints/STEP), of an export or of"
    " a Hugging Face folder; sets config.training.init_from.",
    buckets=True,
)
_PRINT_CONFIG = flags.DEFINE_bool(
    "print_config",
    False,
    "train, check, compile: print the settings that --config and its overrides make, and do"
    " nothing.",
)
_PROFILE = flags.DEFINE_string(
    "profile",
    None,
    "train: steps to trace, such as 100:105, into WORKDIR/profile for TensorBoard and xprof.",
)
_WANDB = flags.DEFINE_bool(
    "wandb",
    False,
    "train: send curves to Weights & Biases, too (pip install wandb); its variables, such as"
    " WANDB_MODE=offline, hold.",
)
_CACHE_DIR = paths.define(
    "cache_dir",
    None,
    "train, check, eval: folder for prepared data, and copies of data in buckets; default:"
    " LAZYATTN_CACHE or the user's cache.",
)
compile_cache.define()
distributed.define()
eval_flags.define()
inspect_flags.define()
plot_flags.define()
sample_flags.define()
export_flags.define()
compile_flags.define()


def _cache_dir() -> str:
    """Returns the folder for prepared data; one that can't be is refused before work begins."""
    from lazyattn.data.cache import default_cache_dir

    return _CACHE_DIR.value or str(default_cache_dir())


def _experiment() -> ExperimentConfig:
    """Returns the settings of the config file with all that flags make of them."""
    experiment = command_line.required_experiment()
    if _INIT_FROM.value is None:
        return experiment
    training = dataclasses.replace(experiment.training, init_from=_INIT_FROM.value)
    return dataclasses.replace(experiment, training=training)


# Each mode imports what it needs after its flags are read, so that mistakes in them come
# out at once.
def _train() -> int:
    """Trains a model; goes on from the newest checkpoint in --workdir."""
    experiment, path = _experiment(), command_line.workdir()
    cache_dir = _cache_dir()
    from lazyattn.checkpoint.manager import SaveError
    from lazyattn.hooks import HOOKS
    from lazyattn.training import profile
    from lazyattn.training.loop import NonFiniteError
    from lazyattn.training.main import train

    traced = profile.parse(_PROFILE.value, experiment.training.steps)
    try:
        return train(experiment, path, cache_dir, hooks=HOOKS, profile=traced, wandb=_WANDB.value)
    except (NonFiniteError, SaveError) as error:
        print(error, file=sys.stderr)
        return 1


def _check() -> int:
    """Takes one step of a run and keeps nothing: does all that a run needs work here?"""
    experiment, path = _experiment(), command_line.workdir()
    cache_dir = _cache_dir()
    from lazyattn.check.main import check
    from lazyattn.checkpoint.manager import SaveError
    from lazyattn.hooks import HOOKS

    try:
        return check(experiment, path, cache_dir, HOOKS)
    except SaveError as error:
        print(error, file=sys.stderr)
        return 1


def _eval() -> int:
    """Measures a checkpoint: validation loss, texts, context lengths, benchmarks."""
    options, path = eval_flags.options(), command_line.workdir()
    from lazyattn.eval.main import evaluate

    return evaluate(path, command_line.experiment(), _cache_dir(), options, command_line.step())


def _inspect() -> None:
    """Writes a report on what the attention of one run, or of two, does."""
    options, path = inspect_flags.options(), command_line.workdir()
    from lazyattn.inspect.main import inspect

    inspect(path, command_line.experiment(), options, command_line.step())


def _plot() -> None:
    """Draws the losses of runs against tokens and time, as SVG and PNG."""
    runs = plot_flags.runs()
    from lazyattn.plot.main import plot

    plot(runs, flags.FLAGS.output)


def _sample() -> None:
    """Continues prompts with a checkpoint."""
    sampling, cache = sample_flags.sampling_config(), sample_flags.cache_options()
    path = command_line.workdir()
    from lazyattn.sample.main import sample

    given = flags.FLAGS
    how = {"seed": given.seed, "stop": given.stop, "beyond_table": given.beyond_table}
    experiment, step = command_line.experiment(), command_line.step()
    sample(path, given.prompt, sampling, cache=cache, experiment=experiment, step=step, **how)


def _export() -> None:
    """Writes a folder with a model for others, or reads theirs."""
    options = export_flags.options()
    path = None if options.import_from else command_line.workdir()
    from lazyattn.export.main import export

    export(path, command_line.experiment(), options, command_line.step())


def _compile() -> int:
    """Compiles the training step for a pod without having one; says whether it fits."""
    topology, experiment = compile_flags.topology(), command_line.required_experiment()
    from lazyattn.compile.main import compile_report

    return compile_report(experiment, topology)


_MODES: dict[str, Callable[[], int | None]] = {
    "train": _train,
    "check": _check,
    "eval": _eval,
    "inspect": _inspect,
    "plot": _plot,
    "sample": _sample,
    "export": _export,
    "compile": _compile,
}
_COMPILE_ON_THIS_MACHINE = ("train", "check", "eval", "inspect", "sample", "export")
# The others would have nothing to do, or would print and write the same.
_SEVERAL_PROCESSES = ("train", "check", "eval")


def _refuse(error: InputError) -> int:
    print(error, file=sys.stderr)
    return 2


def _help() -> str:
    modes = {name: str(mode.__doc__) for name, mode in _MODES.items()}
    more = {
        "--config.KEY=VALUE": "Sets one setting of the config file, such as"
        " --config.training.steps=50; docs/training.md says more."
    }
    return flag_help.help_text(str(__doc__), modes, more=more)


def _parse(argv: Sequence[str]) -> list[str]:
    if flag_help.is_asked(argv):
        print(_help(), end="")
        sys.exit(0)
    try:
        return command_line.parse(argv)
    except InputError as error:
        sys.exit(_refuse(error))


def main(argv: Sequence[str]) -> int:
    """Runs the chosen mode; returns the exit status."""
    del argv
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # libraries tell all they do at INFO
    paths.print_any_name()
    mode, coordinator = _MODE.value, flags.FLAGS.coordinator
    try:
        require(mode in _MODES, "--mode", mode, f"one of {', '.join(_MODES)}")
        several = mode in _SEVERAL_PROCESSES
        if coordinator not in (None, "none") and not several:
            raise InputError(
                f"--coordinator is {coordinator!r}, but --mode={mode} is one process; leave it out."
            )
        if _PRINT_CONFIG.value:
            print(_experiment().as_text(), end="")
            return 0
        distributed.initialize(automatic=several)
        if mode in _COMPILE_ON_THIS_MACHINE and (trouble := compile_cache.set_up()):
            print(trouble, file=sys.stderr)
        with distributed.not_left_waiting(InputError):
            return _MODES[mode]() or 0
    except InputError as error:
        return _refuse(error)
    except KeyboardInterrupt:  # before training began, or a second one
        print("Interrupted.", file=sys.stderr)
        return 130


def _interrupt_again(ignored: "sys.UnraisableHookArgs") -> None:
    """Repeats a Ctrl-C that came while a callback ran, where Python ignores exceptions."""
    if isinstance(ignored.exc_value, KeyboardInterrupt):
        threading.Timer(0.1, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(ignored)


def run() -> NoReturn:
    """Runs the program on `sys.argv` and ends the process with its exit status."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # `train.py`, until here
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.unraisablehook = _interrupt_again
    app.run(main, flags_parser=_parse)
    raise AssertionError  # absl has ended the process
