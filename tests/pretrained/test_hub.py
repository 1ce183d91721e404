"""Folders of the hub: the same function, or one clear sentence before any weight is read.

`test_hub_peer.py` holds every family to the transformers library.
"""

import dataclasses
import json
import re

import numpy as np
import pytest

from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError
from lazyattn.model.config import AttentionConfig
from lazyattn.pretrained import hub, names, sharded
from lazyattn.pretrained.load import load_model
from tests.pretrained import hub_folder
from tests.pretrained.hub_folder import LLAMA
from tests.pretrained.theirs import theirs

pytest.importorskip("safetensors.numpy")

TOKENS = np.random.default_rng(0).integers(31, size=11)
TIED = {"tie_word_embeddings": True}


def _by_authors(tensors):
    """Returns tensors by the authors' names, for the definition in `theirs.py`."""
    renamed = {}
    for name, array in tensors.items():
        for theirs_, ours in (
            *(("self_attn", "attn"), ("input_layernorm", "attn_norm")),
            *(("post_attention_layernorm", "mlp_norm"), ("embed_tokens", "embeddings")),
        ):
            name = name.replace(theirs_, ours)
        renamed[name] = array
    return {"lm_head.weight": renamed["model.embeddings.weight"]} | renamed


@pytest.mark.parametrize(
    ("change", "files"),
    [
        ({}, 1),
        ({"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 1}, 3),
        ({"model_type": "qwen3", "head_dim": 4} | TIED, 2),
    ],
    ids=["llama", "mistral", "qwen3, tied"],
)
def test_the_function_is_that_of_the_tensors(tmp_path, change, files):
    settings = LLAMA | change
    tensors = hub_folder.write(tmp_path / "model", settings, files=files)
    model = load_model(tmp_path / "model")
    assert model.tokenizer is None and model.facts.sequence_length == 64
    definition = {
        "num_hidden_layers": 2,
        "num_heads": 4,
        "num_kv_heads": settings["num_key_value_heads"],
        "hidden_size": 16,
        "norm_eps": 1e-5,
        "rope_theta": 500.0,
        "qk_norm": settings["model_type"] == "qwen3",
    }
    expected = theirs(_by_authors(tensors), definition, TOKENS)
    np.testing.assert_allclose(model.logits(TOKENS[None])[0], expected, rtol=1e-4, atol=1e-4)


def test_biases_go_to_their_heads(tmp_path):
    settings = LLAMA | {"model_type": "qwen2"} | TIED
    tensors = hub_folder.write(tmp_path / "model", settings)
    layer = load_model(tmp_path / "model").params["blocks"]["attention"]
    for ours, name, heads in (("query", "q", 4), ("key", "k", 2), ("value", "v", 2)):
        bias = tensors[f"model.layers.1.self_attn.{name}_proj.bias"]
        np.testing.assert_array_equal(layer[f"{ours}_bias"][1], bias.reshape(heads, 4))
        matrix = tensors[f"model.layers.1.self_attn.{name}_proj.weight"]
        np.testing.assert_array_equal(layer[ours][1], matrix.T.reshape(16, heads, 4))


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_device_has_only_its_part_read(model_type):
    """Every part of every array, and not a row or column more than its heads'."""
    settings = LLAMA | {"model_type": model_type, "head_dim": 6}
    stored, config = hub_folder.make_tensors(settings), hub.model_config(settings)
    asked = []

    def read(name, index):
        asked.append(stored[name][index].size)
        return stored[name][index]

    for tensor in names.tensors(config, names.HUB):
        whole = tensor.from_torch(stored[tensor.name])
        for first, last in ((0, 1), (1, 2), (0, 2)):
            for axis in range(whole.ndim):
                index = [slice(0, n, 1) for n in whole.shape]
                index[axis] = slice(first, last, 1)
                part = sharded._part(read, tensor, tuple(index))
                np.testing.assert_array_equal(part, whole[tuple(index)], err_msg=tensor.name)
                # A head's entries are next to each other: a cut through them reads all.
                inner = axis > 0 and whole.shape[axis] == 6
                assert asked.pop() == (whole.size if inner and whole.ndim > 1 else part.size)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SCALED = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_length": 32}


@pytest.mark.parametrize(
    ("change", "attention"),
    [
        ({}, {}),
        ({"rope_scaling": LLAMA3}, SCALED),
        ({"rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": 500.0}}, SCALED),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_scaling": "linear", "rope_factor": 2.0},
        ),
        ({"rope_scaling": {"rope_type": "default"}}, {}),
        ({"num_key_value_heads": None}, {"num_kv_heads": 4}),
        ({"head_dim": 6}, {"head_dim": 6}),
        ({"sliding_window": 3}, {}),  # which Llama has not
        ({"model_type": "mistral"}, {"window": 4096}),
        ({"model_type": "mistral", "sliding_window": 7}, {"window": 7}),
        ({"model_type": "mistral", "sliding_window": None}, {}),
        ({"model_type": "qwen2", "sliding_window": 7}, {"qkv_bias": True}),
        (
            {"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True}
            | {"max_window_layers": 2},
            {"qkv_bias": True},
        ),
        (
            {"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True}
            | {"layer_types": ["sliding_attention"] * 2},
            {"qkv_bias": True, "window": 7},
        ),
        ({"model_type": "qwen3"}, {"qk_norm": True, "head_dim": 128}),
    ],
)
def test_settings(change, attention):
    found = hub.model_config(LLAMA | change)
    usual = {"variant": "softmax", "num_heads": 4, "num_kv_heads": 2, "rope_base": 500.0}
    assert found.attention == AttentionConfig(**(usual | attention))
    assert (found.width, found.hidden_width, found.num_layers) == (16, 24, 2)
    assert not found.scale_embedding and not found.tie_embeddings
    assert found.norm_eps == 1e-5 and found.compute_dtype == "float32"
    rounded = hub.model_config(LLAMA | change | {"torch_dtype": "bfloat16"})
    assert rounded == dataclasses.replace(found, compute_dtype="bfloat16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt_neox"}, "model_type is 'gpt_neox', but it must be one of llama, mist"),
        ({"model_type": "olmo2"}, "model_type is 'olmo2', .* qwen3, since it norms what attention"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\], but it must be one of llama"),
        (
            {"torch_dtype": "float8_e4m3fn"},
            "dtype is 'float8_e4m3fn', but it must be one of float3",
        ),
        ({"layer_types": 2}, "layer_types is 2, but it must be a list of 2, as num_hidden_layers"),
        ({"layer_types": ["full_attention"]}, r"layer_types is \['full_attention'\], but it must"),
        ({"quantization_config": {"quant_method": "awq"}}, "says 'awq', but .* not be quantized"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but it must be 'swish'"),
        ({"attention_bias": True}, "attention_bias is True, but it must be False"),
        ({"mlp_bias": True}, "mlp_bias is True, but it must be False"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type is 'yarn', but it must"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is None, but it must be a nu"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide', but it must be a whole number"),
        ({"vocab_size": None}, "vocab_size is None, but it must be a whole number"),
        ({"num_attention_heads": 3}, "num_kv_heads is 2, but it must be a divisor"),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types has full_attention, sliding_attention, but all layers",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4}
            | {"max_window_layers": 1},
            "max_window_layers is 1, but it must be 0, or num_hidden_layers = 2",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4}
            | {"max_window_layers": None},
            "max_window_layers is None, but it must be a whole number",
        ),
    ],
)
def test_what_ours_can_not_be_is_named_without_any_tensor(tmp_path, change, message):
    hub_folder.write(tmp_path, LLAMA | change, tensors={})
    with pytest.raises(InputError, match=message):
        load_model(tmp_path)


