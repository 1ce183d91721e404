import dataclasses
import json

import pytest

from configs import base, quickstart
from lazyattn.data.config import DataConfig
from lazyattn.errors import InputError
from lazyattn.experiment import (
    ExperimentConfig,
    check_override,
    defaults,
    from_config_dict,
    model_from_dict,
    resumption_changes,
)
from lazyattn.experiment.training import OptimizerConfig, TrainingConfig
from lazyattn.model.config import RECIPES, VARIANTS, AttentionConfig, ModelConfig
from lazyattn.sharding import MeshConfig


def _changed(**groups):
    """Returns the default experiment with some settings changed, as plain data."""
    config = defaults()
    for key, value in groups.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    return from_config_dict(config)


def test_defaults_round_trip():
    assert from_config_dict(defaults()) == ExperimentConfig()
    plain = json.loads(json.dumps(ExperimentConfig().to_dict()))
    assert from_config_dict(plain) == ExperimentConfig()


def test_weighted_folders_survive_json():
    config = defaults()
    config.data.sources = (("a", 1.0), ("b", 0.5))
    experiment = from_config_dict(config)
    assert experiment.data.sources == (("a", 1.0), ("b", 0.5))
    plain = json.loads(json.dumps(experiment.to_dict()))
    assert from_config_dict(plain) == experiment
    assert resumption_changes(plain, experiment) == {}
    config.data.sources, config.data.path = (), "c"  # the data's fingerprint decides
    assert set(resumption_changes(plain, from_config_dict(config))) == {"data.sources", "data.path"}
    check_override("data.sources", "(('a', 1.0),)")
    with pytest.raises(InputError, match=r"config.data.sources is 'a', .* of type tuple"):
        check_override("data.sources", "a")


def test_a_saved_experiment_may_lack_newer_settings():
    plain = ExperimentConfig().to_dict()
    del plain["training"]["keep_every"], plain["mesh"]
    assert from_config_dict(plain) == ExperimentConfig()


def test_settings_from_before_a_bias_had_a_kind_mean_a_table():
    plain = ExperimentConfig().to_dict()
    new = ("bias_kind", "global_share", "global_rope", "window", "output_gate")
    for name in new:
        del plain["model"]["attention"][name]
    del plain["optimizer"]["log_slope_factor"]
    old = from_config_dict(plain)
    assert old.model.attention == AttentionConfig(**RECIPES["sharp_table"])
    assert model_from_dict(plain["model"]) == old.model
    # Such a run goes on as it was, and as nothing else.
    assert resumption_changes(plain, old) == {}
    with pytest.raises(InputError, match=r"bias_kind is 'decay', .* made with 'table'"):
        resumption_changes(plain, ExperimentConfig())
    # Where no bias is learned its kind says nothing, and the command of before goes on.
    for variant in ("softmax", "lazy_no_bias"):
        plain["model"]["attention"]["variant"] = variant
        now = _changed(model__attention__variant=variant)
        assert now.model.attention.bias_kind == "decay"
        assert resumption_changes(plain, now) == {}
        with pytest.raises(InputError, match=r"attention.variant is 'lazy', .* made with '"):
            resumption_changes(plain, ExperimentConfig())
    # What was not saved, but left out, is the default.
    assert from_config_dict({"model": {"attention": {"num_heads": 4}}}).model.attention == (
        AttentionConfig(num_heads=4)
    )


def test_unset_keys_know_their_type():
    config = defaults()
    config.model.attention.num_kv_heads = 4
    assert from_config_dict(config).model.attention.num_kv_heads == 4
    with pytest.raises(TypeError):
        config.model.attention.num_kv_heads = "four"


