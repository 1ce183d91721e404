import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn import lazy_attention
from lazyattn.call import document_positions
from lazyattn.model import attention_layer, sharded_attention
from lazyattn.model.attention_layer import Attention, rope_scaling, variant_arguments
from lazyattn.model.config import VARIANTS, AttentionConfig
from lazyattn.model.distance_bias import NAMES, bias_arguments
from lazyattn.model.heads import global_heads, head_windows, initial_slopes
from lazyattn.model.layers import RMSNorm
from lazyattn.model.parameters import parameter_shapes
from lazyattn.model.transformer import attention_weights
from lazyattn.rotary import RopeScaling, rotate
from tests.model.tiny import make_batch, make_config, make_params

LENGTH = 9
POSITIONS = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, LENGTH, 16)), jnp.float32)


def _params(config):
    """Returns one layer's parameters."""
    return jax.tree.map(lambda leaf: leaf[0], make_params(config)["blocks"]["attention"])


@functools.partial(jax.jit, static_argnums=0)
def _apply(config, params, x=X, segment_ids=None):
    return Attention(config).apply({"params": params}, x, POSITIONS, segment_ids)


ALL = {"distance_bias", "distance_slope", "offset"}
ARGUMENTS = {
    "lazy": (ALL, {}),
    "softmax": (set(), {}),
    "biased_softmax": ({"distance_bias", "distance_slope"}, {}),
    "lazy_no_bias": ({"offset"}, {}),
    "lazy_constant_offset": (ALL, {"offset_divisor": 1.0}),
    "lazy_length_offset": (ALL, {"offset_divisor": float(LENGTH)}),
    "lazy_renormalized": (ALL, {"renormalize": True}),
}


