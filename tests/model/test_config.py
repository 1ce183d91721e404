import dataclasses
import math

import pytest

from lazyattn.errors import InputError
from lazyattn.model.config import RECIPES, VARIANTS, AttentionConfig, ModelConfig


def test_the_default_is_the_sharp_recipe_of_the_lazy_variant():
    assert AttentionConfig(**RECIPES["sharp"]) == AttentionConfig()
    assert AttentionConfig().variant == "lazy"


def test_recipes_name_settings_that_exist():
    names = {field.name for field in dataclasses.fields(AttentionConfig)}
    for recipe in RECIPES.values():
        assert set(recipe) <= names
        AttentionConfig(**recipe)


def test_a_later_recipe_undoes_an_earlier_one():
    names = set(RECIPES["paper"])
    assert all(set(recipe) == names for recipe in RECIPES.values())


def test_what_a_variant_learns():
    without_bias = {name for name in VARIANTS if not AttentionConfig(variant=name).has_bias}
    without_offset = {name for name in VARIANTS if not AttentionConfig(variant=name).has_offset}
    assert without_bias == {"softmax", "lazy_no_bias"}
    assert without_offset == {"softmax", "biased_softmax"}


def test_derived_sizes():
    config = ModelConfig(width=1024, attention=AttentionConfig(num_heads=16))
    assert (config.head_dim, config.hidden_width) == (64, 2816)
    assert config.attention.kv_heads == 16
    attention = AttentionConfig(num_heads=6, num_kv_heads=3, head_dim=32)
    config = ModelConfig(width=100, mlp_width=7, attention=attention)
    assert (config.head_dim, config.hidden_width) == (32, 7)
    assert config.attention.kv_heads == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "sparse"}, "model.attention.variant is 'sparse', .* one of lazy, softmax"),
        ({"num_heads": 0}, "model.attention.num_heads is 0, .* at least 1"),
        ({"num_kv_heads": 5}, "model.attention.num_kv_heads is 5, .* a divisor of num_heads = 16"),
        ({"num_kv_heads": 0}, "model.attention.num_kv_heads is 0"),
        ({"rope_factor": 2.0}, "rope_factor is 2.0, .* left at 1.0 while .*rope_scaling is 'none'"),
        (
            {"rope_scaling": "llama3", "rope_low": 4.0},
            "rope_high is 4.0, but it must be above model.attention.rope_low = 4",
        ),
        ({"rope_base": 0.0}, "model.attention.rope_base is 0.0, .* positive"),
        ({"bias_width": 0}, "model.attention.bias_width is 0, .* at least 1"),
        ({"bias_kind": "line"}, "model.attention.bias_kind is 'line', .* decay or table"),
        (
            {"bias_init": "normal"},
            "bias_init is 'normal', .* left at 'alibi' while .*bias_kind is 'decay': it is a",
        ),
        ({"bias_std": 0.1}, "bias_std is 0.1, .* left at 0.02 while .* bias_kind 'table' alone"),
        ({"bias_tail": False}, "bias_tail is False, .* left at True while"),
        ({"global_share": -0.25}, "model.attention.global_share is -0.25, .* from 0 to 1"),
        ({"global_share": 1.5}, "model.attention.global_share is 1.5, .* from 0 to 1"),
        ({"global_share": math.nan}, "model.attention.global_share is nan, .* from 0 to 1"),
        ({"global_share": 0.1}, "global_share is 0.1, .* a whole number of the 16 heads"),
        (
            {"global_rope": False},
            "global_rope is False, but it must be True while model.attention.global_share is 0",
        ),
        (
            {"global_share": 0.125, "num_kv_heads": 4, "global_rope": False},
            "global_share is 0.125, .* a share of the 4 key/value heads while .*global_rope is Fal"
            ".* 2 global heads are no whole number of groups of 4",
        ),
        ({"slope_shards": 0}, "model.attention.slope_shards is 0, .* divisor of the 16 key/value"),
        (
            {"slope_shards": 8, "num_kv_heads": 4},
            "model.attention.slope_shards is 8, .* a divisor of the 4 key/value heads",
        ),
        ({"window": 0}, "model.attention.window is 0, .* at least 1"),
        (
            {"bias_init": "zeros", "bias_kind": "table"},
            "model.attention.bias_init is 'zeros', .* alibi or normal",
        ),
        (
            {"bias_std": -1.0, "bias_kind": "table"},
            "model.attention.bias_std is -1.0, .* non-negative",
        ),
        ({"offset_init": math.nan}, "model.attention.offset_init is nan, .* finite"),
        ({"skip_mass": 1.0}, "model.attention.skip_mass is 1.0, .* below 1"),
    ],
)
def test_bad_attention_settings(settings, message):
    with pytest.raises(InputError, match=message) as caught:
        AttentionConfig(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "positions"),
    [
        ({}, 8192),
        ({"loss_chunk": 100}, 100),
        ({"vocab_size": 128_000}, 2097),  # 1 GiB of logits
        ({"vocab_size": 2**30}, 1),
    ],
)
def test_positions_whose_logits_are_held(settings, positions):
    assert ModelConfig(**settings).loss_positions == positions


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 0}, "model.vocab_size is 0, .* at least 1"),
        ({"num_layers": 0}, "model.num_layers is 0, .* at least 1"),
        ({"loss_chunk": 0}, "model.loss_chunk is 0, .* at least 1"),
        ({"mlp_width": 0}, "model.mlp_width is 0, .* None or at least 1"),
        ({"norm_eps": 0.0}, "model.norm_eps is 0.0, .* positive"),
        ({"compute_dtype": "float16"}, "model.compute_dtype is 'float16', .* float32 or bfloat16"),
        ({"remat": "some"}, "model.remat is 'some', .* none, dots, attention, full or auto"),
        ({"width": 1000}, "model.width is 1000, .* a multiple of model.attention.num_heads = 16"),
        ({"width": 48}, "the head size .* is 3, .* even"),
        ({"attention": AttentionConfig(head_dim=0)}, "the head size .* is 0, .* even"),
    ],
)
def test_bad_model_settings(settings, message):
    with pytest.raises(InputError, match=message):
        ModelConfig(**settings)
