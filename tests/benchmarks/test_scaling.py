import json
import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags

from benchmarks import scaling
from benchmarks.step_profile import Event
from lazyattn import command_line, sharding
from lazyattn.errors import InputError

ROOT = pathlib.Path(__file__).parents[2]
TINY = ("--config=tests/training/tiny.py", "--lengths=32", "--tokens=64", "--steps=1", "--rounds=2")


def _options(*arguments):
    values = flags.FlagValues()
    argv = ["program", *TINY, *arguments]
    scaling.define(argv, values)
    command_line.parse(argv, values)
    return values


@pytest.mark.slow
def test_a_line_a_measurement(tmp_path):
    output = tmp_path / "new" / "lines.jsonl"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    command = [sys.executable, "-m", "benchmarks.scaling", *TINY, f"--output={output}"]
    command += ["--meshes=fsdp,sequence", "--scaling=weak,strong"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    found = {(line["attention"], line["mesh"], line["scaling"]): line for line in lines}
    assert [*found] == [
        ("lazy", None, None),
        *(("lazy", mesh, kind) for kind in scaling.SCALINGS for mesh in ("fsdp", "sequence")),
        ("cudnn", None, None),
        *(("cudnn", "fsdp", kind) for kind in scaling.SCALINGS),
    ]
    for line in lines:
        assert line["devices"] == (1 if line["mesh"] is None else 2)
        assert line["rows"] == (4 if line["scaling"] == "weak" else 2)
        assert 0 < line["least"] <= line["ms"] <= line["greatest"]
        rate = line["tokens_per_second"]
        assert rate == pytest.approx(1e3 * line["rows"] * 32 / line["ms"])
        if line["mesh"] is not None:
            one = found[line["attention"], None, None]["tokens_per_second"]
            assert line["efficiency"] == pytest.approx(rate / one / 2)
    # The same rows on any mesh.
    for attention, mesh, kind in found:
        same = ("lazy", "fsdp", "weak") if kind == "weak" else ("lazy", None, None)
        if attention == "lazy":
            assert found[attention, mesh, kind]["loss"] == pytest.approx(found[same]["loss"], 1e-5)


@pytest.mark.slow
def test_what_cannot_be_measured_leaves_the_others(monkeypatch, capsys):
    measured = iter([{"tokens_per_second": 100.0}, ValueError("no room\nat all")])

    def measure(*_):
        one = next(measured)
        if isinstance(one, Exception):
            raise one
        return one

    monkeypatch.setattr(scaling, "measure", measure)
    assert scaling._run(_options("--meshes=data", "--attentions=lazy", "--scaling=strong")) == 1
    one, data = map(json.loads, capsys.readouterr().out.splitlines())
    assert one["tokens_per_second"] == 100.0
    assert (data["mesh"], data["error"]) == ("data", "ValueError: no room")


def test_collectives_beside_other_kernels():
    def event(kernel, start, stop):
        return Event("", kernel, start * 1e6, stop * 1e6)

    events = [
        event("ncclDevKernel_AllGather_RING_LL", 0, 4),
        event("cutlass", 3, 9),
        event("lazy_forward", 5, 7),
        event("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", 8, 10),
    ]
    found = scaling.collectives(events, 2)
    assert found == pytest.approx({"busy_ms": 5.0, "collectives_ms": 3.0, "hidden": 2 / 6})
    assert scaling.collectives([], 2) == {}


@pytest.mark.parametrize(
    "text, sizes",
    [
        ("fsdp", {"data": 1, "fsdp": -1, "tensor": 1, "sequence": 1}),
        ("fsdp+tensor:2", {"data": 1, "fsdp": -1, "tensor": 2, "sequence": 1}),
    ],
)
def test_meshes(text, sizes):
    assert scaling.mesh_config(text) == sharding.MeshConfig(**sizes)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--meshes=data,rows",), "--meshes is 'rows', but it must be of data, fsdp, tensor"),
        (("--meshes=data+fsdp",), "a mesh with at most one size of -1"),
        (("--steps=0",), "--steps is 0, but it must be at least 1"),
        (("--tokens=31",), "--tokens is 31, but it must be at least 32"),
        (("--lengths=long",), "--lengths is 'long', but it must be at least 2"),
        (("--scaling=both",), "--scaling is 'both', but it must be one of weak, strong"),
        (("--config.model.remat=auto",), "model.remat is 'auto'"),
        (("--process_id=1",), "--process_id is 1, but --coordinator"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        scaling._run(_options(*arguments))
