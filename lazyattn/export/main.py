"""`--mode=export`: a run's checkpoint, or safetensors, as a folder for others."""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lazyattn import buckets
from lazyattn.checkpoint.load import load_trained
from lazyattn.checkpoint.manager import FOLDER, Checkpoints
from lazyattn.checkpoint.workdir import check_tokenizer
from lazyattn.data.config import DataConfig
from lazyattn.data.copies import here
from lazyattn.errors import InputError, bad_value
from lazyattn.experiment import ExperimentConfig, from_config_dict
from lazyattn.export import card, hub
from lazyattn.export.flags import ExportOptions
from lazyattn.paths import folder as folder_of
from lazyattn.paths import umask
from lazyattn.pretrained import names, parameters, settings, tensor_files
from lazyattn.pretrained.load import PARAMS, ExportedModel, load_safetensors
from lazyattn.pretrained.settings import Facts
from lazyattn.sharding import MeshConfig, make_mesh

_FOLDER = "export"


def export(
    path: str | os.PathLike[str] | None,
    experiment: ExperimentConfig | None = None,
    options: ExportOptions | None = None,
    step: int | str | None = None,
) -> Path:
    """Writes a folder with a model's parameters, settings, tokenizer and card.

    Args:
      path: the run's folder; None with `import_from`.
      experiment: settings of that run to use, its mesh too; None: the checkpoint's own.
      options: what to write.
      step: which checkpoint, as `load_trained` has it.

    Returns:
      The folder. It is there when all of it is.

    Raises:
      InputError: if there is no checkpoint or nothing to import, the folder exists, or
        what was asked for does not go together.
    """
    options = ExportOptions() if options is None else options
    output = (
        folder_of("--output", options.output)
        if options.output
        else folder_of("--workdir", path or "") / _FOLDER
    )
    if step is not None and options.import_from is not None:
        raise InputError(
            f"--step is {step!r}, but --import_from has no checkpoints to choose from; leave one"
            " out."
        )
    _check_output(output)
    if set(options.formats) & {"safetensors", "hub"} or options.import_from is not None:
        tensor_files.require_library()
    model = (
        _imported(options)
        if options.import_from is not None
        else _trained(path or "", experiment, options, step)
    )
    params, config = model.params, model.config
    if options.bias_length is not None:
        params, config = parameters.without_tail(params, config, options.bias_length)
    if "hub" in options.formats:
        params, config = parameters.as_softmax(params, config)
    facts = dataclasses.replace(model.facts, model=config)
    model = dataclasses.replace(model, params=params, config=config, facts=facts)
    with _appearing(output) as folder:
        _write(folder, model, options, output.name)
    size = buckets.size(output)
    what = " and ".join(options.formats)
    print(f"Written to {output}: {what}, {options.dtype}, {size / 1e6:,.1f} MB.")
    if "hub" in options.formats:
        print(f"In transformers: {hub.loading(config)}.")
    if "safetensors" in options.formats:
        for difference in settings.differences(model.facts):
            print(f"In the authors' layers it would not be the same function: {difference}")
    if model.tokenizer is None:
        print("There is no tokenizer with it: none was beside the safetensors.")
    return output


def _check_output(output: Path) -> None:
    if buckets.is_bucket(output):
        buckets.check_writable("--output", output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise bad_value("--output", str(output), "a folder that does not exist yet, or is empty")


def _trained(
    path: str | os.PathLike[str],
    experiment: ExperimentConfig | None,
    options: ExportOptions,
    step: int | str | None,
) -> ExportedModel:
    """Returns the model of a run's checkpoint, on the devices it is exported from."""
    check_tokenizer(path)
    if experiment is None and options.layout == "sharded":
        experiment = _over_all_devices(path)
    trained = load_trained(path, experiment, step)
    if trained.exported:
        raise InputError(
            f"--workdir is {str(path)!r}, which is an export, but it must be the folder of a run;"
            " --import_from takes exports."
        )
    experiment, workdir = trained.experiment, folder_of("--workdir", path)
    data = experiment.data
    loss, over = _validation(workdir / "metrics.jsonl", trained.step)
    facts = Facts(
        model=experiment.model,
        sequence_length=data.sequence_length,
        step=trained.step,
        tokens=trained.step * data.batch_size * data.sequence_length,
        data=_text(data),
        validation_loss=loss,
        validation_tokens=over,
    )
    return ExportedModel(experiment.model, trained.params, trained.tokenizer, facts, trained.mesh)


def _text(data: DataConfig) -> str:
    """Returns what the text was, without the folders on this machine."""
    folders = [folder for folder, _ in data.weighted_paths] or [data.source]
    return ", ".join(Path(folder).name for folder in folders)


def _over_all_devices(path: str | os.PathLike[str]) -> ExperimentConfig | None:
    """Returns a run's settings with parameters shared out over all devices; None: no checkpoint."""
    workdir = folder_of("--workdir", path)
    if not (workdir / FOLDER).is_dir():
        return None
    with Checkpoints(workdir, read_only=True) as checkpoints:
        found = checkpoints.newest_experiment()
    if found is None:
        return None
    return dataclasses.replace(from_config_dict(found[1]), mesh=MeshConfig(data=1, fsdp=-1))


def _imported(options: ExportOptions) -> ExportedModel:
    source = str(options.import_from)
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1)) if options.layout == "sharded" else None
    folder = here("--import_from", source)
    if not folder.is_dir():
        raise bad_value("--import_from", source, "a folder with config.json and safetensors")
    return load_safetensors(folder, mesh)


def _validation(log: Path, step: int) -> tuple[float | None, int | None]:
    """Returns the last validation loss logged up to a step, and over how many tokens it is."""
    found: tuple[float | None, int | None] = None, None
    with contextlib.suppress(OSError, ValueError):
        for line in (buckets.read_log(log) or b"").splitlines():
            record = json.loads(line)
            if record["step"] <= step and "validation_loss" in record:
                # Logs of earlier versions don't say over how many.
                found = record["validation_loss"], record.get("validation_tokens")
    return found


@contextlib.contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """Yields a folder beside `output` that takes its place when all is written.

    For a bucket it is on this machine and copied at the end, with the settings last.
    """
    if buckets.is_bucket(output):
        with buckets.staged(output, last=settings.FILE) as staged:
            yield staged
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise bad_value(
            "--output", str(output), f"a folder that can be made ({error.strerror})"
        ) from None
    try:
        yield temporary
        temporary.chmod(0o777 & ~umask())
        os.replace(temporary, output)
    except OSError as error:
        raise InputError(f"--output {str(output)!r} can't be written ({error}).") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(folder: Path, model: ExportedModel, options: ExportOptions, name: str) -> None:
    dtype = options.dtype
    if "orbax" in options.formats:
        parameters.save(folder / PARAMS, parameters.cast(model.params, dtype), options.layout)
    if "safetensors" in options.formats:
        names.write(folder, model.params, model.config, dtype)
    if "hub" in options.formats:
        hub.write(folder, model, dtype)
    else:
        content = settings.as_settings(model.facts, dtype)
        (folder / settings.FILE).write_text(json.dumps(content, indent=2) + "\n")
        if model.tokenizer is not None:
            model.tokenizer.save_in(folder)
    text = card.model_card(
        name,
        model.facts,
        dtype=dtype,
        layout=options.layout,
        formats=options.formats,
        tokenizer=model.tokenizer is not None,
    )
    (folder / card.FILE).write_text(text)
