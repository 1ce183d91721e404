"""Exports as a model of the hub: the bits that came in, or one clear sentence."""

import json

import ml_dtypes
import numpy as np
import pytest

from lazyattn.errors import InputError
from lazyattn.export.flags import ExportOptions
from lazyattn.export.main import export
from lazyattn.pretrained import hub, names
from lazyattn.pretrained.load import load_model
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


def test_an_embedding_that_is_scaled_comes_out_scaled():
    config = make_config("softmax")
    params = make_params(config)
    found = dict(names.to_torch(params, config, names.HUB))
    assert hub.as_settings(config, 64, "float32")["model_type"] == "llama"
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], 4 * params["embedding"])
    np.testing.assert_array_equal(found["lm_head.weight"], params["unembedding"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (make_config(), "variant is 'lazy', but it must be 'softmax' for --formats=hub"),
        (make_config("softmax", attention={"rope": False}), "rope is False, but"),
        (make_config("softmax", attention={"output_gate": True}), "output_gate is True, but"),
        (make_config("softmax", tie_embeddings=True), "is tied and scales its embedding"),
        (
            make_config("softmax", attention={"qk_norm": True, "qkv_bias": True}),
            "qkv_bias and .*qk_norm are both on",
        ),
    ],
)
def test_what_no_family_is(config, message):
    with pytest.raises(InputError, match=message):
        hub.as_settings(config, 64, "float32")


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
    assert "transformers.AutoModelForCausalLM" in card
    assert not load_model(tmp_path / "out").config.scale_embedding
