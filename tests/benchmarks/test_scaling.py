import json

import jax
import numpy as np
import pytest
from absl import flags

from benchmarks import scaling
from lazyattn import sharding
from lazyattn.errors import InputError

_TINY = (
    *("--rows=2", "--length=32", "--width=16", "--layers=1", "--heads=1", "--vocab=64"),
    *("--remat=none", "--steps=2", "--rounds=2"),
)


def _options(*arguments):
    values = flags.FlagValues()
    scaling.define(values)
    values(["program", *_TINY, *arguments])
    return values


@pytest.mark.slow
def test_a_line_a_measurement(tmp_path, monkeypatch):
    measured = []

    def measure(options, mesh, real=scaling.measure):
        if mesh.shape["tensor"] > 1:
            raise ValueError("no room\nat all")
        measured.append(real(options, mesh) if not measured else measured[0] | {"ms": 8.0})
        return measured[-1]

    monkeypatch.setattr(scaling, "measure", measure)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    monkeypatch.setattr(jax, "devices", lambda real=jax.devices: 2 * real()[:1])
    output = tmp_path / "new" / "lines.jsonl"
    assert scaling._run(_options("--axes=data,tensor", f"--output={output}")) == 1
    one, data, tensor = map(json.loads, output.read_text().splitlines())
    assert (one["devices"], data["devices"], data["axis"]) == (1, 2, "data")
    assert np.isfinite(one["loss"]) and one["least"] <= one["ms"] <= one["greatest"]
    assert one["tokens_per_second"] == pytest.approx(1e3 * 2 * 32 / one["ms"])
    assert data["tokens_per_second"] == pytest.approx(1e3 * 2 * 2 * 32 / 8.0)
    assert data["efficiency"] == pytest.approx(one["ms"] / 8.0)
    assert (tensor["axis"], tensor["error"]) == ("tensor", "ValueError: no room")
    assert "ms" not in tensor


def test_batch_of_packed_documents():
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.local_devices()[:1])
    batch = jax.device_get(scaling._batch(_options("--rows=3", "--length=64"), mesh))
    assert {array.shape for array in batch.values()} == {(3, 64)}
    ids, positions = batch["segment_ids"], batch["positions"]
    begins = np.diff(ids, axis=1, prepend=ids[:, :1] - 1) > 0
    np.testing.assert_array_equal(positions[begins], 0)
    assert (np.diff(positions, axis=1)[~begins[:, 1:]] == 1).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ("--axes=data,rows",),
            "--axes is 'rows', but it must be one of data, fsdp, tensor, sequence",
        ),
        (("--steps=0",), "--steps is 0, but it must be at least 1"),
        (("--remat=some",), "model.remat is 'some'"),
        (("--process_id=1",), "--process_id is 1, but --coordinator"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        scaling._run(_options(*arguments))
