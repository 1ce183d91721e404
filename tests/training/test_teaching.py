"""Ramps of offsets and slopes, and what is trained while a model is taught."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from lazyattn.checkpoint.load import load_trained
from lazyattn.checkpoint.manager import Checkpoints
from lazyattn.checkpoint.state import make_state_factory
from lazyattn.errors import InputError
from lazyattn.experiment import TeachingConfig, from_config_dict
from lazyattn.model.config import AttentionConfig
from lazyattn.model.distance_bias import bias_arguments, bias_parameters
from lazyattn.model.heads import initial_slopes
from lazyattn.model.transformer import Transformer
from lazyattn.pretrained.load import load_model
from lazyattn.sharding import make_mesh
from lazyattn.training.initialize import converted_bias
from lazyattn.training.teaching import lines, make_run_optimizer, with_ramps
from tests.pretrained import hub_folder
from tests.training import tiny

SOFTMAX = AttentionConfig(num_heads=4, variant="softmax")
KINDS = {
    "decay": {},
    "global": {"global_share": 0.25},
    "table": {"bias_kind": "table"},
    "no tail": {"bias_kind": "table", "bias_tail": False},
}
STEPS = 8


def _attention(kind):
    return AttentionConfig(num_heads=4, bias_width=6, offset_init=-0.75, **KINDS[kind])


def _start(config):
    """Returns a layer's parameters as they are when a softmax model is taken over."""
    layer = {"output": jnp.ones((2, 4, 2, 8))}
    return converted_bias(layer, SOFTMAX, config)[0] | {"offset": jnp.zeros((2, 4))}


