"""Which calls the Triton kernels take, what they say otherwise, and that they compile."""

import dataclasses
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import logging

from lazyattn import InputError, attention, lazy_attention
from pallas_kernels import target
from pallas_kernels.triton import blocks, config, support
from tests import oracle

ARGS = oracle.inputs(oracle.Case("small"))


def _refusal(capability, **changes):
    with target.compile_for(f"sm{capability}"), pytest.raises(InputError) as error:
        lazy_attention(**(ARGS | changes), implementation="triton")
    return str(error.value)


def test_asked_for_by_name_without_a_gpu():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match="it needs an NVIDIA GPU and JAX runs on 'cpu'"):
        lazy_attention(**ARGS, implementation="triton")


def test_what_is_refused_by_name():
    wide = {name: np.zeros((1, 8, 1, 300), np.float32) for name in ("query", "key", "value")}
    alone = {"distance_bias": None, "offset": None}
    assert "compute capability is 7.5" in _refusal(75)
    assert "head_dim is 300" in _refusal(90, **wide, **alone)
    assert "value_dim is 8" in _refusal(90, value=np.zeros((2, 40, 2, 8), np.float32))
    assert "renormalize is True" in _refusal(90, renormalize=True)
    assert "return_weights is True" in _refusal(90, return_weights=True)
    assert "query_start is given" in _refusal(90, query_start=np.zeros(2, np.int32))
    with jax.enable_x64(True):
        exact = {name: np.asarray(ARGS[name], np.float64) for name in ("query", "key", "value")}
        assert "inputs are float64" in _refusal(90, **exact)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: None)
    assert "package 'triton' is not installed" in _refusal(90)


def _chosen(monkeypatch, capability, **changes):
    """Returns what a call without a name is done by, on a machine with a GPU."""
    calls = []

    def choose(call, name=None):
        calls.append(call)
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(attention, "choose", choose)
        with pytest.raises(InterruptedError):
            lazy_attention(**(ARGS | changes))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with target.compile_for(f"sm{capability}"):
        return attention.choose(calls[0]).name


def test_default_on_a_gpu(monkeypatch):
    assert _chosen(monkeypatch, 80) == "triton"


def test_falls_back_and_says_why_once(monkeypatch):
    attention._log_once.cache_clear()
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *args: lines.append(text % args))
    for _ in range(2):
        assert _chosen(monkeypatch, 90, renormalize=True) == "xla_chunked"
    said = [line for line in lines if "'triton'" in line]
    assert said == ["lazy_attention does not use 'triton', since renormalize is True."]


def test_table_has_every_gpu_dtype_and_head_size():
    for capability in (80, 86, 87, 89, 90, 100, 103, 120):
        for itemsize in (2, 4):
            for head_dim in (1, 32, 64, 80, 96, 128, 200, 256):
                found = config.blocks(capability, itemsize, head_dim)
                for field in dataclasses.fields(found):
                    block = getattr(found, field.name)
                    assert min(block.queries, block.keys) >= 16
    assert set(next(iter(blocks.BLOCKS.values()))) == {
        field.name for field in dataclasses.fields(config.Blocks)
    }


def _compile(*arguments):
    # In a process of its own: in this one, kernels may be interpreted.
    command = [sys.executable, "-m", "benchmarks.triton_static", *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        command, env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "kernel"),
    [(80, "inference"), pytest.param(90, "backward_dbias", marks=pytest.mark.slow)],
)
def test_compiles_without_spilling(capability, kernel):
    pytest.importorskip("triton")
    _compile(f"--capability={capability}", f"--only={kernel}")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--packed", "--group=4", "--nooffset", "--noslope")])
def test_planning_of_the_hopper_kernels_compiles(arguments):
    pytest.importorskip("jax_triton")
    _compile("--implementation=mosaic_gpu", "--length=4000", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("packed", ["packed", "nopacked"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("capability", [80, 90])
def test_all_kernels_compile_within_their_registers(capability, head_dim, packed):
    pytest.importorskip("triton")
    # Timed on an H100 rather than chosen by compiling: spilling a little was faster. How much
    # depends on Triton (96 bytes with 3.6, 8 with 3.9).
    spills = {(90, 128): 96, (80, 128): 36}.get((capability, head_dim), 0)
    _compile(
        f"--capability={capability}",
        f"--head_dim={head_dim}",
        f"--{packed}",
        f"--spills={spills}",
    )
