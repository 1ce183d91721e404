"""What the transformers library computes from our exports is what we compute.

Needs torch and transformers, in this Python or in the one that LAZYATTN_PEER_PYTHON names.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from lazyattn.data.tokenizer import Tokenizer
from lazyattn.export import hub
from lazyattn.generation.decode import generate
from lazyattn.generation.sampling import SamplingConfig
from lazyattn.generation.text import generate_text
from lazyattn.model.config import RECIPES, VARIANTS
from lazyattn.pretrained.load import ExportedModel, load_model
from lazyattn.pretrained.settings import Facts
from tests.model.tiny import make_config, make_params
from tests.pretrained.torch_peer import ask

pytestmark = pytest.mark.slow

LENGTH, NEW = 32, 8
GREEDY = SamplingConfig(max_new_tokens=NEW, temperature=0.0)
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_length": 16, "rope_base": 50.0}
WINDOW = {"window": 5, "global_share": 0.5}
NO_TAIL = {"bias_kind": "table", "bias_tail": False}


def _attention(variant="lazy", **attention):
    return make_config(variant, attention=attention)


MODELS = {
    **{f"recipe {name}": _attention(**recipe) for name, recipe in RECIPES.items()},
    **{name: _attention(name) for name in VARIANTS if name not in ("lazy", "softmax")},
    "softmax with a gate": _attention("softmax", output_gate=True),
    "softmax, tied": make_config("softmax", tie_embeddings=True),
    "softmax with a window": _attention("softmax", **WINDOW),
    "biased softmax, table": _attention("biased_softmax", **NO_TAIL),
    "no RoPE": _attention(rope=False),
    "window": _attention(**WINDOW, global_rope=False, qk_norm=True),
    "window everywhere": _attention("lazy_no_bias", window=3),
    "global heads": _attention(global_share=0.25),
    "global heads of a table": _attention(global_share=0.5, bias_kind="table"),
    "global heads without a tail": _attention(global_share=0.5, global_rope=False, **NO_TAIL),
    "scaled RoPE": _attention(**LLAMA3),
    "stretched RoPE": _attention(rope_scaling="linear", rope_factor=2.0),
    "biases, norms, gate": _attention(qkv_bias=True, qk_norm=True, output_gate=True),
    "one key head": _attention(num_kv_heads=1, head_dim=6),
    "tied": make_config(tie_embeddings=True),
    "unscaled": make_config(tie_embeddings=True, scale_embedding=False, scan_layers=False),
}
TEXTS = ["The quick brown fox", "", "jumps  over\n\ta lazy d\u00f6g, <|eos|> 123"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns where transformers has answered."""
    found = tmp_path_factory.mktemp("exports")
    tokens = np.random.default_rng(0).integers(31, size=(3, LENGTH))
    np.savez(found / "asked.npz", tokens=tokens, lengths=[LENGTH - NEW, 9, 1])
    for name, config in MODELS.items():
        _write(found / name, config)
    tokenizer = Tokenizer.train(TEXTS, 270)
    (found / "texts.json").write_text(json.dumps(TEXTS))
    for name, variant in (("speaks", "lazy"), ("speaks as llama", "softmax")):
        config = make_config(variant, vocab_size=tokenizer.vocab_size)
        _write(found / name, config, tokenizer, step=3)
    ask(found, Path(__file__).with_name("peer.py"), found)
    return found


def _write(folder, config, tokenizer=None, **facts):
    folder.mkdir()
    facts = Facts(config, LENGTH, **facts)
    model = ExportedModel(config, make_params(config), tokenizer, facts)
    hub.write(folder, model, "float32")


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens(folder, name):
    asked, found = np.load(folder / "asked.npz"), np.load(folder / f"{name}.npz")
    tokens, lengths, model = asked["tokens"], asked["lengths"], load_model(folder / name)
    whole = np.zeros(tokens.shape, np.int32)
    expected = np.asarray(model.logits(tokens, whole))
    for kind in ("logits", "logits in parts", "logits in two calls"):
        np.testing.assert_allclose(found[kind], expected, rtol=0, atol=1e-4, err_msg=kind)
    np.testing.assert_allclose(found["bfloat16"], expected, rtol=0, atol=0.3)
    chosen = np.take_along_axis(jax.nn.log_softmax(expected[:, :-1]), tokens[:, 1:, None], -1)
    np.testing.assert_allclose(found["loss"], -chosen.mean(), rtol=1e-5)
    documents = whole + (np.arange(LENGTH) >= 9)
    expected = np.asarray(model.logits(tokens, documents))
    np.testing.assert_allclose(found["packed"], expected, rtol=0, atol=1e-4)

    # Each token that was made is the likeliest behind those before it.
    rows = tokens.copy()
    places = lengths[:, None] + np.arange(NEW)
    np.put_along_axis(rows, places, found["batch"], axis=1)
    likeliest = np.asarray(model.logits(rows, whole)).argmax(-1)
    made = np.take_along_axis(likeliest, places - 1, axis=1)
    for kind in ("batch", "uncached", "one row", "fixed cache"):
        few = found[kind]
        np.testing.assert_array_equal(few, made[: len(few)], err_msg=kind)


@pytest.mark.parametrize("name", ["recipe paper", "recipe sharp_norm", "window"])
def test_tokens_are_those_that_our_cache_gives(folder, name):
    asked, model = np.load(folder / "asked.npz"), load_model(folder / name)
    made = generate(
        model.params,
        model.config,
        asked["tokens"][:, : LENGTH - NEW],
        asked["lengths"],
        sampling=GREEDY,
        key=jax.random.key(0),
    )
    np.testing.assert_array_equal(np.load(folder / f"{name}.npz")["batch"], made.tokens)


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saves_again_is_what_was_exported(folder, name):
    before, after = load_model(folder / name), load_model(folder / f"{name}-again")
    assert (
        after.config
        == before.config
        == dataclasses.replace(
            MODELS[name], attention=dataclasses.replace(MODELS[name].attention, implementation=None)
        )
    )
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    assert (folder / f"{name}-again" / "modeling_lazyattn.py").is_file()


@pytest.mark.parametrize("name", ["speaks", "speaks as llama"])
def test_a_pipeline_says_what_we_say(folder, name):
    found, model = json.loads((folder / f"{name}.json").read_text()), load_model(folder / name)
    tokenizer = model.tokenizer
    plain = [text for text in TEXTS if "<|eos|>" not in text]  # there it is the token
    for text, ids in zip(TEXTS, found["ids"], strict=True):
        if text in plain:
            assert ids == [tokenizer.bos_id, *tokenizer.encode(text)]
    said = generate_text(
        model.params, model.config, tokenizer, plain, sampling=GREEDY, key=jax.random.key(0)
    )
    assert found["said"][: len(plain)] == [a + b for a, b in zip(plain, said, strict=True)]
