"""URLs where a path is asked for: what can't use one refuses it at once."""

import dataclasses
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from absl.testing import flagsaver

from lazyattn import command_line, flag_help, paths
from lazyattn.checkpoint.load import load_trained
from lazyattn.checkpoint.workdir import open_workdir
from lazyattn.compile import libtpu
from lazyattn.data.cache import default_cache_dir, entry
from lazyattn.data.prepare import __main__ as preparation
from lazyattn.data.prepare.run import Preparation
from lazyattn.errors import InputError
from lazyattn.eval.flags import EvaluationOptions
from lazyattn.eval.main import evaluate
from lazyattn.experiment import ExperimentConfig, from_config_dict
from lazyattn.export.flags import ExportOptions
from lazyattn.export.main import export

URL = "gs://bucket/run"
FAR = "az://bucket/run"
NO_BUCKET = "it must be a path on this machine, gs://BUCKET/PATH or s3://BUCKET/PATH; of another"
REFUSED = r"it must be a path on this machine, not a URL; mount the bucket and give the path\.$"

# Flags of paths that must be on this machine.
ON_THIS_MACHINE = {"cache_dir"}

# Flags of text that are no paths; a new one belongs here or is defined by `lazyattn.paths`.
NO_PATHS = {
    *("mode", "step", "profile", "coordinator", "precision", "topology", "dtype", "layout"),
    *("formats", "heads", "cache", "cache_dtype", "cache_buckets"),
    *("tasks", "contexts", "retrieval_distances", "prompt", "stop", "config"),
    *("text_field", "id_field", "score_field", "on_fault", "chat_template", "eos_token"),
    *("hub_config", "hub_split", "hub_validation_split"),
}


@pytest.mark.parametrize(
    "url", [URL, "s3://b", "hf://datasets/x", "file:///tmp/x", "https://a/b", Path(URL)]
)
def test_every_scheme_is_refused(url):
    with pytest.raises(InputError, match=rf"^--workdir is '.*', but {REFUSED}"):
        paths.local_path("--workdir", url)


@pytest.mark.parametrize("path", ["runs/a", "/a/b", "a:b", "~/x", "C:/x", "", ".", "a/gs://b"])
def test_paths_are_left_alone(path):
    assert paths.local_path("--workdir", path) == Path(path).expanduser()


def _text_flags(values):
    kinds = ("string", "multi string", "comma separated list of strings")
    for flag in flag_help.own_flags(values):
        if flag.flag_type() in kinds and flag.name not in NO_PATHS:
            yield flag.name


def test_every_flag_that_takes_a_path_refuses_a_url():
    from lazyattn import main as train

    del train  # it defines its flags
    found = set()
    for values in (command_line.flags.FLAGS, preparation.FLAGS):
        for name in _text_flags(values):
            found.add(name)
            url, why = (URL, REFUSED) if name in ON_THIS_MACHINE else (FAR, NO_BUCKET)
            refused = pytest.raises(InputError, match=rf"^--{name} is '{url}', but {why}")
            with flagsaver.flagsaver(), refused:
                command_line.parse(["program", f"--{name}={url}"], values)
    assert found >= {
        *("workdir", "cache_dir", "tasks_dir", "text", "lambada", "output", "import_from"),
        *("against", "input", "validation_input", "tokenizer"),
    }


def test_a_url_among_several():
    for name, argument in (("input", f"a,{FAR}"), ("input", FAR)):
        with pytest.raises(InputError, match=NO_BUCKET):
            command_line.parse(["program", f"--{name}={argument}"], preparation.FLAGS)


def _text_settings(cls, where=""):
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _text_settings(hint, f"{where}{name}.")
        elif hint is str or str in typing.get_args(hint):
            yield f"{where}{name}"


def _experiment(key, value):
    *groups, name = key.split(".")
    settings = {name: value}
    for group in reversed(groups):
        settings = {group: settings}
    return from_config_dict(settings)


def test_every_setting_that_takes_a_path_refuses_a_url():
    paths_found = set()
    for key in _text_settings(ExperimentConfig):
        # Whatever backends are registered; any text; names that only the harness knows.
        free = ("model.attention.implementation", "training.sample_prompt", "training.tasks")
        if key in free:
            continue
        with pytest.raises(InputError, match=rf"^{key} is '{FAR}', but it must be") as refused:
            _experiment(key, FAR)
        if re.search(NO_BUCKET, str(refused.value)):
            paths_found.add(key)
    assert paths_found >= {"data.path", "data.source", "data.tokenizer"}
    assert paths_found >= {"training.init_from", "training.tasks_dir"}
    with pytest.raises(InputError, match=rf"^a folder of data.sources is '{FAR}', but {NO_BUCKET}"):
        _experiment("data.sources", (("a", 1.0), (FAR, 0.5)))


def test_a_config_file_at_a_url():
    with pytest.raises(InputError, match=rf"^--config is '{URL}', but {REFUSED}"):
        command_line.parse(["program", f"--config={URL}"])


@pytest.mark.parametrize("name", ["LAZYATTN_CACHE", "XDG_CACHE_HOME"])
def test_the_cache_of_the_environment(monkeypatch, name):
    monkeypatch.delenv("LAZYATTN_CACHE", raising=False)
    monkeypatch.setenv(name, URL)
    with pytest.raises(InputError, match=rf"^{name} is '{URL}', but {REFUSED}"):
        default_cache_dir()


def test_the_compiler_of_the_environment(monkeypatch):
    monkeypatch.setenv("TPU_LIBRARY_PATH", URL)
    with pytest.raises(InputError, match=rf"^TPU_LIBRARY_PATH is '{URL}', but {REFUSED}"):
        libtpu.library()


@pytest.mark.parametrize(
    "use",
    [
        lambda: open_workdir(FAR),
        lambda: load_trained(FAR),
        lambda: entry(URL, "name", lambda work: {}),
        lambda: export("run", options=ExportOptions(output=FAR)),
        lambda: export(None, options=ExportOptions(output="out", import_from=FAR)),
        lambda: export(FAR),
        lambda: evaluate(FAR),
        lambda: evaluate("run", options=EvaluationOptions(texts=(FAR,))),
        lambda: Preparation((FAR,), "out", "train"),
        lambda: Preparation(("in",), FAR, "train"),
        lambda: Preparation(("in",), "out", FAR),
    ],
)
def test_as_functions_too(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"gs:|az:"):
        use()
    assert os.listdir(tmp_path) == []


def test_a_run_is_refused_before_it_begins(tmp_path):
    """As a user types it: one line, status 2, and no folder called `gs:`."""
    root = Path(__file__).parents[1]
    environment = os.environ | {"LAZYATTN_CACHE": URL, "PYTHONPATH": str(root)}
    for flag in (f"--workdir={FAR}", f"--workdir={tmp_path / 'run'}"):
        done = subprocess.run(
            [sys.executable, root / "train.py", "--config=configs/quickstart.py", flag],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        name, url = ("--workdir", FAR) if FAR in flag else ("LAZYATTN_CACHE", URL)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"{name} is '{url}', but it must be a path")
        assert done.stderr.count("\n") == 1
        assert os.listdir(tmp_path) == []


def test_results_need_a_folder_that_can_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    assert paths.results(None, tmp_path, "eval") == tmp_path / "eval"
    assert paths.results(str(tmp_path / "file"), tmp_path, "eval", writes=False)
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"--output is .* a folder that can be written to"):
            paths.results(str(bad), tmp_path, "eval")
