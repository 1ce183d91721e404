"""safetensors in the authors' naming, both ways: the same function, or one clear sentence."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from lazyattn.errors import InputError
from lazyattn.model.transformer import Transformer, logits, output_embedding
from lazyattn.pretrained import names, settings, tensor_files
from lazyattn.pretrained.load import load_model
from lazyattn.pretrained.parameters import without_tail
from lazyattn.pretrained.settings import Facts
from tests.model.tiny import make_batch, make_config, make_params
from tests.pretrained.theirs import theirs

safetensors_numpy = pytest.importorskip("safetensors.numpy")

TOKENS = make_batch()["inputs"]
LENGTH = TOKENS.shape[1]
KIND = {"bias_kind": "table"}
TABLE = make_config(attention=KIND)


def _write(folder, params, config, dtype="float32", max_bytes=tensor_files.MAX_BYTES):
    folder.mkdir(exist_ok=True)
    files = names.write(folder, params, config, dtype, max_bytes=max_bytes)
    facts = Facts(model=config, sequence_length=LENGTH)
    (folder / "config.json").write_text(json.dumps(settings.as_settings(facts, dtype)))
    return files


@functools.partial(jax.jit, static_argnums=1)
def _computed(params, config):
    hidden = Transformer(config).apply({"params": params}, TOKENS)
    return logits(hidden, output_embedding(params, config))


def _logits(params, config):
    return np.asarray(_computed(params, config))


def _bits(params):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


@pytest.mark.parametrize(
    ("config", "max_bytes"),
    [
        (TABLE, 4_000),  # several files
        (make_config(tie_embeddings=True, scan_layers=False, attention=KIND), 10**9),
        (make_config("softmax", attention={"qk_norm": True}), 10**9),
        (make_config("lazy_no_bias", width=24, attention={"num_heads": 6, "head_dim": 6}), 3_000),
        (make_config("biased_softmax", tie_embeddings=True, width=24, attention=KIND), 2_000),
    ],
    ids=["lazy", "tied and unrolled", "softmax", "wide heads", "tied, scale inexact"],
)
def test_there_and_back_is_the_same_function_to_the_bit(tmp_path, config, max_bytes):
    params = make_params(config)
    files = _write(tmp_path / "model", params, config, max_bytes=max_bytes)
    assert (len(files) > 1) == (max_bytes < 10**9)
    model = load_model(tmp_path / "model")
    attention = dataclasses.replace(config.attention, implementation=None, bias_kind="table")
    assert model.config == dataclasses.replace(config, attention=attention)
    found = dict(model.params)
    # An inexact scale may give a neighbour that is the same when it is multiplied again.
    scale = np.float32(config.width**0.5)
    np.testing.assert_array_equal(found["embedding"] * scale, params["embedding"] * scale)
    if config.tie_embeddings or config.width == 16:
        np.testing.assert_array_equal(found["embedding"], params["embedding"])
    rest = [{k: v for k, v in tree.items() if k != "embedding"} for tree in (found, params)]
    assert _bits(rest[0]) == _bits(rest[1])


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_decay_comes_back_as_its_table(tmp_path, scan):
    attention = {"global_share": 0.5, "global_rope": False, "output_gate": True, "window": 4}
    config = make_config(scan_layers=scan, attention=attention)
    params = make_params(config)
    _write(tmp_path / "model", params, config)
    tensors = safetensors_numpy.load_file(tmp_path / "model" / "model.safetensors")
    assert tensors["model.layers.0.attn.learnable_bias_diagonals"].shape == (4, 6)
    assert tensors["model.layers.1.attn.learnable_bias_slope"].shape == (4,)
    model = load_model(tmp_path / "model")
    assert model.config.attention.bias_kind == "table"
    np.testing.assert_allclose(
        _logits(model.params, model.config), _logits(params, config), rtol=1e-4, atol=1e-5
    )
    said = settings.differences(Facts(config, LENGTH))
    assert [text.split()[0:2] for text in said] == [
        ["Their", "bias"],
        ["They", "rotate"],
        ["They", "have"],
        ["They", "have"],
    ]
    assert "4 keys" in said[2] and "gate" in said[3]


def test_an_export_from_before_a_bias_had_a_kind(tmp_path):
    params = make_params(TABLE)
    _write(tmp_path / "model", params, TABLE)
    path = tmp_path / "model" / "config.json"
    said = json.loads(path.read_text())
    for name in ("bias_kind", "global_share", "global_rope", "window", "output_gate"):
        del said["lazyattn"]["model"]["attention"][name]
    path.write_text(json.dumps(said))
    model = load_model(tmp_path / "model")
    assert model.config.attention.bias_kind == "table"
    np.testing.assert_array_equal(_logits(model.params, TABLE), _logits(params, TABLE))


@pytest.mark.parametrize("width", [768, 1536, 5120, 3])
def test_any_scale_can_be_undone(width):
    """Not to the same number always, but to one whose product is the same."""
    scale = np.float32(width**0.5)
    draws = np.random.default_rng(width).normal(size=100_000).astype(np.float32)
    edges = np.nextafter(np.float32(2), np.float32([0, 4])) * 2.0 ** np.arange(-20, 20)[:, None]
    product = np.concatenate([draws, edges.ravel(), [0]]).astype(np.float32) * scale
    np.testing.assert_array_equal(names._unscaled(product, scale) * scale, product)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_there_and_back(tmp_path, dtype):
    config = make_config(width=24, attention=KIND)  # whose square root no float has
    params = make_params(config)
    _write(tmp_path / "model", params, config, dtype)
    before, after = _logits(params, config), _logits(load_model(tmp_path / "model").params, config)
    if dtype == "float32":
        np.testing.assert_array_equal(after, before)
    else:
        assert 0 < np.abs(after - before).max() < 2**-6 * np.abs(before).max()


@pytest.mark.parametrize("tied", [False, True])
def test_the_authors_layers_compute_the_same(tmp_path, tied):
    """Matrices are [out, in], heads in the right order, tau's sign and the scale theirs."""
    config = make_config(
        attention=KIND | {"bias_tail": False, "qk_norm": True}, tie_embeddings=tied
    )
    params = make_params(config)
    _write(tmp_path / "model", params, config)
    tensors = safetensors_numpy.load_file(tmp_path / "model" / "model.safetensors")
    said = json.loads((tmp_path / "model" / "config.json").read_text())
    assert tensors["model.layers.1.attn.k_proj.weight"].shape == (8, 16)
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (16, 24)
    expected = [theirs(tensors, said, row) for row in np.asarray(TOKENS)]
    np.testing.assert_allclose(_logits(params, config), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "attention",
    [
        {"bias_kind": "decay"},
        {"bias_kind": "table"},
        # Global heads have no tail, whatever their unused parameters are.
        {"bias_kind": "decay", "global_share": 0.5},
        {"bias_kind": "table", "global_share": 0.5},
    ],
    ids=str,
)
def test_a_tail_written_out_is_the_same_function_in_their_layers(tmp_path, attention):
    config = make_config(attention=attention)
    params = make_params(config)
    longer, without = without_tail(params, config, LENGTH)
    assert settings.differences(Facts(without, LENGTH)) == []
    (difference,) = settings.differences(Facts(config, LENGTH))
    assert "0 from distance 6 on" in difference
    np.testing.assert_allclose(_logits(longer, without), _logits(params, config), atol=1e-6)
    _write(tmp_path / "model", longer, without)
    tensors = safetensors_numpy.load_file(tmp_path / "model" / "model.safetensors")
    said = json.loads((tmp_path / "model" / "config.json").read_text())
    expected = [theirs(tensors, said, row) for row in np.asarray(TOKENS)]
    np.testing.assert_allclose(_logits(params, config), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_of_the_authors_code(tmp_path, tied):
    """With their config.json alone: the tensors tell the variant."""
    config = make_config(attention=KIND | {"bias_tail": False})
    _write(tmp_path, make_params(config), config)
    file = tmp_path / "model.safetensors"
    tensors = safetensors_numpy.load_file(file)
    said = json.loads((tmp_path / "config.json").read_text())
    del said["lazyattn"]
    said["tie_word_embeddings"] = tied
    if tied:
        tensors["lm_head.weight"] = tensors["model.embeddings.weight"]
    (tmp_path / "config.json").write_text(json.dumps(said))
    kept = {n: a for n, a in tensors.items() if n != "lm_head.weight" or not tied}
    safetensors_numpy.save_file(kept, file)
    model = load_model(tmp_path)
    assert (model.config.attention.variant, model.config.tie_embeddings) == ("lazy", False)
    found = _logits(model.params, dataclasses.replace(model.config, compute_dtype="float32"))
    expected = [theirs(tensors, said, row) for row in np.asarray(TOKENS)]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.1.attn.tau": None}, "has no tensor model.layers.1.attn.tau, but the model"),
        (
            {"model.layers.0.attn.tau": np.zeros(3, np.float32)},
            r"has model.layers.0.attn.tau of shape \(3,\), but it must be of shape \(4,\)",
        ),
        ({"model.norm.bias": np.zeros(3, np.float32)}, "has a tensor model.norm.bias, which the"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    config = make_config()
    _write(tmp_path, make_params(config), config)
    file = tmp_path / "model.safetensors"
    tensors = safetensors_numpy.load_file(file) | change
    safetensors_numpy.save_file({n: a for n, a in tensors.items() if a is not None}, file)
    with pytest.raises(InputError, match=message):
        load_model(tmp_path)


def test_embeddings_that_are_two_are_not_tied(tmp_path):
    config = make_config(tie_embeddings=True)
    _write(tmp_path, make_params(config), config)
    file = tmp_path / "model.safetensors"
    tensors = safetensors_numpy.load_file(file)
    safetensors_numpy.save_file(tensors | {"lm_head.weight": 2 * tensors["lm_head.weight"]}, file)
    with pytest.raises(InputError, match="so that the model is not tied, as its settings say"):
        load_model(tmp_path)


def _remove(folder):
    (folder / "model.safetensors").unlink()


def _damage(folder):
    (folder / "model.safetensors").write_bytes(b"nothing")


def _forget(folder):
    (folder / "config.json").unlink()


def _change(**values):
    def change(folder):
        said = json.loads((folder / "config.json").read_text())
        if "model" not in values:
            said.pop("lazyattn")
        said["lazyattn" if "model" in values else "hidden_act"] = values.get("hidden_act", values)
        (folder / "config.json").write_text(json.dumps(said))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_remove, "has no safetensors, but it must be a folder with model.safetensors or"),
        (_damage, "model.safetensors' can't be read as a safetensors file"),
        (_forget, "has no config.json, but it must be the folder of an export or of a hub"),
        (_change(hidden_act="gelu"), "hidden_act is 'gelu', but it must be 'silu'"),
        (_change(model={}, format=7), "lazyattn.format is 7, but it must be 1 for this version"),
        (_change(model=3, format=1), "lazyattn.model is 3, but it must be a group of settings"),
        (_change(model={"depth": 3}, format=1), "config.model.depth is unknown"),
    ],
)
def test_folders_that_can_not_be_read(tmp_path, change, message):
    config = make_config()
    _write(tmp_path, make_params(config), config)
    change(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)
