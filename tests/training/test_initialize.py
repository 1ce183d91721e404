"""Runs that start from the weights of another."""

import dataclasses
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn.checkpoint.load import load_trained
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError
from lazyattn.export.flags import ExportOptions
from lazyattn.export.main import export
from lazyattn.model.config import AttentionConfig
from lazyattn.model.distance_bias import bias_arguments, bias_parameters
from lazyattn.model.parameters import parameter_shapes
from lazyattn.pretrained.load import load_model
from lazyattn.training import beginning, initialize, main
from lazyattn.training.initialize import converted_bias
from tests.pretrained import hub_folder
from tests.training import tiny

KINDS = {
    "decay": {},
    "table": {"bias_kind": "table"},
    "no tail": {"bias_kind": "table", "bias_tail": False},
}


def _bias(layer, config, length=40):
    """Returns b(x) for every distance below `length`, as the op is defined."""
    found = bias_arguments(layer, config)
    table = np.asarray(found["distance_bias"])
    width = table.shape[-1]
    whole = np.zeros((*table.shape[:-1], length), np.float32)
    whole[..., :width] = table
    if "distance_slope" in found:
        slope = np.asarray(found["distance_slope"])[..., None]
        whole[..., width:] = table[..., -1:] - slope * np.arange(1, length - width + 1)
    return whole


