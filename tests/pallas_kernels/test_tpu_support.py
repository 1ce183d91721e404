"""Which calls the TPU kernels take, what they say otherwise, and that they lower and compile."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cases, tpu_static
from lazyattn import InputError, attention, lazy_attention
from lazyattn.compile.libtpu import library
from pallas_kernels import target
from pallas_kernels.tpu import config, support
from pallas_kernels.visit import TileSizes
from tests import oracle
from tests.pallas_kernels.problems import problem

ARGS = oracle.inputs(oracle.Case("small"))


def _refusal(generation, **changes):
    with target.compile_for(generation), pytest.raises(InputError) as error:
        lazy_attention(**(ARGS | changes), implementation="tpu")
    return str(error.value)


def test_asked_for_by_name_without_a_tpu():
    if jax.default_backend() == "tpu":
        pytest.skip("there is a TPU")
    with pytest.raises(InputError, match="it needs a TPU and JAX runs on 'cpu'"):
        lazy_attention(**ARGS, implementation="tpu")


def test_what_is_refused_by_name():
    wide = {name: np.zeros((1, 8, 1, 300), np.float32) for name in ("query", "key", "value")}
    alone = {"distance_bias": None, "offset": None}
    assert "head_dim is 300" in _refusal("v5e", **wide, **alone)
    assert "value_dim is 8" in _refusal("v5e", value=np.zeros((2, 40, 2, 8), np.float32))
    assert "renormalize is True" in _refusal("v5e", renormalize=True)
    assert "return_weights is True" in _refusal("v5e", return_weights=True)
    assert "query_start is given" in _refusal("v5e", query_start=np.zeros(2, np.int32))
    halves = {name: ARGS[name].astype(np.float16) for name in ("query", "key", "value")}
    assert "inputs are float16" in _refusal("v5e", **halves)
    with jax.enable_x64(True):
        exact = {name: np.asarray(ARGS[name], np.float64) for name in ("query", "key", "value")}
        assert "inputs are float64" in _refusal("v5e", **exact)


def test_memory_is_checked_before_anything_is_compiled():
    def reason(shape, generation="v4", dtype="bfloat16"):
        with target.compile_for(generation):
            batch, length, heads, dim = shape
            sizes = dict(length=length, heads=heads, head_dim=dim, value_dim=dim, dtype=dtype)
            return support.unsupported(problem(**sizes), batch)

    assert reason((1, 32768, 16, 128)) is None
    assert "MiB of VMEM at length 524288" in reason((1, 524288, 16, 128))
    assert "bytes of scalar memory" in reason((256, 32768, 32, 128))


def test_generations_by_device_kind():
    kinds = {
        "TPU v4": "v4",
        "TPU v5 lite": "v5e",
        "TPU v5e": "v5e",
        "TPU v5": "v5p",
        "TPU v5p": "v5p",
        "TPU v6 lite": "v6e",
        "TPU v6e": "v6e",
        "TPU7x": "7x",
        "TPU v4 lite": None,
        "TPU v3": None,
        "cpu": None,
    }
    assert {kind: support.generation_of(kind) for kind in kinds} == kinds


@pytest.mark.parametrize("generation", target.TPU_GENERATIONS)
def test_table_has_every_head_size(generation):
    for itemsize in (2, 4):
        for head_dim in (1, 64, 80, 128, 192, 256):
            for length in (1, 130, 1000, 4096):
                block = config.block(generation, itemsize, head_dim, length)
                padded = -(-length // block.queries) * block.queries
                dim = config.padded_head_dim(head_dim)
                config.layout(generation, block, padded, dim, itemsize)


def test_is_the_default_on_a_tpu(monkeypatch):
    names = []

    def choose(call, name=None):
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        names.append(original(call, name).name)
        raise InterruptedError

    original = attention.choose
    monkeypatch.setattr(attention, "choose", choose)
    with target.compile_for("v5e"), pytest.raises(InterruptedError):
        lazy_attention(**ARGS)
    assert names == ["tpu"]


def test_lowers_under_scan_remat_and_vmap():
    """What interpreted kernels can't show, since they have effects."""

    def loss(args):
        def layer(x, _):
            out = lazy_attention(**(args | {"query": x}), implementation="tpu")
            return x + out, None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), args["query"], None, length=2)[0])

    arrays = {name: jnp.stack([x, x]) for name, x in ARGS.items()}
    with target.compile_for("v5e"):
        jax.eval_shape(jax.grad(lambda args: jnp.sum(jax.vmap(loss)(args))), arrays)


def _run(*arguments):
    if library() is None:
        pytest.skip("there is no libtpu: `make test-tpu` gets it")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-m", *arguments], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    return run.stdout


@pytest.mark.slow
def test_compiles_for_one_tpu():
    _run("benchmarks.tpu_static", "--compile", "--generations=v5e")


@pytest.mark.slow
@pytest.mark.parametrize("generation", target.TPU_GENERATIONS)
def test_compiles_for_every_tpu(generation):
    _run(
        "benchmarks.tpu_static",
        "--compile",
        f"--generations={generation}",
        "--lengths=4096,32768",
        "--head_dims=64,128",
    )


@pytest.mark.slow
def test_the_report_counts_tiles():
    """Tiles left of the diagonal's, of four query tiles of two key tiles each."""
    found = tpu_static.counts("dense", cases.Shape(1, 1, 1024, 64, 1), TileSizes(256, 128))
    np.testing.assert_array_equal(found.visited, [[0, 2, 4, 6]])
    np.testing.assert_array_equal(found.live, found.visited)


@pytest.mark.slow
def test_inner_loops_do_not_spill():
    """No bundle of any sweep stores or loads a spilled vector, at the table's tiles."""
    report = _run("benchmarks.tpu_static", "--cases=", "--generations=v5p,v6e")
    spills = re.findall(r"lazy_.* (\d+) in \d+ bundles", report)
    assert spills == ["0"] * 12, report
