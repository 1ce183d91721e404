"""Samples while a run trains: written down, cut back, without a trace in the training."""

import json
from types import SimpleNamespace

import pytest

from lazyattn.errors import InputError
from lazyattn.experiment import from_config_dict
from lazyattn.sample.samples import Samples
from lazyattn.sharding import make_mesh
from lazyattn.training.hooks import Started
from tests.training import tiny


def _experiment(text="", **changes):
    config = tiny.get_config(text)
    config.training.sample_tokens = 5
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return from_config_dict(config)


def _lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.slow
def test_a_run_says_something_and_learns_the_same(tmp_path, capsys):
    text, cache = tiny.write_text(tmp_path / "text"), tmp_path / "cache"
    often = {"training__sample_every": 2, "training__sample_prompt": "attention may"}

    def train(name, steps, **changes):
        settings = _experiment(text, training__steps=steps, **changes)
        assert tiny.train(settings, tmp_path / name, cache, summary=False) == 0

    train("a", 4, **often)
    said = capsys.readouterr().out
    assert "step 2/4  sample" in said and "    attention may" in said
    first = _lines(tmp_path / "a", "samples.jsonl")
    assert [line["step"] for line in first] == [2, 4]
    assert first[0]["prompt"] == "attention may" and first[0]["text"]
    # A run that was killed after step 6 resumes after step 4 and says it again.
    with open(tmp_path / "a" / "samples.jsonl", "a") as file:
        file.write('{"step": 6, "prompt": "", "text": "of the run that was killed"}\n{"st')
    train("a", 6, **often)
    again = _lines(tmp_path / "a", "samples.jsonl")
    assert [line["step"] for line in again] == [2, 4, 6] and again[:2] == first
    assert "killed" not in again[2]["text"]
    train("b", 4)
    silent = [line["loss"] for line in _lines(tmp_path / "b", "metrics.jsonl")]
    assert [line["loss"] for line in _lines(tmp_path / "a", "metrics.jsonl")][:4] == silent
    assert not (tmp_path / "b" / "samples.jsonl").exists()


class Letters:
    def encode(self, text):
        return [ord(letter) for letter in text]


@pytest.mark.parametrize(
    "changes",
    [
        {"model__attention__bias_kind": "table", "model__attention__bias_tail": False},
        {"model__attention__variant": "lazy_length_offset"},
    ],
)
def test_a_context_that_the_model_does_not_know_is_refused(changes, tmp_path):
    def opened(tokens):
        experiment = _experiment(
            training__sample_every=1, training__sample_tokens=tokens, **changes
        )
        mesh = make_mesh(experiment.mesh)
        data = SimpleNamespace(tokenizer=Letters())
        return Samples(Started(tmp_path, tmp_path, experiment, mesh, None, data, 0, print))

    opened(11)
    with pytest.raises(InputError) as caught:
        opened(12)  # with 4 letters and the beginning of a document
    assert str(caught.value) == (
        "training.sample_prompt and training.sample_tokens together are 17 tokens, but they must"
        " be at most 16, since this model knows no longer context."
    )
