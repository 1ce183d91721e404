"""The Hopper kernels without a GPU: that they lower for one, and what they compute in Pallas's
interpret mode; which calls they take, and what they say otherwise."""

import contextlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn import InputError, attention, lazy_attention
from pallas_kernels import target
from pallas_kernels.mosaic_gpu import config
from tests import oracle


@contextlib.contextmanager
def hopper():
    with target.compile_for("sm90"):
        yield


def _loss(args, **settings):
    out = lazy_attention(**args, **settings, implementation="mosaic_gpu")
    return jnp.sum(out.astype(jnp.float32) ** 2)


def _arrays(case, dtype="bfloat16"):
    args = oracle.inputs(case)
    for name in ("query", "key", "value"):
        args[name] = jnp.asarray(args[name], dtype)
    return args, {"segment_ids": args.pop("segment_ids")} if case.documents else {}


def _lower(function, *args):
    with hopper():
        traced = jax.jit(function).trace(*args)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


# That the usual case lowers, forward and backward, is in tests/test_compile_target.py.
@pytest.mark.slow
@pytest.mark.parametrize(
    "case, dtype, kernels",
    [
        (oracle.Case("lazy", (1, 300, 2, 1, 64), 100, "alibi", True), "bfloat16", 3),
        (oracle.Case("packed", (1, 300, 2, 1, 96), 0, documents=(70, 30)), "bfloat16", 3),
        # dK and dV have a kernel each, and so has the gradient of the table.
        (oracle.Case("widest", (1, 300, 2, 1, 256), 100, "alibi", True), "bfloat16", 5),
        (oracle.Case("softmax", (1, 300, 2, 2, 64), 100, tau=None), "bfloat16", 3),
        (oracle.Case("wide", (1, 300, 2, 1, 128), 100, "alibi", True), "float16", 3),
        # The gradient of a long table takes a kernel of its own.
        (oracle.Case("long_table", (1, 1700, 2, 1, 128), 1700, "alibi", True), "bfloat16", 4),
    ],
    ids=str,
)
def test_lowers_for_a_gpu(case, dtype, kernels):
    args, settings = _arrays(case, dtype)
    text = _lower(jax.grad(lambda args: _loss(args, **settings)), args)
    assert text.count("custom_call @mosaic_gpu_v2") == kernels


@pytest.mark.slow
@pytest.mark.parametrize("head_dim, kv_heads", [(128, 1), (64, 2), (96, 2), (256, 2)])
def test_widest_table_leaves_room_for_the_tiles(head_dim, kv_heads):
    width = config.widest_table(head_dim)
    case = oracle.Case("", (1, width, 2, kv_heads, head_dim), width, documents=(700, 90))
    args, settings = _arrays(case)
    _lower(lambda args: lazy_attention(**args, implementation="mosaic_gpu"), args)
    _lower(jax.grad(lambda args: _loss(args, **settings)), args)


def test_widest_tables_are_as_documented():
    widest = {head_dim: config.widest_table(head_dim) for head_dim in (64, 96, 128, 256)}
    assert widest == {64: 11520, 96: 9472, 128: 3328, 256: 2048}


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_tiles_fit_with_the_usual_table(head_dim):
    assert config.tunings(head_dim, 1024).backward_dbias is None
    assert config.tunings(head_dim, 2048).backward_dbias is not None
    assert config.padded_head_dim(head_dim) == config.padded_head_dim(head_dim - 1) == head_dim


@pytest.mark.slow
def test_lowers_under_vmap_scan_remat_and_shard_map():
    case = oracle.Case("", (2, 70, 2, 1, 64), 32, "alibi", True)
    args, _ = _arrays(case)
    shared = {name: args.pop(name) for name in ("distance_bias", "distance_slope", "offset")}

    def one(shared, row):
        return _loss({name: x[None] for name, x in row.items()} | shared)

    def by_vmap(shared, args):
        return jax.vmap(one, in_axes=(None, 0))(shared, args).sum()

    def by_scan(shared, args):
        def step(total, row):
            return total + jax.checkpoint(one)(shared, row), None

        return jax.lax.scan(step, 0.0, args)[0]

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("batch", "heads"))
    spec = jax.sharding.PartitionSpec
    specs = (
        {name: spec("heads") for name in shared},
        {name: spec("batch", None, "heads") for name in args},
    )

    def by_shard_map(shared, args):
        def run(shared, args):
            return jax.lax.psum(_loss(args | shared), ("batch", "heads"))

        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=spec())(shared, args)

    for form in (by_vmap, by_scan, by_shard_map):
        text = _lower(jax.grad(form, argnums=(0, 1)), shared, args)
        assert "mosaic_gpu_v2" in text, form.__name__