def _changed(**changes):
    return hub_folder.make_tensors(LLAMA) | changes


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        (
            LLAMA,
            hub_folder.make_tensors(LLAMA | TIED),
            "has no tensor lm_head.weight, but the model needs one unless",
        ),
        (LLAMA | TIED, _changed(), "has a lm_head.weight that is not its model.embed_tokens.weig"),
        (
            LLAMA,
            hub_folder.make_tensors(LLAMA | {"model_type": "qwen2"}),
            "has a tensor model.layers.0.self_attn.[qkv]_proj.bias, which the model has no pl",
        ),
        (
            LLAMA | {"num_key_value_heads": 4},
            _changed(),
            r"k_proj.weight of shape \(8, 16\), but it must be of shape \(16, 16\)",
        ),
        (
            LLAMA,
            _changed(**{"model.norm.weight": np.ones(16, np.int8)}),
            "has model.norm.weight in I8, but .* weights must not be quantized",
        ),
    ],
    ids=["untied", "twins", "biases", "shape", "quantized"],
)
def test_tensors_that_do_not_fit(tmp_path, monkeypatch, settings, tensors, message):
    hub_folder.write(tmp_path, settings, tensors)
    monkeypatch.setattr(sharded, "read_params", lambda *_: pytest.fail("too late"))
    with pytest.raises(InputError, match=message):
        load_model(tmp_path)


def test_one_table_written_twice_and_old_tables_of_angles_do_no_harm(tmp_path):
    tensors = hub_folder.make_tensors(LLAMA | TIED)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    hub_folder.write(tmp_path, LLAMA | TIED, tensors)
    assert "unembedding" not in load_model(tmp_path).params


def test_a_missing_file(tmp_path):
    hub_folder.write(tmp_path, LLAMA, files=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    said = f"{str(tmp_path)!r} has no model-00002-of-00003.safetensors, but model.safetensors.index"
    with pytest.raises(InputError, match=re.escape(said) + ".* names 3 files"):
        load_model(tmp_path)


def test_a_file_of_another_model(tmp_path):
    hub_folder.write(tmp_path, LLAMA, files=3)
    (tmp_path / "model-00002-of-00003.safetensors").write_bytes(
        (tmp_path / "model-00001-of-00003.safetensors").read_bytes()
    )
    said = r"model-00002-of-00003.safetensors' has no tensor .*, but model.safetensors.index.json"
    with pytest.raises(InputError, match=said):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"config.json": LLAMA, "pytorch_model.bin": {}},
            "has no safetensors, .*; transformers' save_pretrained makes one of pytorch_model.bin",
        ),
        ({"adapter_config.json": {}}, "has no config.json, .*an adapter, to be merged into its"),
        ({"model.gguf": {}}, "has no config.json, but it must be the folder of an export or of"),
        (
            {"config.json": {"model_type": "gemma3", "text_config": {}}},
            "model_type is 'gemma3', but it must be one of llama, mistral, qwen2, qwen3",
        ),
    ],
)
def test_folders_of_other_kinds(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        load_model(tmp_path)


def test_files_that_git_has_not_fetched(tmp_path):
    hub_folder.write(tmp_path, LLAMA)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(InputError, match=r"is a pointer of Git LFS, but .* run git lfs pull in"):
        load_model(tmp_path)


def test_a_tokenizer_of_more_ids_than_the_vocabulary(tmp_path, monkeypatch):
    hub_folder.write(tmp_path, LLAMA)
    Tokenizer.train(["a text"], 262).save(tmp_path / "tokenizer.json")
    monkeypatch.setattr(sharded, "read_params", lambda *_: pytest.fail("too late"))
    with pytest.raises(
        InputError, match=r"a tokenizer of 26\d ids, but .* vocab_size of 31, which"
    ):
        load_model(tmp_path)