def test_an_integer_will_do_for_a_float():
    value = _changed(optimizer__learning_rate=1).optimizer.learning_rate
    assert value == 1.0 and isinstance(value, float)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        (
            {"trainig": {}},
            r"config.trainig is unknown \(did you mean training\?\); config has model",
        ),
        (
            {"optimizer": {"lr": 1.0}},
            r"config.optimizer.lr is unknown; config.optimizer has name, learn",
        ),
        ({"optimizer": 3}, r"config.optimizer is 3, but it must be a group of settings"),
        ({"training": {"steps": "many"}}, r"config.training.steps is 'many', .* of type int"),
        ({"training": {"steps": 1.5}}, r"config.training.steps is 1.5, .* of type int"),
        ({"training": {"steps": True}}, r"config.training.steps is True, .* of type int"),
        ({"data": {"tokenizer": 5}}, r"config.data.tokenizer is 5, .* of type str or None"),
    ],
)
def test_unknown_keys_and_wrong_types(plain, message):
    with pytest.raises(InputError, match=message):
        from_config_dict(plain)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        (
            "optimizer.lr",
            "1",
            r"config.optimizer.lr is unknown; config.optimizer has name, learning_rate",
        ),
        ("optimiser.b1", "1", r"config.optimiser is unknown \(did you mean optimizer\?\)"),
        ("training.steps", "many", r"config.training.steps is 'many', .* of type int"),
        ("training.steps", "1e3", r"config.training.steps is '1e3', .* of type int"),
        ("training.steps.more", "1", r"config.training.steps.more is unknown; .* is a value"),
        ("model.attention.rope", "maybe", r"config.model.attention.rope is 'maybe', .* type bool"),
        ("model.head_dim", "8", r"config.model.head_dim is unknown"),
        ("model.attention", "8", r"config.model.attention is a group of settings"),
        ("data.num_workers", "", r"config.data.num_workers is '', .* of type int"),
    ],
)
def test_bad_overrides(key, text, message):
    with pytest.raises(InputError, match=message) as caught:
        check_override(key, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("training.steps", "10"),
        ("optimizer.learning_rate", "1e-3"),
        ("optimizer.learning_rate", "1"),
        ("model.attention.rope", "false"),
        ("model.attention.num_kv_heads", "2"),
        ("model.attention.bias_init", "normal"),
        ("data.tokenizer", "some/path.json"),
    ],
)
def test_good_overrides(key, text):
    check_override(key, text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainingConfig(steps=0), "training.steps is 0, but it must be at least 1"),
        (lambda: TrainingConfig(keep_every=-1), "training.keep_every is -1"),
        (lambda: OptimizerConfig(log_slope_factor=-1.0), "optimizer.log_slope_factor is -1.0"),
        (lambda: OptimizerConfig(learning_rate=0.0), "optimizer.learning_rate is 0.0"),
        (lambda: OptimizerConfig(schedule="linear"), "optimizer.schedule is 'linear'"),
        (lambda: OptimizerConfig(b2=1.0), "optimizer.b2 is 1.0"),
        (lambda: OptimizerConfig(warmup_steps=-1), "optimizer.warmup_steps is -1"),
        (lambda: _changed(model__attention__head_dim=7), "the head size .* is 7, .* even"),
        (lambda: OptimizerConfig(decay_fraction=1.5), "optimizer.decay_fraction is 1.5"),
    ],
)
def test_values_out_of_range(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_the_batch_must_divide_into_microbatches():
    with pytest.raises(InputError, match=r"data.batch_size is 10, .* training.microbatches = 4"):
        ExperimentConfig(data=DataConfig(batch_size=10), training=TrainingConfig(microbatches=4))


def test_the_tokenizer_must_fit_the_model():
    model = ModelConfig(vocab_size=4000, attention=AttentionConfig())
    with pytest.raises(InputError, match=r"data.vocab_size is 4096, .* model.vocab_size = 4000"):
        ExperimentConfig(model=model)
    # A tokenizer from a file is checked when it is read.
    ExperimentConfig(model=model, data=DataConfig(tokenizer="tokenizer.json"))


def test_nothing_changed():
    assert resumption_changes(ExperimentConfig().to_dict(), ExperimentConfig()) == {}


def test_a_resumed_run_may_change_how_it_runs_and_how_long():
    now = dataclasses.replace(
        ExperimentConfig(),
        training=TrainingConfig(steps=7, log_every=2, microbatches=4),
        optimizer=OptimizerConfig(learning_rate=0.5),
        mesh=MeshConfig(data=1),
        data=DataConfig(num_workers=3),
        model=ModelConfig(remat="full", attention=AttentionConfig(implementation="xla")),
    )
    changes = resumption_changes(ExperimentConfig().to_dict(), now)
    assert changes["training.steps"] == (ExperimentConfig().training.steps, 7)
    assert changes["model.attention.implementation"] == (None, "xla")
    assert len(changes) == 8


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.width", 2048),
        ("model.attention.variant", "softmax"),
        ("model.attention.bias_kind", "table"),
        ("model.attention.global_share", 0.25),
        ("model.scan_layers", False),
        ("data.sequence_length", 128),
        ("data.shuffle_seed", 1),
        ("training.seed", 1),
    ],
)
def test_a_resumed_run_may_not_change_what_was_learned_or_what_comes_next(key, value):
    config = defaults()
    config.update_from_flattened_dict({key: value, "training.steps": 5})
    with pytest.raises(
        InputError, match=rf"config\.{key} is {value!r}, but the checkpoints .*made"
    ):
        resumption_changes(ExperimentConfig().to_dict(), from_config_dict(config))


@pytest.mark.parametrize("get_config", [base.get_config, quickstart.get_config])
def test_attention_by_name_changes_nothing_else(get_config):
    plain = from_config_dict(get_config())
    for name in [*RECIPES, *VARIANTS, "paper+lazy_no_bias"]:
        other = from_config_dict(get_config(name))
        assert (
            dataclasses.replace(
                other, model=dataclasses.replace(other.model, attention=plain.model.attention)
            )
            == plain
        )
    assert from_config_dict(get_config("sharp_norm")) == plain
    paper = from_config_dict(get_config("paper")).model.attention
    assert (paper.bias_init, paper.bias_tail, paper.offset_init) == ("normal", False, -1.0)
    assert from_config_dict(get_config("softmax")).model.attention.variant == "softmax"
    both = from_config_dict(get_config("paper+lazy_no_bias")).model.attention
    assert (both.offset_init, both.variant) == (-1.0, "lazy_no_bias")
    assert from_config_dict(get_config("paper+sharp_norm")) == plain


def test_an_unknown_attention_name():
    with pytest.raises(
        InputError,
        match=r"attention 'sharpp' .* one of paper, sharp, sharp_norm, sharp_table, lazy",
    ):
        quickstart.get_config("sharpp")