@pytest.mark.slow
def test_lowers_under_strict_settings_and_64_bits():
    case = oracle.Case("", (1, 300, 2, 1, 96), 100, "alibi", True, documents=(70, 30))
    args, settings = _arrays(case)
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.enable_x64(True),
    ):
        text = _lower(jax.grad(jax.jit(lambda args: _loss(args, **settings))), args)
    assert text.count("custom_call @mosaic_gpu_v2") == 3


def _refusal(capability, case, **changes):
    args, settings = _arrays(case)
    with target.compile_for(f"sm{capability}"), pytest.raises(InputError) as error:
        lazy_attention(**(args | settings | changes), implementation="mosaic_gpu")
    return str(error.value)


def test_what_is_refused_by_name():
    case = oracle.Case("", (1, 40, 2, 2, 64))
    assert "compute capability is 8.0, not 9.0" in _refusal(80, case)
    assert "compute capability is 10.0, not 9.0" in _refusal(100, case)
    assert "renormalize is True" in _refusal(90, case, renormalize=True)
    assert "head_dim is 264, above 256" in _refusal(90, oracle.Case("", (1, 40, 2, 2, 264)))
    exact = {name: oracle.inputs(case)[name] for name in ("query", "key", "value")}
    assert "inputs are float32" in _refusal(90, case, **exact)
    widest = config.widest_table(128)
    wide = oracle.Case("", (1, widest + 1, 2, 1, 128), widest + 1)
    assert f"distance_bias has width {widest + 1}, above {widest}" in _refusal(90, wide)


def test_asked_for_by_name_without_a_gpu():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    args, _ = _arrays(oracle.Case(""))
    with pytest.raises(InputError, match="it needs an NVIDIA Hopper GPU and JAX runs on 'cpu'"):
        lazy_attention(**args, implementation="mosaic_gpu")


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_softmax_keeps_what_a_loop_reads_in_memory(head_dim):
    tunings = config.tunings(head_dim, 1024, has_offset=False)
    assert not tunings.backward_dq.in_registers
    assert not tunings.backward_dkv.in_registers


def test_registers_are_only_traded():
    for warpgroups in (1, 2, 3):
        tuning = config.Tuning(warpgroups=warpgroups)
        threads = 128 * (warpgroups + 1)
        held = 128 * (warpgroups * tuning.registers + tuning.fetch_registers)
        at_start = tuning.registers_at_start
        assert threads * at_start <= 65536
        assert held <= threads * at_start
        assert tuning.fetch_registers <= at_start <= tuning.registers


# A process of its own: interpret mode wants a thread of XLA's a warpgroup, however few cores
# there are, and XLA counts them when it starts.
def _interpret(*names):
    command = [sys.executable, "-m", "tests.pallas_kernels.mosaic_gpu_interpreter", *names]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "16"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]


@pytest.mark.parametrize("name", ["sparse"])
def test_interpreted(name):
    _interpret(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "window",
        "packed",
        "softmax",
        "sharp",
        "positive",
        "gaps",
        "blind",
        "blind_gradients",
        "zero",
        "window_of_softmax",
        "window_in_documents",
        "widest",
        "bias_apart",
        "not_a_number",
        "dead",
        "same_bits",
    ],
)
def test_interpreted_cases(name):
    _interpret(name)


def test_default_on_a_hopper_gpu_where_it_is_tested(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    args, _ = _arrays(oracle.Case("", (1, 40, 2, 2, 64)))
    chosen = []
    choose = attention.choose

    def record(*call):
        chosen.append(choose(*call).name)
        return attention.IMPLEMENTATIONS["xla"]

    monkeypatch.setattr(attention, "choose", record)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("batch",))
    rows, whole = (jax.sharding.PartitionSpec(*axes) for axes in (("batch",), ()))
    specs = {name: rows if x.ndim == 4 else whole for name, x in args.items()}
    with hopper():
        for check in (False, True):
            jax.eval_shape(
                jax.shard_map(
                    lambda args: lazy_attention(**args),
                    mesh=mesh,
                    in_specs=(specs,),
                    out_specs=rows,
                    check_vma=check,
                ),
                args,
            )
        lazy_attention(
            **args | {name: np.float32(args[name]) for name in ("query", "key", "value")}
        )
    assert chosen == ["mosaic_gpu", "mosaic_gpu", "triton"]
