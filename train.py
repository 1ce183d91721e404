"""The only entry point: trains, evaluates, looks inside, samples, compiles for chips elsewhere.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart
    python train.py --config=configs/quickstart.py --workdir=DIR --config.training.steps=50
    python train.py --mode=eval --workdir=runs/quickstart --contexts=256,512,1024
    python train.py --mode=inspect --workdir=runs/quickstart --against=runs/softmax
    python train.py --mode=sample --workdir=runs/quickstart --prompt="The "
    python train.py --mode=compile --config=configs/lazy_7b_100b.py --topology=v5p:4x4x4

Training goes on from the newest checkpoint in --workdir. eval, inspect and
sample read the settings from the checkpoint, so they need no --config.

Exit status: 0 when done or stopped by SIGTERM, 1 when training had to stop or what
--mode=compile looked at does not fit, 2 when something given is wrong, 130 when stopped by Ctrl-C.
"""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from lazyattn import command_line, distributed
from lazyattn.ahead_of_time import options as ahead_of_time_options
from lazyattn.errors import InputError
from lazyattn.evaluation import options as evaluation_options
from lazyattn.experiment import ExperimentConfig, from_config_dict
from lazyattn.generation import options as generation_options
from lazyattn.inspection import options as inspection_options

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, such as configs/quickstart.py; FILE:NAME for a kind of attention."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, logs, settings.")
_MODE = flags.DEFINE_string("mode", "train", "What to do: train, eval, inspect, sample or compile.")
_CACHE_DIR = flags.DEFINE_string(
    "cache_dir", None, "Folder for prepared data; default: LAZYATTN_CACHE or the user's cache."
)
distributed.define()
evaluation_options.define()
inspection_options.define()
generation_options.define()
ahead_of_time_options.define()


def _workdir() -> str:
    if not _WORKDIR.value:
        raise InputError("--workdir is not given, but it must be the folder of the run.")
    return _WORKDIR.value


def _experiment() -> ExperimentConfig | None:
    return None if _CONFIG.value is None else from_config_dict(_CONFIG.value)


# Each mode imports what it needs, so that mistakes in the flags come out at once.
def _train() -> int:
    experiment = _experiment()
    if experiment is None:
        raise InputError("--config is not given, but --mode=train needs a config file.")
    path = _workdir()
    from lazyattn.training.checkpoint import SaveError
    from lazyattn.training.loop import NonFiniteError
    from lazyattn.training.run import train

    try:
        return train(experiment, path, _CACHE_DIR.value)
    except (NonFiniteError, SaveError) as error:
        print(error, file=sys.stderr)
        return 1


def _eval() -> int:
    options = evaluation_options.options()
    experiment, path = _experiment(), _workdir()
    from lazyattn.evaluation.checkpoint import evaluate

    evaluate(path, experiment, _CACHE_DIR.value, options)
    return 0


def _inspect() -> int:
    options = inspection_options.options()
    experiment, path = _experiment(), _workdir()
    from lazyattn.inspection.checkpoint import inspect

    inspect(path, experiment, options)
    return 0


def _sample() -> int:
    sampling = generation_options.sampling_config()
    experiment, path = _experiment(), _workdir()
    from lazyattn.generation.checkpoint import sample

    given = flags.FLAGS
    sample(
        path,
        given.prompt,
        sampling,
        seed=given.seed,
        stop=given.stop,
        beyond_table=given.beyond_table,
        experiment=experiment,
    )
    return 0


def _compile() -> int:
    experiment, topology = _experiment(), ahead_of_time_options.topology()
    if experiment is None:
        raise InputError("--config is not given, but --mode=compile needs a config file.")
    from lazyattn.ahead_of_time.run import compile_report

    return compile_report(experiment, topology)


# The others would have nothing to do, or would print and write the same.
_SEVERAL_PROCESSES = ("train", "eval")

_MODES: dict[str, Callable[[], int]] = {
    "train": _train,
    "eval": _eval,
    "inspect": _inspect,
    "sample": _sample,
    "compile": _compile,
}


def _refuse(error: InputError) -> int:
    print(error, file=sys.stderr)
    return 2


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return command_line.parse(argv)
    except InputError as error:
        sys.exit(_refuse(error))


def main(argv: Sequence[str]) -> int:
    """Runs the chosen mode; returns the exit status."""
    del argv
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # libraries tell all they do at INFO
    try:
        if _MODE.value not in _MODES:
            raise InputError(
                f"--mode is {_MODE.value!r}, but it must be one of {', '.join(_MODES)}."
            )
        if flags.FLAGS.coordinator is not None and _MODE.value not in _SEVERAL_PROCESSES:
            raise InputError(
                f"--coordinator is {flags.FLAGS.coordinator!r}, but --mode={_MODE.value} is one"
                " process; leave it out."
            )
        distributed.initialize()
        return _MODES[_MODE.value]()
    except InputError as error:
        return _refuse(error)
    except KeyboardInterrupt:  # before training began, or a second one
        print("Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
