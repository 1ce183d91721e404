"""The harness's Hugging Face adapter on the same weights, as a softmax Llama.

Needs torch, transformers and lm-eval, in this Python or in the one that
LAZYATTN_PEER_PYTHON names.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lazyattn.data.tokenizer import Tokenizer
from lazyattn.sharding import MeshConfig, make_mesh
from tests.model.tiny import make_config, make_params
from tests.training.tiny import TEXT

PEER = Path(__file__).with_name("peer.py")
CONTEXT = 48

REQUESTS = {
    "loglikelihood": [
        ("attention may look", " at nothing"),
        ("attention may look ", "at nothing when no word is worth"),
        ("", "no word is worth the weight"),
        ("a", "b"),
        (TEXT * 2, " of a glance"),  # longer than the context
        ("no word\n\n", "Question: é 你好"),
        *((TEXT[:end], TEXT[end : end + 9]) for end in range(5, 60, 9)),
    ],
    "loglikelihood_rolling": [("attention may look at nothing",), (TEXT * 3,), ("x",)],
    "generate_until": [
        (TEXT[:end], {"until": ["a", "\n"], "max_gen_toks": 12}) for end in (3, 20, 33, 60)
    ],
}


def _as_llama(params, config):
    """Returns the weights of a softmax model by the names and shapes of Llama."""
    width = config.width
    found = {
        # Llama doesn't scale its embeddings.
        "model.embed_tokens.weight": params["embedding"] * width**0.5,
        "lm_head.weight": params["unembedding"],
        "model.norm.weight": params["final_norm"]["scale"],
    }
    for layer in range(config.num_layers):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
        name = f"model.layers.{layer}."
        attention, mlp = block["attention"], block["mlp"]
        found[name + "input_layernorm.weight"] = block["attention_norm"]["scale"]
        found[name + "post_attention_layernorm.weight"] = block["mlp_norm"]["scale"]
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            found[f"{name}self_attn.{theirs}.weight"] = attention[ours].reshape(width, -1).T
        found[name + "self_attn.o_proj.weight"] = attention["output"].reshape(-1, width).T
        for kind in ("gate", "up", "down"):
            found[f"{name}mlp.{kind}_proj.weight"] = mlp[kind].T
    return {name: np.ascontiguousarray(array, np.float32) for name, array in found.items()}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Returns ours and the peer's answers to the same questions."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    python = os.environ.get("LAZYATTN_PEER_PYTHON", sys.executable)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    check = subprocess.run([python, PEER, "--check"], capture_output=True, env=clean)
    if check.returncode:
        pytest.skip("torch, transformers or lm-eval is not installed (LAZYATTN_PEER_PYTHON)")
    from lm_eval.api.instance import Instance

    from lazyattn.eval.harness import LazyAttentionLM

    folder = tmp_path_factory.mktemp("peer")
    tokenizer = Tokenizer.train([TEXT], 300)
    tokenizer.save(folder / "tokenizer.json")
    config = make_config("softmax", vocab_size=300)
    params = make_params(config)
    np.savez(folder / "weights.npz", **_as_llama(params, config))
    model = {
        "vocab_size": config.vocab_size,
        "width": config.width,
        "mlp_width": config.hidden_width,
        "num_layers": config.num_layers,
        "num_heads": config.attention.num_heads,
        "num_kv_heads": config.attention.kv_heads,
        "head_dim": config.head_dim,
        "norm_eps": config.norm_eps,
        "rope_base": config.attention.rope_base,
    }
    asked = {"model": model, "context": CONTEXT, "requests": REQUESTS}
    (folder / "asked.json").write_text(json.dumps(asked))
    subprocess.run([python, PEER, folder], check=True, env=clean, capture_output=True)
    theirs = json.loads((folder / "answers.json").read_text())

    lm = LazyAttentionLM(
        params,
        config,
        tokenizer,
        make_mesh(MeshConfig(), jax.devices()[:1]),
        context=CONTEXT,
        batch_tokens=256,
        add_bos=False,
    )
    ours = {
        kind: getattr(lm, kind)(
            [Instance(kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]
        )
        for kind, arguments in REQUESTS.items()
    }
    return ours, theirs


def test_log_likelihoods(answers):
    ours, theirs = (answer["loglikelihood"] for answer in answers)
    np.testing.assert_allclose([a for a, _ in ours], [a for a, _ in theirs], rtol=0, atol=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_rolling_log_likelihoods(answers):
    ours, theirs = (answer["loglikelihood_rolling"] for answer in answers)
    # Sums over hundreds of tokens: 1e-4 of a nat a token would be far less strict.
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-4)


def test_continuations(answers):
    ours, theirs = (answer["generate_until"] for answer in answers)
    assert ours == theirs
    assert any(ours)
