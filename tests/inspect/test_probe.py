import json

import jax
import numpy as np
import pytest

from lazyattn.experiment import from_config_dict
from lazyattn.inspect.probe import AttentionProbe
from lazyattn.inspect.statistics import attention_statistics, bias_spans
from lazyattn.model.config import AttentionConfig, ModelConfig
from lazyattn.model.heads import initial_slopes
from lazyattn.model.parameters import init_params
from lazyattn.sharding import MeshConfig, make_mesh
from tests.inspect.models import model, tokens, weights_of
from tests.training import tiny


def test_scalars_are_those_of_the_weights():
    config, params = model()
    rows = np.stack([tokens(150, 0), tokens(150, 1)])
    segments = np.asarray([[1] * 150, [1] * 100 + [0] * 50], np.int32)
    batch = {"inputs": rows, "segment_ids": segments}
    found = AttentionProbe(config, make_mesh(MeshConfig()), batch)(params)
    expected = attention_statistics(params, config, batch, max_rows=1)
    assert found["attention_zero_share"] == pytest.approx(expected.zero_share.mean(), rel=1e-5)
    assert found["attention_mass"] == pytest.approx(expected.mass.mean(), rel=1e-5)
    assert found["attention_first_token"] == pytest.approx(expected.first_token.mean(), rel=1e-5)
    # The second row has one whole sequence of 64 tokens, the first two.
    pieces = np.stack([rows[0, :64], rows[0, 64:128], rows[1, :64]])
    mean = weights_of(config, params, pieces)[..., 0].mean(-1)
    assert found["attention_sink"] == pytest.approx((mean > 0.3).mean())
    offsets = np.asarray(params["blocks"]["attention"]["offset"])
    assert found["attention_offset_median"] == pytest.approx(np.median(offsets), rel=1e-6)
    assert found["attention_offset_max"] == pytest.approx(offsets.max())
    assert 0 < found["attention_visited"] <= 1


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_spans_end_where_the_bias_is_far_down(scan):
    attention = AttentionConfig(num_heads=4, bias_width=5, global_share=0.25)
    config = ModelConfig(width=8, num_layers=2, scan_layers=scan, attention=attention)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    found = np.asarray(bias_spans(params, config, 100))
    slopes = initial_slopes(attention)
    expected = [100 if m * 100 <= 8 else int(8 / m) + 1 for m in slopes]
    assert found.tolist() == [expected] * 2


@pytest.mark.slow
def test_softmax_has_no_offsets():
    config, params = model("softmax")
    batch = {"inputs": tokens(16)[None], "segment_ids": np.ones((1, 16), np.int32)}
    found = AttentionProbe(config, make_mesh(MeshConfig()), batch)(params)
    names = ("first_token", "mass", "visited", "zero_share")
    assert sorted(found) == [f"attention_{name}" for name in names]
    assert found["attention_visited"] == 1
    assert found["attention_mass"] == pytest.approx(1)


@pytest.mark.slow
def test_a_run_logs_them(tmp_path, capsys):
    config = tiny.get_config(tiny.write_text(tmp_path / "text"))
    config.training.steps = 5
    config.training.inspect_every = 2
    config.model.attention.implementation = "xla"
    assert tiny.train(from_config_dict(config), tmp_path / "run", tmp_path / "cache") == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    measured = [line for line in map(json.loads, lines) if "attention_zero_share" in line]
    assert [line["step"] for line in measured] == [2, 4]
    assert 0 < measured[0]["attention_mass"] <= 1
    assert "attention: first_token" in capsys.readouterr().out
