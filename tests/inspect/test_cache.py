"""Bytes and spans of a cache, as the report has them."""

import types

import pytest

from lazyattn.generation import spans
from lazyattn.generation.cache import in_bytes
from lazyattn.inspect.cache import cache_data, cache_section, cache_table
from tests.model.tiny import make_config, make_params


def _data(label, **attention):
    config = make_config(attention=attention)
    experiment = types.SimpleNamespace(
        model=config, data=types.SimpleNamespace(sequence_length=512 if attention else 8192)
    )
    params = make_params(config)
    model = types.SimpleNamespace(experiment=experiment, params=params)
    return {"label": label, "cache": cache_data(model)}, config, params


def test_bytes_by_context():
    bounded, config, params = _data("bounded", qk_norm=True)
    free, _, _ = _data("free")
    own = bounded["cache"]
    assert own["contexts"] == [512, 4096, 16_384, 32_768, 131_072]
    for context, held, full in zip(
        own["contexts"], own["spans_bytes"], own["full_bytes"], strict=True
    ):
        assert held == spans.plan_cache(params, config, context).row_bytes
        # Two layers, two heads of four numbers of four bytes, twice; and a norm a page.
        assert full == pytest.approx(context * 2 * 2 * 4 * 4 * 2, rel=0.01)
    # Every head needs less than 512 keys.
    assert own["spans_bytes"][-1] == own["spans_bytes"][0] < own["full_bytes"][0]
    assert own["why"] is None
    assert free["cache"]["spans_bytes"] == free["cache"]["full_bytes"]

    table = cache_table([bounded, free])
    held = in_bytes(own["spans_bytes"][0])
    for context, share, rest in (
        (4096, own["spans_bytes"][1] / own["full_bytes"][1], "525 kB (100.0%)"),
        (512, own["spans_bytes"][0] / own["full_bytes"][0], "-"),
    ):
        (line,) = (line for line in table.splitlines() if f" {context:,} tokens" in line)
        assert line.split()[2:] == f"{held} ({share:.1%}) {rest}".split()
    assert "free: every head keeps all it sees, since the model has no qk_norm" in table
    page = cache_section([bounded, free])
    longest = max(span for layer in own["spans"] for span in layer)
    assert f"<td>{longest}</td><td>131,072</td>" in page and "no qk_norm" in page
