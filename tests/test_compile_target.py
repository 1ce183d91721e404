"""Compiling and exporting for machines that are not here."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jaxlib import gpu_triton

import lazyattn
from lazyattn import InputError, lazy_attention
from lazyattn.compile import libtpu
from tests import compile_target_program as program
from tests import oracle


def _arguments(dtype="bfloat16"):
    args = oracle.inputs(oracle.Case("", (1, 256, 2, 1, 64), 64, "alibi", True))
    for name in ("query", "key", "value"):
        args[name] = jnp.asarray(args[name], dtype)
    return args


def _loss(args):
    return jnp.sum(lazy_attention(**args).astype(jnp.float32) ** 2)


# The kernels' names in the exported program; forward and backward.
@pytest.mark.parametrize(
    "target, platform, kernel, launches",
    [
        ("v5e", "tpu", "tpu_custom_call", 2),
        pytest.param("v6e", "tpu", "tpu_custom_call", 2, marks=pytest.mark.slow),
        # test_mosaic_gpu_lowering.py lowers the three kernels by default.
        pytest.param("sm90", "cuda", "mosaic_gpu_v2", 3, marks=pytest.mark.slow),
    ],
)
def test_export_takes_the_target_s_kernels(target, platform, kernel, launches):
    if jax.default_backend() != "cpu":
        pytest.skip("there is an accelerator")
    with lazyattn.compile_for(target):
        lowered = jax.jit(jax.grad(_loss)).trace(_arguments()).lower(lowering_platforms=(platform,))
        assert lowered.as_text().count(f"custom_call @{kernel}") == launches
        if platform == "tpu":
            exported = export.export(jax.jit(jax.grad(_loss)), platforms=[platform])(_arguments())
            assert exported.platforms == ("tpu",)


def test_a_context_leaves_no_trace():
    args = _arguments("float32")
    run = jax.jit(lambda args: lazy_attention(**args))
    before = run(args)
    with lazyattn.compile_for("v5p"):
        assert "tpu_custom_call" in run.trace(args).lower(lowering_platforms=("tpu",)).as_text()
        with lazyattn.compile_for("cpu"):
            np.testing.assert_array_equal(run(args), before)
    np.testing.assert_array_equal(run(args), before)


def test_a_gpu_without_jax_for_gpus_is_one_sentence(monkeypatch):
    """Triton's kernels are compiled while JAX lowers, by a part that JAX for CPUs lacks."""
    if not _has_triton():
        pytest.skip("Triton is not installed")
    monkeypatch.delattr(gpu_triton, "TritonKernel", raising=False)
    for function in (_loss, jax.grad(_loss)):
        with (
            lazyattn.compile_for("sm80"),
            pytest.raises(NotImplementedError, match=r'CPUs only: install "jax\[cuda13\]"\.'),
        ):
            jax.jit(function).trace(_arguments()).lower(lowering_platforms=("cuda",))


def _has_triton():
    return all(map(importlib.util.find_spec, ("triton", "jax_triton")))


def test_unknown_targets_are_refused():
    for name in ("v5", "h100", "", None):
        with pytest.raises(InputError, match=r"the target of compile_for is .* must be"):
            lazyattn.compile_for(name)


@pytest.mark.parametrize("platform, example", [("tpu", "v5p"), ("cuda", "sm90")])
def test_another_platform_is_not_given_the_plain_path_silently(platform, example):
    if jax.default_backend() != "cpu":
        pytest.skip("there is an accelerator")
    args = _arguments("float32")

    def mapped(args):
        return jax.vmap(lambda query: _loss(args | {"query": query}))(args["query"][None])

    for function in (_loss, jax.grad(_loss), mapped):
        traced = jax.jit(function).trace(args)
        with pytest.raises(InputError, match=rf'compile_for\(...\)`, e.g. for "{example}"'):
            traced.lower(lowering_platforms=(platform,))

    def plain(args):
        return jnp.sum(lazy_attention(**args, implementation="xla_chunked"))

    assert jax.jit(plain).trace(args).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize(
    "generation",
    ["v5p", *(pytest.param(name, marks=pytest.mark.slow) for name in ("v5e", "v6e"))],
)
def test_compiles_for_tpus_on_a_cpu(generation):
    if libtpu.library() is None:
        pytest.skip("no libtpu here: `make libtpu` gets it")
    done = subprocess.run(
        [sys.executable, "-m", program.__name__, generation],
        cwd=pathlib.Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["lazy_forward", "lazy_backward"]
