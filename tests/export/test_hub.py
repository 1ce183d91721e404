"""Exports as a model of the hub: the bits that came in, or one clear sentence."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers

from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError
from lazyattn.export.card import model_card
from lazyattn.export.flags import ExportOptions
from lazyattn.export.hub import CODE, loading, write
from lazyattn.export.main import export
from lazyattn.model.config import VARIANTS, AttentionConfig, ModelConfig
from lazyattn.model.distance_bias import NAMES
from lazyattn.pretrained import hub, names
from lazyattn.pretrained.load import ExportedModel, load_model
from lazyattn.pretrained.parameters import as_softmax, cast
from lazyattn.pretrained.settings import Facts
from lazyattn.training.initialize import converted_bias
from tests.model.tiny import make_config, make_params
from tests.pretrained import hub_folder

safetensors_numpy = pytest.importorskip("safetensors.numpy")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        ({"rope_scaling": LLAMA3}, "bfloat16"),
        ({"model_type": "mistral", "sliding_window": 7, "rope_scaling": LINEAR}, "float32"),
        ({"model_type": "qwen2", "tie_word_embeddings": True}, "bfloat16"),
        (
            {"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True}
            | {"max_window_layers": 0},
            "float32",
        ),
        ({"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 6}, "float32"),
    ],
    ids=["llama", "mistral", "qwen2", "qwen2 with a window", "qwen3"],
)
def test_there_and_back_to_the_bit(tmp_path, change, dtype):
    settings = hub_folder.LLAMA | change | {"torch_dtype": dtype}
    kind = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    before = {name: x.astype(kind) for name, x in hub_folder.make_tensors(settings).items()}
    hub_folder.write(tmp_path / "in", settings, before, files=2)
    options = ExportOptions(
        formats=("hub",),
        import_from=str(tmp_path / "in"),
        output=str(tmp_path / "out"),
        dtype=dtype,
    )
    out = export(None, options=options)
    after = safetensors_numpy.load_file(out / "model.safetensors")
    assert after.keys() == before.keys()
    for name, array in before.items():
        assert after[name].dtype == array.dtype
        assert after[name].tobytes() == array.tobytes(), name
    said = json.loads((out / "config.json").read_text())
    assert said["model_type"] == settings["model_type"]
    assert hub.model_config(said) == hub.model_config(settings)
    assert hub.sequence_length(said) == 64


def as_exported(config):
    """Returns a config without what is no part of a model."""
    attention = dataclasses.replace(config.attention, implementation=None)
    return dataclasses.replace(config, attention=attention)


def test_an_embedding_that_is_scaled_comes_out_scaled():
    config = make_config("softmax")
    params = make_params(config)
    found = dict(names.to_torch(params, config, names.HUB))
    assert hub.as_settings(config, 64, "float32")["model_type"] == "llama"
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], 4 * params["embedding"])
    np.testing.assert_array_equal(found["lm_head.weight"], params["unembedding"])


@pytest.mark.parametrize(
    "config",
    [
        make_config(),
        make_config("softmax", attention={"rope": False}),
        make_config("softmax", attention={"output_gate": True}),
        make_config("softmax", tie_embeddings=True),
        make_config("softmax", attention={"qk_norm": True, "qkv_bias": True}),
        make_config("softmax", attention={"window": 3, "global_share": 0.5}),
    ],
)
def test_what_no_family_is_has_a_modeling_file(config):
    assert hub.family_of(config) is None
    assert loading(config) == "AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)"
    # Without it the tokenizer would ask at the terminal whether code may run.
    tokenizer = "AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)"
    settings = {"dtype": "float32", "layout": "unsharded", "formats": ("hub",), "tokenizer": True}
    card = model_card("it", Facts(config, 64), **settings)
    assert f"tokenizer = {tokenizer}\n" in card


# Settings that change nothing of the function, or that others follow from.
NOT_NEEDED = {
    *("num_heads", "num_kv_heads", "head_dim", "global_share", "slope_shards"),  # in config.json
    *("bias_init", "bias_std", "offset_init", "skip_mass", "implementation"),
}


def test_the_modeling_file_knows_every_setting():
    """A new one must be computed there, refused in `hub.write`, or named here."""
    text = CODE.read_text()
    settings = {field.name for field in dataclasses.fields(AttentionConfig)}
    assert {name for name in settings if f'settings["{name}"]' not in text} == NOT_NEEDED
    for name in VARIANTS:
        assert name == "lazy" or f'"{name}"' in text
    # Of the model's own, what is in config.json by transformers' names, and what is not needed.
    assert {field.name for field in dataclasses.fields(ModelConfig)} == {
        *("vocab_size", "width", "num_layers", "mlp_width", "norm_eps", "tie_embeddings"),
        *("scale_embedding", "attention"),
        *("compute_dtype", "remat", "scan_layers", "loss_chunk"),
        *("lora_rank", "lora_alpha"),  # merged, wherever a model is read
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config",
    [
        make_config(tie_embeddings=True, attention={"qk_norm": True, "qkv_bias": True}),
        make_config(attention={"bias_kind": "table", "output_gate": True}, scan_layers=False),
        make_config("softmax", attention={"rope": False, "num_kv_heads": 4, "head_dim": 6}),
    ],
    ids=["decay", "table", "softmax"],
)
def test_ours_comes_back_to_the_bit(tmp_path, config, dtype):
    tokenizer = Tokenizer.train(["a text"], 262)
    config = dataclasses.replace(as_exported(config), vocab_size=tokenizer.vocab_size)
    params, facts = make_params(config), Facts(config, 64, step=7, data="a text")
    write(tmp_path, ExportedModel(config, params, tokenizer, facts), dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("config.json", "generation_config.json", "model.safetensors"),
        *("modeling_lazyattn.py", "tokenizer.json", "tokenizer_config.json"),
    ]
    model = load_model(tmp_path)
    assert (model.config, model.facts) == (config, facts)
    expected = jax.tree.map(lambda x: x.astype(jnp.float32), cast(params, dtype))
    jax.tree.map(np.testing.assert_array_equal, model.params, expected)
    # The tokenizer begins texts for others and is the same to us.
    assert model.tokenizer.fingerprint != tokenizer.fingerprint
    assert model.tokenizer.same_ids(tokenizer)
    assert model.tokenizer.encode("a text") == tokenizer.encode("a text")
    others = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert others.encode("a text").ids == [tokenizer.bos_id, *tokenizer.encode("a text")]


@pytest.mark.parametrize("kind", ["table", "decay"])
def test_a_lazy_model_that_is_softmax_still_is_its_family_again(tmp_path, kind):
    before = hub_folder.write(tmp_path / "in", hub_folder.LLAMA)
    start = load_model(tmp_path / "in")
    attention = dataclasses.replace(start.config.attention, variant="lazy", bias_kind=kind)
    config = dataclasses.replace(start.config, attention=attention)
    params = jax.tree.map(lambda x: x, start.params)
    layer = params["blocks"]["attention"]
    layer |= converted_bias(layer, start.config.attention, attention)[0]
    layer["offset"] = jnp.zeros((2, 4))
    found, softmax = as_softmax(params, config)
    assert softmax == dataclasses.replace(
        config, attention=dataclasses.replace(attention, variant="softmax")
    )
    for name, array in names.to_torch(found, softmax, names.HUB):
        assert array.tobytes() == before[name].tobytes(), name
    # What has learned anything stays what it is.
    for name in layer.keys() & {"offset", *NAMES["decay"], *NAMES["table"]}:
        changed = layer | {
            name: layer[name] + 1e-3 if name != NAMES["decay"][1] else 0 * layer[name]
        }
        params["blocks"]["attention"] = changed
        assert as_softmax(params, config)[1] == config, name


def test_a_hub_s_folder_is_nothing_else_beside():
    message = r"--formats is 'orbax,hub', but it must be .* or hub alone"
    with pytest.raises(InputError, match=message):
        ExportOptions(formats=("orbax", "hub"))


def test_the_card_says_who_reads_it(tmp_path):
    hub_folder.write(tmp_path / "in", hub_folder.LLAMA)
    options = ExportOptions(
        formats=("hub",), import_from=str(tmp_path / "in"), output=str(tmp_path / "out")
    )
    card = (export(None, options=options) / "README.md").read_text()
    assert "model = AutoModelForCausalLM.from_pretrained(FOLDER)\n" in card
    assert "library_name: transformers" in card
    assert not load_model(tmp_path / "out").config.scale_embedding