@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize(
    ("kind", "to"),
    [
        (a, b)
        for a, b in itertools.product(KINDS, KINDS)
        if len({a, b} - {"no tail"}) != 1 or a == b
    ],
)
@pytest.mark.parametrize("width", [6, 17])
def test_a_bias_of_another_width_or_kind_is_the_same_function(kind, to, width, share):
    source = AttentionConfig(num_heads=4, bias_width=6, global_share=share, **KINDS[kind])
    target = AttentionConfig(num_heads=4, bias_width=width, global_share=share, **KINDS[to])
    rng = np.random.default_rng(0)
    layer = {
        name: jnp.asarray(rng.normal(size=(3, *one.shape)), jnp.float32)
        for name, one in bias_parameters(source).items()
    }
    if "distance_slope" in layer:
        layer["distance_slope"] = jnp.abs(layer["distance_slope"])
    found, falls = converted_bias(layer, source, target)
    assert falls
    shapes = {name: (3, *one.shape) for name, one in bias_parameters(target).items()}
    assert {name: leaf.shape for name, leaf in found.items()} == shapes
    exact = kind == to and (width == 6 or kind == "no tail")
    tolerance = 0 if exact else 1e-5
    np.testing.assert_allclose(
        _bias(found, target), _bias(layer, source), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_that_was_not_there_starts_as_none(kind):
    source = AttentionConfig(num_heads=4, variant="softmax")
    target = AttentionConfig(num_heads=4, bias_width=6, **KINDS[kind])
    layer = {"output": jnp.ones((3, 4, 2, 8))}
    found, falls = converted_bias(layer, source, target)
    assert falls
    shapes = {name: (3, *one.shape) for name, one in bias_parameters(target).items()}
    assert {name: leaf.shape for name, leaf in found.items()} == shapes
    # A decay's slope is never 0, but what it takes in a million tokens is lost in rounding.
    assert np.abs(_bias(found, target)).max() < (1e-11 if kind == "decay" else 1e-30)


def test_a_slope_that_rises_can_not_become_a_decay():
    source = AttentionConfig(num_heads=2, bias_width=3, bias_kind="table")
    layer = {"distance_bias": jnp.zeros((1, 2, 3)), "distance_slope": jnp.array([[1.0, -1e-3]])}
    assert not converted_bias(layer, source, AttentionConfig(num_heads=2, bias_width=3))[1]


@pytest.fixture(scope="module")
def source(text, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    experiment = tiny.experiment(text, training__steps=2, training__checkpoint_every=1)
    assert tiny.train(experiment, folder, cache) == 0
    return folder


@pytest.fixture
def first_state(monkeypatch, cache, tmp_path):
    """Returns the state with which a run would take its first step."""

    class CaughtError(Exception):
        pass

    caught = []

    def fit(_, state):
        caught.append(state)
        raise CaughtError

    monkeypatch.setattr(main, "fit", fit)

    def start(experiment):
        with pytest.raises(CaughtError):
            tiny.train(experiment, tmp_path / "new", cache)
        return caught.pop()

    return start


@pytest.mark.parametrize(
    "given",
    [
        "",
        "hub",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("checkpoints/1", "orbax")),
    ],
)
def test_a_run_starts_from_a_checkpoint_or_an_export(
    given, source, text, first_state, tmp_path, capsys
):
    folder, step = source / given, 1 if given == "checkpoints/1" else 2
    where = f"step {step} of {source}"
    if given in ("orbax", "hub"):
        pytest.importorskip("safetensors")
        options = ExportOptions(formats=(given,), output=str(tmp_path / given))
        folder = where = export(source, options=options)
    state = first_state(tiny.experiment(text, training__init_from=str(folder)))
    expected = load_trained(source, step=step).params
    jax.tree.map(np.testing.assert_array_equal, state.params, expected)
    assert int(state.step) == 0 and not np.any(state.opt_state[1].mu["embedding"])
    said = f"starting from the weights of {where}, with a fresh optimizer\n"
    assert said in capsys.readouterr().out


HUB = hub_folder.LLAMA | {
    **{"vocab_size": 280, "intermediate_size": 16, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "tie_word_embeddings": True},
}
AS_HUB = {
    "model__scale_embedding": False,
    "model__norm_eps": 1e-5,
    "model__attention__rope_base": 500.0,
}


@pytest.mark.parametrize(
    "attention",
    [
        pytest.param({"variant": "softmax"}, marks=pytest.mark.slow, id="softmax"),
        pytest.param({}, id="decay"),
        pytest.param(
            {"bias_kind": "table", "variant": "lazy_constant_offset"},
            marks=pytest.mark.slow,
            id="table",
        ),
    ],
)
def test_a_run_starts_as_the_model_of_a_hub(text, first_state, tmp_path, capsys, attention):
    pytest.importorskip("safetensors")
    from lazyattn.model.transformer import Transformer

    hub_folder.write(tmp_path / "hub", HUB)
    changes = {f"model__attention__{name}": value for name, value in attention.items()}
    lazy = attention.get("variant") != "softmax"
    ramp = {"teaching__offset_steps": 1000} if lazy else {}
    experiment = tiny.experiment(
        text, training__init_from=str(tmp_path / "hub"), **AS_HUB, **changes, **ramp
    )
    params = first_state(experiment).params
    said = "  it starts with no distance bias and offsets of 0, which is what they are\n"
    out = capsys.readouterr().out
    assert (said in out) == lazy
    assert ("  config.teaching.offset_steps is 1000, but training.steps " in out) == lazy
    assert "teaching.bias_steps" not in out
    assert "rope_base" not in out and "scale_embedding" not in out
    theirs, tokens = load_model(tmp_path / "hub"), jnp.arange(48)[None] % 200
    found = jax.jit(Transformer(experiment.model).apply)({"params": params}, tokens)
    expected = jax.jit(Transformer(theirs.config).apply)({"params": theirs.params}, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_another_model_than_the_hub_s_is_refused_before_it_is_read(text, tmp_path, monkeypatch):
    hub_folder.write(tmp_path / "hub", HUB, tensors={})
    for change, message in (
        ({"model__num_layers": 2}, r"blocks/.* is of shape \[1, .*there, but of shape \[2, "),
        ({"model__attention__qkv_bias": True}, "blocks/attention/key_bias is missing there"),
        ({"model__scale_embedding": True}, "scale_embedding is True, but it must be False, as"),
    ):
        experiment = tiny.experiment(
            text, training__init_from=str(tmp_path / "hub"), **(AS_HUB | change)
        )
        with pytest.raises(InputError, match=message):
            tiny.train(experiment, tmp_path / "new")


def test_a_longer_context_is_the_same_function(source, text, first_state, capsys):
    from lazyattn.model.transformer import Transformer

    wide = tiny.experiment(
        text,
        training__init_from=str(source),
        data__sequence_length=32,
        model__attention__bias_width=32,
        model__scan_layers=False,
    )
    params = first_state(wide).params
    assert "  config.model.attention.bias_width: 8 there, 32 here\n" in capsys.readouterr().out
    before = load_trained(source)
    tokens = jnp.arange(48)[None] % 200
    results = [
        jax.jit(Transformer(model).apply)({"params": values}, tokens)
        for model, values in ((before.experiment.model, before.params), (wide.model, params))
    ]
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-5)
    shapes = jax.tree.map(lambda x: x.shape, params)
    assert shapes == jax.tree.map(lambda x: x.shape, parameter_shapes(wide.model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__mlp_width": 32},
            r"blocks/mlp/down is of shape \[1, 16, 16\] there, but of shape \[1, 32, 16\] in this",
        ),
        ({"model__tie_embeddings": False}, "parameter unembedding is missing there, but of shape"),
        ({"model__attention__variant": "softmax"}, "blocks/attention/offset is of shape .* missin"),
        ({"model__attention__bias_width": 4}, "bias_width is 4, but it must be at least 8"),
        (
            {"model__attention__bias_kind": "table", "model__attention__bias_tail": False},
            "the distance bias there goes on past its table, .*attention.bias_tail=True",
        ),
        ({"model__attention__global_share": 0.5}, "global_share is 0.5, but it must be such"),
        ({"training__init_from": "/nowhere"}, "--init_from is '/nowhere', but it must be the fold"),
    ],
)
def test_weights_of_another_model_are_refused(
    source, text, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(beginning, "prepare", lambda *_: pytest.fail("too late"))
    experiment = tiny.experiment(text, **({"training__init_from": str(source)} | changes))
    with pytest.raises(InputError, match=message):
        tiny.train(experiment, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if weights are read."""
    for name in ("load_trained", "load_model"):
        monkeypatch.setattr(initialize, name, lambda *_: pytest.fail("too late"))


@pytest.mark.parametrize("kind", ["run", "hub"])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.usefixtures("no_weights")
def test_weights_of_another_tokenizer_are_not_read(
    source, text, cache, tmp_path, monkeypatch, kind, known
):
    changes = {"training__init_from": str(tmp_path / "from")}
    if kind == "run":
        shutil.copytree(source, tmp_path / "from")
    else:
        hub_folder.write(tmp_path / "from", HUB, tensors={})
        changes |= AS_HUB
    Tokenizer.train(["quite another text"], 262).save(tmp_path / "from" / "tokenizer.json")
    if known:  # before any data is prepared
        changes["data__tokenizer"] = str(source / "tokenizer.json")
        monkeypatch.setattr(beginning, "prepare", lambda *_: pytest.fail("too late"))
    with pytest.raises(InputError, match="--init_from has another tokenizer than this run's data"):
        tiny.train(tiny.experiment(text, **changes), tmp_path / "new", cache)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["path", "source", "tokenizer"])
@pytest.mark.usefixtures("no_weights")
def test_data_that_is_missing_is_said_before_weights_are_read(source, text, cache, tmp_path, name):
    changes = {"training__init_from": str(source), f"data__{name}": str(tmp_path / "none")}
    with pytest.raises(InputError, match=r"none' (cannot be read|must be)|is .*none', but"):
        tiny.train(tiny.experiment(text, **changes), tmp_path / "new", cache)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_resumed_run_does_not_start_again(source, text, cache, tmp_path, capsys):
    from_ = shutil.copytree(source, tmp_path / "from")
    new, changes = tmp_path / "new", {"training__checkpoint_every": 1}
    first = tiny.experiment(text, training__steps=1, training__init_from=str(from_), **changes)
    assert tiny.train(first, new, cache) == 0
    shutil.rmtree(from_)
    assert "starting from the weights" in capsys.readouterr().out
    assert tiny.train(tiny.experiment(text, training__steps=2, **changes), new, cache) == 0
    out = capsys.readouterr().out
    assert "resuming after step 1" in out and "starting from" not in out and "init_from" not in out
    assert json.loads((new / "config.json").read_text())["training"]["init_from"] == str(from_)
    assert load_trained(new).experiment.training.init_from == str(from_)
    training = dataclasses.replace(first.training, steps=3, init_from=str(source))
    with pytest.raises(InputError, match=r"config.training.init_from is '.*source.*', but the ch"):
        tiny.train(dataclasses.replace(first, training=training), new, cache)
