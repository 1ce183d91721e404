"""Every recipe builds, has the size its name says, and its step can be traced."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

from configs import ablations, fineweb_edu
from lazyattn.errors import InputError
from lazyattn.experiment import from_config_dict
from lazyattn.model.accounting import parameter_counts
from lazyattn.model.objective import make_loss_fn
from lazyattn.model.parameters import parameter_shapes
from lazyattn.recipes import ABLATIONS, RUNS, SIZES, TOKENS, recipe
from lazyattn.training.optimizer import make_optimizer
from lazyattn.training.step import accumulate_gradients

SIZED = {name: size for name, (size, _, _, length) in RUNS.items() if length == 4096}
BUILDERS = {name: fineweb_edu for name in RUNS} | {name: ablations for name in ABLATIONS}


def build(name, attention=""):
    return from_config_dict(BUILDERS[name].get_config(name + (attention and f"+{attention}")))


# Others are built below, and differ in numbers and in what the model's own tests trace.
@pytest.mark.parametrize(
    "name",
    [
        name if name == "lazy_340m_10b" else pytest.param(name, marks=pytest.mark.slow)
        for name in BUILDERS
    ],
)
def test_a_step_is_traced(name):
    experiment = build(name)
    data, training = experiment.data, experiment.training
    params = parameter_shapes(experiment.model)
    rows = jax.ShapeDtypeStruct((data.batch_size, data.sequence_length), jnp.int32)
    batch = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), rows)
    optimizer = make_optimizer(experiment.optimizer, training.steps)

    def step(params, batch):
        loss_fn = make_loss_fn(experiment.model, training.z_loss)
        means, gradients = accumulate_gradients(
            loss_fn, params, batch, microbatches=training.microbatches
        )
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        return means.nll, optax.apply_updates(params, updates)

    loss, updated = jax.eval_shape(step, params, batch)
    assert loss.shape == () and loss.dtype == jnp.float32
    assert jax.tree.map(lambda x: (x.shape, x.dtype), updated) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )


@pytest.mark.parametrize("name", BUILDERS)
def test_a_step_is_of_its_tokens(name):
    data, training = build(name).data, build(name).training
    assert data.batch_size * data.sequence_length in (2**19, 2**22)
    assert data.batch_size * data.sequence_length * training.steps in TOKENS.values()


@pytest.mark.parametrize(("name", "size"), SIZED.items())
def test_the_name_counts_parameters_with_the_vocabulary_once(name, size):
    model = build(name).model
    total = parameter_counts(parameter_shapes(model))["total"]
    counted = total - model.vocab_size * model.width
    assert counted == pytest.approx(SIZES[size].parameters, rel=0.02)


def test_twins_differ_in_attention_alone():
    for size, tokens in (("340m", "10b"), ("760m", "100b")):
        lazy, softmax, paper = (
            build(f"{kind}_{size}_{tokens}") for kind in ("lazy", "softmax", "paper")
        )
        for other in (softmax, paper):
            model = dataclasses.replace(other.model, attention=lazy.model.attention)
            assert dataclasses.replace(other, model=model) == lazy
        assert softmax.model.attention.variant == "softmax"
        attention = paper.model.attention
        assert lazy.model.attention.bias_kind == "decay" and attention.bias_kind == "table"
        assert (attention.bias_init, attention.bias_std) == ("normal", 0.02)
        assert (attention.bias_tail, attention.offset_init) == (False, -1.0)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_one_thing_of_any_recipe(name):
    for attention in ("paper", "sharp", "sharp_table"):
        whole = from_config_dict(recipe("340m", "10b", attention))
        ablated = build(name, attention)
        model = dataclasses.replace(ablated.model, attention=whole.model.attention)
        assert dataclasses.replace(ablated, model=model) == whole
        if attention == "paper":
            assert ablated.model.attention != whole.model.attention


def test_the_alibi_ablation_is_a_table_of_any_recipe():
    for attention in ("paper", "sharp"):
        found = build("alibi_bias", attention).model.attention
        assert (found.bias_kind, found.bias_init, found.bias_tail) == ("table", "alibi", True)


def test_unknown_names():
    with pytest.raises(InputError, match="the size is '1b', but it must be one of 340m, 760m"):
        recipe("1b", "10b", "paper")
    with pytest.raises(InputError, match="the number of tokens is '1b', but it must be one of 10b"):
        recipe("340m", "1b", "paper")
    with pytest.raises(InputError, match="the run is '7b', but it must be one of lazy_340m_10b"):
        fineweb_edu.get_config("7b")
    with pytest.raises(InputError, match="the ablation is 'rope', but it must be one of constant"):
        ablations.get_config("rope+sharp")
