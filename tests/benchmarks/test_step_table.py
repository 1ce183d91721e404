"""Names of runs, and what the processes of one are asked and say."""

import json
import subprocess
import types

import pytest
from absl import flags

from benchmarks import step_table
from lazyattn.compile.hlo import Module
from lazyattn.errors import InputError


@pytest.mark.parametrize(
    ("name", "batch", "experiment_has"),
    [
        ("340m/lazy/none", 8, {"width": 1024, "scan_layers": False, "remat": "none"}),
        ("340m/jla_fp8/full/16384", 2, {"width": 1024, "remat": "full"}),
        ("46m/cudnn/dots/scan", 16, {"width": 512, "scan_layers": True, "remat": "dots"}),
        ("340m/lazy/none/fp8", 8, {"width": 1024, "scan_layers": False, "remat": "none"}),
        ("1300m/lazy/none/8192/scan/fp8", 2, {"width": 2048, "scan_layers": True}),
    ],
)
def test_names_of_runs(name, batch, experiment_has):
    run = step_table.parse(name)
    assert run.name == name and run.batch == batch
    experiment = step_table.experiment_of(run)
    assert experiment.data.batch_size == batch
    assert experiment.data.sequence_length == run.length
    assert experiment.training.quantization == ("fp8" if "/fp8" in name else "none")
    for key, value in experiment_has.items():
        assert getattr(experiment.model, key) == value


@pytest.mark.parametrize(
    "name", ["340m", "340m/lazy", "340m/linear/none", "1b/lazy/none", "scan", "340m/jla/none/fp8"]
)
def test_other_names_are_refused(name):
    with pytest.raises(InputError, match=f"^--runs has '{name}', but a run must be MODEL/"):
        step_table.parse(name)


def _options(folder, *arguments):
    values = flags.FlagValues()
    step_table.define(values)
    values(["program", f"--output={folder / 'lines.jsonl'}", "--commit=abc", *arguments])
    return values


@pytest.fixture
def started(monkeypatch):
    """Stands in for the processes; returns what they were asked."""
    asked = []

    def run(command, env, **_):
        assert "benchmarks.step_table" in command
        phase = next(word for word in command if word.startswith("--phase"))[8:]
        name = next(word for word in command if word.startswith("--runs"))[7:]
        asked.append((name, phase, env.get("XLA_FLAGS", ""), env.get("PYTHONPATH", "")))
        if "paper" in name:
            return types.SimpleNamespace(returncode=1, stdout="", stderr="a\nout of memory\n")
        found = {"compile_s": 20.0 if phase == "cold" else 3.0, "first_step_s": 30.0}
        if phase == "cold":
            found |= {"tokens_per_second": 1e5, "mfu": None, "gib": 30.0}
        return types.SimpleNamespace(returncode=0, stdout=f"x\n{json.dumps(found)}\n", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def _lines(folder):
    return [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]


def test_a_run_is_a_cold_process_and_a_warm_one(started, tmp_path, capsys):
    step_table._run(_options(tmp_path, "--runs=340m/lazy/none"))
    assert [phase for _, phase, *_ in started] == ["cold", "warm"]
    (line,) = _lines(tmp_path)
    assert line["compile_cold_s"] == 20 and line["compile_warm_s"] == 3
    for key in ("program", "attention", "length", "batch", "tokens_per_second", "gib", "commit"):
        assert key in line
    said = capsys.readouterr().out
    assert "100,000 tokens/s, 30.0 GiB; cold compiled in 20.0 s, first step after 30.0 s;" in said
    assert "; warm compiled in 3.0 s" in said
    step_table._run(_options(tmp_path, "--runs=340m/lazy/none,46m/lazy/none"))
    assert [name for name, phase, *_ in started[2:]] == ["46m/lazy/none"] * 2


def test_the_warm_process_can_be_left_out(started, tmp_path, capsys):
    step_table._run(_options(tmp_path, "--runs=340m/biased/none", "--nowarm"))
    assert [phase for _, phase, *_ in started] == ["cold"]
    assert "cold compiled" in capsys.readouterr().out
    (line,) = _lines(tmp_path)
    assert "error" not in line and "compile_warm_s" not in line


def test_what_fails_is_a_line_and_is_tried_again(started, tmp_path):
    for _ in range(2):
        step_table._run(_options(tmp_path, "--runs=340m/paper/none"))
    assert [line["error"] for line in _lines(tmp_path)] == ["cold: out of memory"] * 2


def test_no_run_begins_that_would_not_be_over(started, tmp_path, capsys):
    step_table._run(_options(tmp_path, "--runs=340m/lazy/none", "--deadline=60"))
    assert not started and "340m/lazy/none: not begun, 60 s are left" in capsys.readouterr().out


def test_parts_leave_graphs_out_and_the_peer_comes_from_its_folder(started, tmp_path):
    step_table._run(_options(tmp_path, "--runs=340m/lazy/none", "--parts"))
    assert started[0][2].endswith("--xla_gpu_enable_command_buffer=")
    step_table._run(_options(tmp_path, "--runs=340m/jla/none", f"--peer={tmp_path}"))
    assert started[2][3].endswith(str(tmp_path)) and "command_buffer" not in started[2][2]


def test_products_in_float8_are_counted_by_who_computes_them():
    text = """HloModule step

%gemm (a: f8e4m3fn[32,64], b: f8e5m2[64,16]) -> bf16[32,16] {
  %a = f8e4m3fn[32,64]{1,0} parameter(0)
  %b = f8e5m2[64,16]{1,0} parameter(1)
  ROOT %dot.1 = bf16[32,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f8e4m3fn[32,64], y: f8e5m2[64,16], z: bf16[64,16]) -> bf16[32,16] {
  %x = f8e4m3fn[32,64]{1,0} parameter(0)
  %y = f8e5m2[64,16]{1,0} parameter(1)
  %z = bf16[64,16]{1,0} parameter(2)
  %one = f32[] constant(1)
  %fusion = bf16[32,16]{1,0} fusion(%x, %y), kind=kCustom, calls=%gemm
  %other = bf16[32,16]{1,0} dot(%fusion, %z), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %cublas = (bf16[32,16]{1,0}, s8[64]{0}) custom-call(%x, %y, %one, %one), TARGET
}
""".replace("TARGET", 'custom_call_target="__cublas$lt$matmul$f8"')
    found = step_table.fp8_products(Module.parse(text))
    assert found == {"cublaslt": 1, "triton": 1}
