import os

import pytest

from lazyattn.checkpoint import workdir
from lazyattn.checkpoint.workdir import find_tokenizer, keep_tokenizer
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError
from lazyattn.experiment import ExperimentConfig


def _trained(path):
    return Tokenizer.train(["some words of a text"], 262)


def _sentencepiece(path):
    sentencepiece = pytest.importorskip("sentencepiece")
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some words of a text"] * 9),
            model_writer=file,
            vocab_size=300,
            hard_vocab_limit=False,
            byte_fallback=True,
            minloglevel=2,
        )
    return Tokenizer.load(path)


@pytest.mark.parametrize(
    ("make", "name"), [(_trained, "tokenizer.json"), (_sentencepiece, "tokenizer.model")]
)
def test_tokenizers_of_both_kinds_are_kept(tmp_path, make, name):
    tokenizer = make(tmp_path / "made")
    workdir = tmp_path / "run"
    workdir.mkdir()
    assert find_tokenizer(workdir) is None
    for _ in range(2):
        keep_tokenizer(workdir, tokenizer)
        assert os.listdir(workdir) == [name]
        assert Tokenizer.load(find_tokenizer(workdir)).fingerprint == tokenizer.fingerprint
    with pytest.raises(InputError, match=rf"{name} is not the tokenizer of this data"):
        keep_tokenizer(workdir, Tokenizer.train(["other"], 261))


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"config.json": '{"vocab_size": 9}', "params/a": ""}, "a model is there"),
        ({"config.json": "{}", "model.safetensors": ""}, "a model is there"),
        ({"config.json": '{"mine": 1}'}, "config.json of something else"),
        ({"config.json": "[1]"}, "config.json of something else"),
        ({"metrics.jsonl": "notes"}, "metrics.jsonl of something else"),
    ],
)
def test_what_a_run_would_overwrite_is_refused(tmp_path, files, what):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"--workdir is .* a new folder or a run's, and .*{what}"):
        workdir.open_workdir(tmp_path)
    assert {name: (tmp_path / name).read_text() for name in files} == files
    (tmp_path / "checkpoints").mkdir()
    assert workdir.open_workdir(tmp_path) == tmp_path


def test_a_run_that_was_killed_early_goes_on(tmp_path):
    workdir.write_experiment(tmp_path, ExperimentConfig())
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert workdir.open_workdir(tmp_path) == tmp_path