# What a layer learns for the op's argument, by kind of bias.
LEARNED = {
    kind: {"distance_bias": table, "distance_slope": slope, "offset": "offset"}
    for kind, (table, slope) in NAMES.items()
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_these_arguments_of_the_op(variant, kind, monkeypatch):
    learned, settings = ARGUMENTS[variant]
    given = {}

    def op(query, key, value, **arguments):
        given.update(arguments)
        return query

    monkeypatch.setattr(sharded_attention, "lazy_attention", op)
    config = make_config(variant, attention={"skip_mass": 1e-3, "bias_kind": kind})
    params = _params(config)
    names = {LEARNED[kind][name] for name in learned}
    assert set(params) == {"query", "key", "value", "output"} | names
    jax.eval_shape(lambda p: Attention(config).apply({"params": p}, X, POSITIONS), params)
    assert {name for name in ALL if name in given} == learned
    for name in learned:
        assert given[name].shape == params[LEARNED[kind][name]].shape
        assert given[name].dtype == jnp.float32
    expected = {"offset_divisor": "visible", "renormalize": False, **settings}
    expected |= {"skip_mass": 1e-3, "implementation": "xla", "return_weights": False}
    assert {name: given[name] for name in expected} == expected


@pytest.mark.parametrize("rope", [True, False])
def test_scores_are_within_what_devices_that_share_rows_fetch_by(rope, monkeypatch):
    def bound(params=None, **attention):
        """Returns the bound given to the op on a mesh, and the largest score there is."""
        given = {}

        def op(query, key, value, arrays, **settings):
            norms = [jnp.linalg.norm(x, axis=-1).max() for x in (query, key)]
            given["largest"] = norms[0] * norms[1] / np.sqrt(query.shape[-1])
            given["bound"] = settings["bound"]
            return query

        monkeypatch.setattr(attention_layer, "sharded_attention", op)
        config = make_config(attention=attention | {"rope": rope})
        layer = Attention(config, sequence_shards=2)
        params = _params(config) if params is None else params
        layer.apply({"params": params}, X, POSITIONS)
        jax.eval_shape(layer.init, jax.random.key(0), X, POSITIONS)
        layer.apply({"params": params}, X, POSITIONS)
        return given

    found = bound(qk_norm=True)
    assert found["largest"] <= found["bound"].score
    params = _params(make_config(attention={"qk_norm": True}))
    for name in ("query_norm", "key_norm"):
        params[name]["scale"] = jnp.full_like(params[name]["scale"], -1.5)
    found = bound(params, qk_norm=True)
    assert 0.99 * found["bound"].score <= found["largest"] <= found["bound"].score
    heads = AttentionConfig(num_heads=4, num_kv_heads=2)
    np.testing.assert_array_equal(found["bound"].slopes, initial_slopes(heads))
    for attention in (
        {},
        {"qk_norm": True, "skip_mass": 0.0},
        {"qk_norm": True, "variant": "lazy_no_bias"},
        {"qk_norm": True, "bias_kind": "table", "bias_tail": False},
    ):
        assert bound(**attention)["bound"] is None


def test_the_layer_by_hand():
    config = make_config(attention={"rope": False, "bias_kind": "table"})
    params = _params(config)

    @jax.jit
    def expected(params):
        query, key, value = (
            jnp.einsum("blw,whd->blhd", X, params[name]) for name in ("query", "key", "value")
        )
        learned = {name: params[name] for name in ALL}
        out = lazy_attention(query, key, value, **learned, implementation="xla")
        return jnp.einsum("blhd,hdw->blw", out, params["output"])

    np.testing.assert_allclose(_apply(config, params), expected(params), rtol=1e-5, atol=1e-5)


def test_a_decay_is_the_table_it_comes_to():
    config = make_config()
    params = _params(config)
    slope = np.exp(params["distance_log_slope"])
    table = params["distance_delta"] - slope[:, None] * np.arange(6)
    rest = {name: params[name] for name in params if not name.startswith("distance_")}
    same = rest | {"distance_bias": table, "distance_slope": slope}
    expected = _apply(make_config(attention={"bias_kind": "table"}), same)
    np.testing.assert_allclose(_apply(config, params), expected, rtol=1e-5, atol=1e-5)


def test_a_gate_multiplies_each_entry_of_each_head():
    config = make_config(attention={"output_gate": True, "rope": False})
    params = _params(config)
    assert params["output_gate"].shape == params["query"].shape
    plain = {name: x for name, x in params.items() if name != "output_gate"}
    size = config.width  # heads times head size: an output projection that keeps each entry
    identity = jnp.eye(size).reshape(4, 4, size)
    heads = _apply(make_config(attention={"rope": False}), plain | {"output": identity})
    gate = 1 / (1 + np.exp(-np.einsum("blw,whd->blhd", X, params["output_gate"])))
    gated = heads * gate.reshape(heads.shape)
    expected = np.einsum("blm,mw->blw", gated, params["output"].reshape(size, -1))
    np.testing.assert_allclose(_apply(config, params), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_biases_of_projections_are_one_more_input(qk_norm):
    config = make_config(attention={"qkv_bias": True, "qk_norm": qk_norm})
    params = _params(config)
    names = [f"{name}_bias" for name in ("query", "key", "value")]
    assert [params[name].shape for name in names] == [(4, 4), (2, 4), (2, 4)]
    plain = {name: x for name, x in params.items() if name not in names}
    x = X.at[..., 0].set(1.0)
    for name in names:
        matrix = plain[name.removesuffix("_bias")]
        plain[name.removesuffix("_bias")] = matrix.at[0].add(params[name])
    expected = _apply(make_config(attention={"qk_norm": qk_norm}), plain, x)
    np.testing.assert_allclose(_apply(config, params, x), expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(_apply(config, params, x), _apply(config, _params(config), X))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_scaling_of_angles_reaches_queries_and_keys(qk_norm):
    attention = {"rope_scaling": "linear", "rope_factor": 3.0, "qk_norm": qk_norm}
    config, plain = make_config(attention=attention), make_config(attention={"qk_norm": qk_norm})
    params = _params(config)
    out = jax.jit(Attention(config).apply)({"params": params}, X, 3 * POSITIONS)
    np.testing.assert_allclose(out, _apply(plain, params), rtol=1e-4, atol=1e-5)
    assert not np.allclose(out, _apply(config, params))
    llama = {"rope_scaling": "llama3", "rope_factor": 2.0, "rope_length": 9, "rope_high": 8.0}
    assert rope_scaling(AttentionConfig(**llama)) == RopeScaling(2.0, 9, low=1.0, high=8.0)


def test_global_heads_may_go_without_rope():
    config = make_config("lazy_no_bias", attention={"global_share": 0.5, "global_rope": False})
    params = _params(config)
    everywhere = global_heads(config.attention)
    assert everywhere.sum() == 2
    # A head's part alone, through an output projection that has nothing of the others.
    for head, is_global in enumerate(everywhere):
        only = params | {"output": params["output"] * (np.arange(4) == head)[:, None, None]}
        plain = make_config("lazy_no_bias", attention={"rope": not is_global})
        np.testing.assert_allclose(_apply(config, only), _apply(plain, only), atol=1e-5)
        other = make_config("lazy_no_bias", attention={"rope": bool(is_global)})
        assert np.abs(_apply(config, only) - _apply(other, only)).max() > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"window": 3}, marks=pytest.mark.slow),
        pytest.param({"window": 3, "global_share": 1.0}, marks=pytest.mark.slow),
        pytest.param({"window": 1, "global_share": 0.25}, marks=pytest.mark.slow),
        {"window": 4, "global_share": 0.5, "num_kv_heads": 4},
        {"window": 3, "global_share": 0.75, "num_kv_heads": 4, "global_rope": False},
        pytest.param({"window": 40, "global_share": 0.5}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_local_heads_have_a_window_and_global_ones_do_not(settings):
    """Each head by a call of its own."""
    heads = {"num_heads": 8, "num_kv_heads": 8, "head_dim": 4}
    config = make_config(attention=heads | settings)
    params, att = _params(config), config.attention
    segment_ids = jnp.array([[1] * 3 + [2] * 6, [1] * 9])
    positions = document_positions(segment_ids)
    arguments = bias_arguments(params, att) | {"offset": params["offset"]}

    @jax.jit
    def expected(params):
        query, key, value = (
            jnp.einsum("blw,whd->blhd", X, params[name]) for name in ("query", "key", "value")
        )
        found = []
        for head, (window, far) in enumerate(
            zip(head_windows(att), global_heads(att), strict=True)
        ):
            group = head // (8 // att.kv_heads)
            q, k, v = query[:, :, [head]], key[:, :, [group]], value[:, :, [group]]
            if att.global_rope or not far:
                q, k = rotate(q, positions, 1e4), rotate(k, positions, 1e4)
            mine = {name: x[head : head + 1] for name, x in arguments.items()}
            mine |= {"segment_ids": segment_ids, "window": None if far else window}
            found.append(lazy_attention(q, k, v, **mine, implementation="xla"))
        return jnp.einsum("blhd,hdw->blw", jnp.concatenate(found, axis=2), params["output"])

    out = jax.jit(lambda p: Attention(config).apply({"params": p}, X, positions, segment_ids))
    np.testing.assert_allclose(out(params), expected(params), rtol=1e-5, atol=1e-5)


def test_without_a_tail_there_is_no_slope():
    params = _params(make_config(attention={"bias_kind": "table", "bias_tail": False}))
    assert "distance_slope" not in params and params["distance_bias"].shape == (4, 6)


def test_rope_is_applied_to_queries_and_keys():
    config = make_config()
    params = _params(config)
    plain = _apply(make_config(attention={"rope": False}), params)
    assert np.abs(plain - _apply(config, params)).max() > 1e-3


def test_qk_norm_makes_scores_independent_of_the_projections_scale():
    config = make_config("softmax", attention={"qk_norm": True})
    params = _params(config)
    assert params["query_norm"]["scale"].shape == params["key_norm"]["scale"].shape == (4,)
    loud = {**params, "query": 1000 * params["query"], "key": 1000 * params["key"]}
    np.testing.assert_allclose(_apply(config, loud), _apply(config, params), rtol=1e-3, atol=1e-4)
    scaled = {**params, "query_norm": {"scale": 2 * params["query_norm"]["scale"]}}
    assert np.abs(_apply(config, scaled) - _apply(config, params)).max() > 1e-3


def test_at_offset_minus_one_the_first_token_of_a_document_gets_exactly_nothing():
    config = make_config()
    params = _params(config)
    params["offset"] = jnp.full(4, -1.0)
    segment_ids = jnp.array([[1] * 4 + [2] * 5, [1] * 9])
    out = _apply(config, params, X, segment_ids)
    nothing = np.all(np.asarray(out) == 0, axis=-1)
    assert nothing[0, 0] and nothing[0, 4] and nothing[1, 0]
    assert not nothing[0, 1:4].all() and not nothing[1, 1:].all()


def test_length_divisor_is_the_number_of_keys():
    config = make_config("lazy_length_offset").attention
    assert variant_arguments(config, 640)["offset_divisor"] == 640.0


_weights = jax.jit(attention_weights, static_argnums=1)


@pytest.mark.parametrize("scan", [True, False])
def test_weights_of_every_layer(scan):
    config = make_config(scan_layers=scan, num_layers=3)
    batch = make_batch()
    shapes = parameter_shapes(config)
    found = jax.eval_shape(
        lambda params: attention_weights(params, config, batch["inputs"], batch["segment_ids"]),
        shapes,
    )
    assert found.shape == (3, 2, 4, 11, 11) and found.dtype == jnp.float32


def test_weights_are_those_that_gave_the_output():
    config = make_config(attention={"rope": False, "bias_kind": "table"})
    params, batch = make_params(config), make_batch()
    inputs, segment_ids = batch["inputs"], batch["segment_ids"]

    @jax.jit
    def first_layer():
        block = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
        x = params["embedding"][inputs] * config.width**0.5
        x = RMSNorm(config.norm_eps).apply({"params": block["attention_norm"]}, x)
        att = block["attention"]
        query, key, value = (
            jnp.einsum("blw,whd->blhd", x, att[name]) for name in ("query", "key", "value")
        )
        settings = {"implementation": "xla", "return_weights": True, "segment_ids": segment_ids}
        return lazy_attention(query, key, value, **{n: att[n] for n in ALL}, **settings)[1]

    found = jax.jit(attention_weights, static_argnums=1)(params, config, inputs, segment_ids)
    np.testing.assert_allclose(found[0], first_layer(), atol=1e-6)
    assert not np.allclose(found[0], found[1])
    ids = np.asarray(segment_ids)
    visible = np.tril(ids[:, :, None] == ids[:, None, :])[:, None]
    assert np.all(np.where(visible, 0, found) == 0)
    assert np.all(np.any(np.asarray(found) > 0, axis=(1, 3, 4)))
