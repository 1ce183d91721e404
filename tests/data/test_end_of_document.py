"""A tokenizer whose end of a document has a name of its own, wherever the tokenizer goes."""

import json
import os
import re
import shutil

import pytest
import tokenizers

from lazyattn.checkpoint.workdir import find_tokenizer, keep_tokenizer
from lazyattn.data import manifest
from lazyattn.data.config import DataConfig
from lazyattn.data.pipeline import prepare
from lazyattn.data.prepare.run import Preparation, prepare_shards
from lazyattn.data.prepare.selection import Selection
from lazyattn.data.prepare.source import prepare_source
from lazyattn.data.tokenizer import CONFIG_NAME, Tokenizer
from lazyattn.errors import InputError
from tests.data.prepare.corpora import make_documents, write_jsonl

OWN = "<|im_end|>"


def _save(folder, special, config=None):
    """Writes a byte-level tokenizer; ids of special tokens are 256 and on."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({token: i for i, token in enumerate(alphabet)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(["plain"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / CONFIG_NAME).write_text(json.dumps(config))
    return folder / "tokenizer.json"


def test_a_name_that_is_given(tmp_path):
    path = _save(tmp_path, ["<|im_start|>", OWN])
    with pytest.raises(InputError, match=r"has no token <\|eos\|> .* `--eos_token` of preparing"):
        Tokenizer.load(path)
    tokenizer = Tokenizer.load(path, OWN)
    assert (tokenizer.eos_id, tokenizer.eos_token) == (257, OWN)
    assert tokenizer.bos_id == tokenizer.pad_id == 257
    assert 257 not in tokenizer.encode(OWN) and tokenizer.decode([65, 257]) == "b"


@pytest.mark.parametrize("token", [OWN, {"content": OWN, "special": True, "__type": "AddedToken"}])
def test_a_name_in_the_folder_of_the_tokenizer(tmp_path, token):
    path = _save(tmp_path, ["</s>", OWN], {"eos_token": token, "model_max_length": 1e30})
    for given in (path, tmp_path, str(tmp_path)):
        assert Tokenizer.load(given).eos_id == 257
    assert Tokenizer.load(path, "</s>").eos_id == 256


@pytest.mark.parametrize("config", [None, {}, {"eos_token": None}, {"eos_token": "</s>"}, []])
def test_a_known_name_needs_no_file(tmp_path, config):
    tokenizer = Tokenizer.load(_save(tmp_path / "in", [OWN, "</s>"], config))
    assert (tokenizer.eos_id, tokenizer.eos_token) == (257, None)
    (tmp_path / "out").mkdir()
    tokenizer.save_in(tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["tokenizer.json"]


def test_a_name_of_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some text to learn"] * 20),
            model_writer=file,
            vocab_size=300,
            hard_vocab_limit=False,
            byte_fallback=True,
            control_symbols=["<eod>"],
            minloglevel=2,
        )
    tokenizer = Tokenizer.load(tmp_path, "<eod>")
    (tmp_path / "out").mkdir()
    saved = tokenizer.save_in(tmp_path / "out")
    assert saved.name == "tokenizer.model"
    assert Tokenizer.load(saved).eos_id == tokenizer.eos_id != Tokenizer.load(tmp_path).eos_id


@pytest.mark.parametrize(
    ("special", "name", "told"),
    [
        (["<|im_start|>", OWN], "<im_end>", "; the closest are '<|im_end|>', '<|im_start|>'."),
        (["</s>", OWN], "zzz", "; it has '</s>', '<|im_end|>'."),
        (["</s>"], "plain", "; it has '</s>'."),  # a text may hold it
        ([f"<{i}>" for i in range(10)], "zzz", "'<7>' and 2 more."),
        ([], "zzz", "; it has none."),
    ],
)
def test_a_name_that_is_missing(tmp_path, special, name, told):
    start = f"--eos_token is '{name}', but the tokenizer has no such special token"
    with pytest.raises(InputError, match=rf"^{re.escape(start)}.*{re.escape(told)}$"):
        Tokenizer.load(_save(tmp_path, special), name)


def test_a_file_that_is_wrong(tmp_path):
    path = _save(tmp_path, ["</s>"], {"eos_token": "<gone>"})
    with pytest.raises(InputError, match=rf"^eos_token in '.*{CONFIG_NAME}' is '<gone>', but the "):
        Tokenizer.load(path)
    (tmp_path / CONFIG_NAME).write_text("{")
    with pytest.raises(InputError, match=rf"{CONFIG_NAME}', which may name .*, is no JSON; restor"):
        Tokenizer.load(path)


@pytest.fixture(scope="module")
def preparation(tmp_path_factory):
    root = tmp_path_factory.mktemp("named")
    write_jsonl(root / "in.jsonl", make_documents(40))
    return Preparation(
        inputs=(str(root / "in.jsonl"),),
        output=str(root / "shards"),
        tokenizer=str(_save(root / "given", ["</s>", OWN])),
        eos_token=OWN,
        selection=Selection(validation_fraction=0.2),
        num_workers=1,
    )


@pytest.fixture(scope="module")
def shards(preparation):
    return prepare_shards(preparation).folder


def _config(folder, **changes):
    settings = {"path": str(folder), "sequence_length": 32, "batch_size": 2, "prefetch": 0}
    return DataConfig(**(settings | changes))


def test_it_goes_with_the_shards_and_the_run(preparation, shards, tmp_path):
    content = manifest.read(shards)
    assert content.tokenizer.end_of_document == 257
    assert content.settings["tokenizer"]["eos_token"] == OWN
    assert json.loads((shards / CONFIG_NAME).read_text()) == {"eos_token": OWN}
    data = prepare(_config(shards))
    assert data.tokenizer.eos_id == data.ids[1] == 257
    keep_tokenizer(tmp_path, data.tokenizer)
    assert sorted(os.listdir(tmp_path)) == ["tokenizer.json", CONFIG_NAME]
    assert Tokenizer.load(find_tokenizer(tmp_path)).eos_id == 257
    keep_tokenizer(tmp_path, data.tokenizer)
    with pytest.raises(InputError, match=r"ends documents with token 257 and this data with 256;"):
        keep_tokenizer(tmp_path, Tokenizer.load(preparation.tokenizer))


def test_the_same_command_does_it_once_and_another_name_is_refused(preparation, shards):
    assert prepare_shards(preparation).finished_before
    other = Preparation(**{**preparation.__dict__, "eos_token": None})
    with pytest.raises(InputError, match=r"with tokenizer = \{.*'eos_token': '<\|im_end\|>'\}"):
        prepare_shards(other)


def test_folders_that_end_documents_otherwise_are_not_mixed(preparation, shards, tmp_path):
    other = {**preparation.__dict__, "eos_token": None, "output": str(tmp_path / "other")}
    prepare_shards(Preparation(**other))
    sources = ((str(shards), 1.0), (str(tmp_path / "other"), 1.0))
    with pytest.raises(InputError, match=r"end documents with different tokens \(257 and 256\)"):
        prepare(_config(None, path=None, sources=sources))


def test_a_folder_whose_file_is_lost_is_refused(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "copy")
    (tmp_path / "copy" / CONFIG_NAME).unlink()
    with pytest.raises(InputError, match=r"with token 257 as the end .* its tokenizer says 256; r"):
        prepare(_config(tmp_path / "copy"))


def test_text_that_a_run_reads(tmp_path):
    for name in "ab":
        _save(tmp_path / name, ["</s>", OWN], {"eos_token": OWN} if name == "b" else None)
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text(f"Document {number}, and some words.")
    folders = []
    for name in "ab":
        config = _config(
            None,
            path=None,
            source=str(tmp_path / "text"),
            tokenizer=str(tmp_path / name / "tokenizer.json"),
            validation_fraction=0.2,
        )
        folders.append(prepare_source(config, tmp_path / "cache"))
        assert Tokenizer.load(folders[-1]).eos_id == (257 if name == "b" else 256)
    assert folders[0] != folders[1]


def test_a_tokenizer_that_is_learned_has_its_own(preparation):
    refused = r"^--eos_token is '<\|im_end\|>', but --tokenizer=train learns one that ends docum"
    with pytest.raises(InputError, match=refused):
        Preparation(**{**preparation.__dict__, "tokenizer": "train"})