def _taken(layer, optimizer, updates):
    """Returns the layer after updates with gradients of 0."""
    params = {"blocks": {"attention": layer}}
    state = optimizer.init(params)
    for _ in range(updates):
        moved, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, moved)
    return params["blocks"]["attention"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_ramp_ends_where_a_fresh_model_starts(kind):
    config, start = _attention(kind), _start(_attention(kind))
    ramped = with_ramps(optax.sgd(0.1), config, TeachingConfig(STEPS, STEPS + 2))
    at_half, at_end, later = (_taken(start, ramped, n) for n in (STEPS // 2, STEPS + 2, STEPS + 9))
    np.testing.assert_allclose(at_half["offset"], -0.75 / 2, rtol=1e-6)
    np.testing.assert_allclose(at_end["offset"], -0.75, rtol=1e-6)
    fresh = {
        name: jnp.broadcast_to(one.init(None, one.shape, jnp.float32), (2, *one.shape))
        for name, one in bias_parameters(config).items()
    }
    for found in (at_end, later):
        for name, value in bias_arguments(found, config).items():
            expected = bias_arguments(fresh, config)[name]
            np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-7)
    third = dataclasses.replace(TeachingConfig(STEPS, STEPS), slope_share=1 / 3)
    third = _taken(start, with_ramps(optax.sgd(0.1), config, third), STEPS)
    for name, value in bias_arguments(third, config).items():
        expected = bias_arguments(fresh, config)[name] / 3
        np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-7)
    half = bias_arguments(_taken(start, ramped, (STEPS + 2) // 2), config)
    expected = np.broadcast_to(-initial_slopes(config) / 2, (2, 4))
    np.testing.assert_allclose(half["distance_bias"][..., 1], expected, rtol=2e-5, atol=1e-7)
    if "distance_slope" in half:
        np.testing.assert_allclose(half["distance_slope"], -expected, rtol=2e-5, atol=1e-7)


def test_a_ramp_comes_on_top_of_what_is_learned():
    config = _attention("decay")
    ramped = with_ramps(optax.sgd(0.1), config, TeachingConfig(offset_steps=STEPS))
    params = {"offset": jnp.zeros(4), "distance_log_slope": jnp.zeros(4)}
    state = ramped.init(params)
    moved, _ = ramped.update(jax.tree.map(jnp.ones_like, params), state, params)
    np.testing.assert_allclose(moved["offset"], -0.75 / STEPS - 0.1, rtol=1e-6)
    np.testing.assert_allclose(moved["distance_log_slope"], -0.1, rtol=1e-6)


def test_no_ramp_is_the_optimizer_itself():
    inner = optax.sgd(0.1)
    assert with_ramps(inner, _attention("decay"), TeachingConfig()) is inner
    assert with_ramps(inner, SOFTMAX, TeachingConfig(STEPS, STEPS)) is inner
    # A table of random entries has no slopes to go to.
    paper = dataclasses.replace(_attention("no tail"), bias_init="normal")
    assert list(lines(paper, TeachingConfig(STEPS, STEPS))) == ["offset"]


HUB = hub_folder.LLAMA | {
    **{"vocab_size": 280, "intermediate_size": 16, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "tie_word_embeddings": True},
}
WAYS = {
    "all": {},
    "distilled": {"teaching.distill": 0.5},
    "lora": {"teaching.frozen": True, "teaching.distill": 0.5, "model.lora_rank": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("safetensors")
    folder = tmp_path_factory.mktemp("hub")
    hub_folder.write(folder, HUB)
    return folder


def _experiment(text, folder, **changes):
    config = tiny.get_config(text)
    config.model.scale_embedding = False
    config.model.norm_eps = 1e-5
    config.model.attention.rope_base = 500.0
    config.optimizer.schedule = "constant"
    config.training.init_from = str(folder)
    config.training.checkpoint_every = 1
    config.teaching.offset_steps = config.teaching.bias_steps = 4
    config.update_from_flattened_dict(changes)
    return from_config_dict(config)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_run_resumes_bit_exactly_in_mid_ramp(text, cache, folder, tmp_path, way):
    given = shutil.copytree(folder, tmp_path / "hub")
    whole = _experiment(text, given, **{"training.steps": 6}, **WAYS[way])
    half = _experiment(text, given, **{"training.steps": 2}, **WAYS[way])
    assert tiny.train(whole, tmp_path / "whole", cache) == 0
    assert tiny.train(half, tmp_path / "half", cache) == 0
    shutil.rmtree(given)  # what is followed is in the checkpoint
    assert tiny.train(whole, tmp_path / "half", cache) == 0
    one, other = (_state(tmp_path / name, whole) for name in ("whole", "half"))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert (one.teacher is not None) == (way == "distilled")

    theirs = load_model(folder).params
    if way == "distilled":
        jax.tree.map(np.testing.assert_array_equal, one.teacher, theirs)
    found = load_trained(tmp_path / "whole")
    assert found.experiment.model.lora_rank == 0
    flat, before = (traverse_util.flatten_dict(x) for x in (found.params, theirs))
    np.testing.assert_allclose(flat["blocks", "attention", "offset"], -0.5, atol=0.1)
    assert not np.array_equal(flat["blocks", "mlp", "up"], before["blocks", "mlp", "up"])
    same = np.array_equal(flat["embedding",], before["embedding",])
    assert same == (way == "lora")
    # What the log says of a merged model is what the run said of it.
    rows = jnp.arange(16)[None] % 200
    params = {"params": one.params}
    expected = Transformer(whole.model).apply(params, rows)
    merged = Transformer(found.experiment.model).apply({"params": found.params}, rows)
    np.testing.assert_allclose(merged, expected, atol=1e-4)


def _state(workdir, experiment):
    mesh = make_mesh(experiment.mesh)
    factory = make_state_factory(experiment, mesh, make_run_optimizer(experiment))
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.restore(factory.abstract).state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training.init_from": None},
            "teaching.bias_steps is 4, but it must be 0, since .* fresh",
        ),
        (
            {"teaching.bias_steps": 0, "training.init_from": None},
            "offset_steps is 4, but it must be 0, since the weights of a fresh model have offsets",
        ),
        (
            {
                **{"training.init_from": None, "teaching.distill": 0.5},
                **{"teaching.bias_steps": 0, "teaching.offset_steps": 0},
            },
            "teaching.distill is 0.5, but it must be 0 unless the weights of --init_from are a sof",
        ),
        ({"model.attention.variant": "softmax"}, "offset_steps is 4, but it must be 0 while"),
        ({"model.attention.variant": "biased_softmax"}, "offset_steps is 4, .* 'biased_softmax'"),
        ({"model.lora_rank": 2}, "lora_rank is 2, but it must be 0 while teaching.frozen is False"),
        (
            {"teaching.frozen": True, "optimizer.name": "muon"},
            "optimizer.name is 'muon', but it must be 'adamw' while teaching.frozen is True",
        ),
        (
            {"teaching.slope_share": 0.5, "teaching.bias_steps": 0},
            "teaching.slope_share is 0.5, but it must be 1.0 while teaching.bias_steps is 0, sinc",
        ),
        ({"teaching.slope_share": 0.0}, "teaching.slope_share is 0.0, but it must be positive"),
        ({"teaching.distill": 2.0}, "teaching.distill is 2.0, but it must be from 0 to 1"),
        (
            {
                **{"model.attention.variant": "softmax", "teaching.frozen": True},
                **{"teaching.bias_steps": 0, "teaching.offset_steps": 0},
            },
            "teaching.frozen is True, but it must be False while .*nothing would be trained",
        ),
    ],
)
def test_what_can_not_be_taught_is_refused(text, folder, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        tiny.train(_experiment(text, folder, **changes), tmp_path / "new")
    assert not (tmp_path / "new").exists()
