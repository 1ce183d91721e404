"""`load_trained`: a folder of an export is read by the modes as a run is."""

import re
import shutil

import jax
import numpy as np
import pytest

from lazyattn.checkpoint.load import load_trained
from lazyattn.errors import InputError
from lazyattn.eval.flags import EvaluationOptions
from lazyattn.eval.main import evaluate
from lazyattn.experiment import from_config_dict
from lazyattn.export.flags import ExportOptions
from lazyattn.export.main import export
from lazyattn.generation.sampling import SamplingConfig
from lazyattn.inspect.flags import InspectionOptions
from lazyattn.inspect.main import inspect
from lazyattn.sample.main import sample
from tests.eval.runs import make_run
from tests.training import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def exports(run):
    """An export as Orbax, and one as safetensors alone, as an import of theirs."""
    pytest.importorskip("safetensors")
    paths = {}
    for form in ("orbax", "safetensors"):
        options = ExportOptions(formats=(form,), output=str(run.parent / form))
        paths[form] = export(run, options=options)
    return paths


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.TEXT * 20)
    return str(path)


def test_an_export_is_the_model_of_its_run(run, exports):
    expected, found = load_trained(run), load_trained(exports["orbax"])
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert found.experiment.model == expected.experiment.model
    assert found.experiment.data.sequence_length == expected.experiment.data.sequence_length
    assert (found.step, found.name, found.exported) == (1, "orbax", True)
    assert (expected.name, expected.exported) == (run.name, False)
    assert found.tokenizer.fingerprint == expected.tokenizer.fingerprint


@pytest.mark.parametrize("form", [pytest.param("orbax", marks=pytest.mark.slow), "safetensors"])
def test_evaluated_as_its_run(run, exports, text, tmp_path, capsys, form):
    options = {"texts": (text,), "contexts": (8, 16)}
    for path, name in ((run, "run"), (exports[form], "export")):
        assert (
            evaluate(path, options=EvaluationOptions(**options, output=str(tmp_path / name))) == 0
        )
    ours, theirs = ((tmp_path / name / "contexts.md").read_text() for name in ("run", "export"))
    assert ours == theirs and "| text | 16 |" in ours
    assert f"checkpoint       {exports[form]}" in capsys.readouterr().out


@pytest.mark.slow
def test_sampled_as_its_run(run, exports, capsys):
    said = []
    for path in (run, exports["orbax"]):
        sample(path, "the", SamplingConfig(max_new_tokens=4))
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].startswith("the")


@pytest.mark.slow
def test_inspected_beside_its_run(run, exports, text, tmp_path, monkeypatch):
    monkeypatch.setattr("lazyattn.inspect.main.LENGTH", 8)
    options = InspectionOptions(
        text=text, against=str(run), rows=1, length=12, output=str(tmp_path / "report")
    )
    folder = inspect(exports["orbax"], options=options)
    assert "orbax" in (folder / "report.html").read_text()


def test_what_an_export_does_not_have(run, exports, tmp_path):
    path = exports["orbax"]
    for options in (EvaluationOptions(), EvaluationOptions(contexts=(8,))):
        with pytest.raises(InputError, match="--text is not given, but it must name a text, since"):
            evaluate(path, options=options)
    with pytest.raises(InputError, match="--text is not given"):
        inspect(path)
    with pytest.raises(InputError, match=r"--step is given, but .* is an export"):
        load_trained(path, step="best")
    with pytest.raises(InputError, match=r"--config is given, but .* is an export"):
        load_trained(path, from_config_dict({}))
    with pytest.raises(InputError, match=re.escape("--import_from takes exports")):
        export(path, options=ExportOptions(output=str(tmp_path / "again")))
    copy = shutil.copytree(path, tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer; put its tokenizer.json there"):
        load_trained(copy)
