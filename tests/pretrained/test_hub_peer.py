"""Models of the hub's families are what the transformers library says they are.

Needs torch and transformers, in this Python or in the one that LAZYATTN_PEER_PYTHON names.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from lazyattn.export.flags import ExportOptions
from lazyattn.export.main import export
from lazyattn.generation.decode import generate
from lazyattn.generation.sampling import SamplingConfig
from lazyattn.pretrained.load import load_model
from lazyattn.sharding import MeshConfig, make_mesh
from tests.pretrained.torch_peer import ask

PEER = Path(__file__).with_name("peer.py")
COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
TIED = {"tie_word_embeddings": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
# Name -> class, settings, size of a file.
MODELS = {
    "llama2": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}, "1GB"),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}, "20KB"),
    "llama_linear": ("Llama", {"rope_parameters": LINEAR}, "1GB"),
    "smollm": ("Llama", TIED | {"num_attention_heads": 8, "head_dim": 4}, "1GB"),
    "qwen3": ("Qwen3", {"head_dim": 12}, "20KB"),
    "qwen3_tied": ("Qwen3", TIED | {"head_dim": 8}, "1GB"),
    "qwen2": ("Qwen2", {}, "20KB"),
    "qwen2_tied": ("Qwen2", TIED | {"sliding_window": 5}, "1GB"),  # which is not used
    "qwen2_window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
        "1GB",
    ),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 8}, "20KB"),
    "mistral_whole": ("Mistral", {"sliding_window": None}, "1GB"),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns where the peer has written its models and answers."""
    found = tmp_path_factory.mktemp("peer")
    np.save(found / "tokens.npy", np.random.default_rng(0).integers(97, size=(2, 24)))
    asked = {
        name: (kind, COMMON | settings, shard) for name, (kind, settings, shard) in MODELS.items()
    }
    (found / "asked.json").write_text(json.dumps(asked))
    ask(found, PEER, found)
    return found


@pytest.fixture(scope="module")
def again(folder):
    """Returns the same once ours has read and exported all, and the peer has read that."""
    for name in MODELS:
        options = ExportOptions(
            formats=("hub",),
            import_from=str(folder / name),
            output=str(folder / f"{name}-again"),
        )
        export(None, options=options)
    ask(folder, PEER, "--again", folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(again, name):
    expected = np.load(again / f"{name}.npz")["logits"]
    np.testing.assert_array_equal(np.load(again / f"{name}-again.npy"), expected)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens(folder, name):
    tokens, expected = np.load(folder / "tokens.npy"), np.load(folder / f"{name}.npz")
    several = (folder / name / "model.safetensors.index.json").is_file()
    assert several == (MODELS[name][2] != "1GB")
    model = load_model(folder / name, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert model.config.attention.variant == "softmax"
    assert model.config.compute_dtype == "float32"
    found = np.asarray(model.logits(tokens))
    np.testing.assert_allclose(found, expected["logits"], rtol=0, atol=1e-4)
    made = generate(
        model.params,
        model.config,
        tokens,
        np.full(len(tokens), tokens.shape[1]),
        sampling=SamplingConfig(max_new_tokens=8, temperature=0.0),
        key=jax.random.key(0),
    )
    np.testing.assert_array_equal(np.asarray(made.tokens), expected["greedy"])
