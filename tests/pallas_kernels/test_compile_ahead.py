"""Kernels that are compiled before the program they are in."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import compile_ahead, target
from pallas_kernels.triton import call
from pallas_kernels.triton.config import Block


@pytest.fixture
def compiled(monkeypatch):
    """Yields the kernels' arguments that were compiled for."""
    found = []

    def compile_(kernel, arguments):
        found.append(arguments)
        kernel()

    monkeypatch.setattr(compile_ahead, "_begun", set())
    monkeypatch.setattr(compile_ahead, "_compile", compile_)
    monkeypatch.setattr(compile_ahead.os, "cpu_count", lambda: 8)
    # One thread, so that what is begun is done in order.
    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(compile_ahead, "_pool", lambda: pool)
        yield found


def _begin(key, kernel=lambda: None):
    compile_ahead.begin(key, kernel, [jnp.zeros((2, 3), jnp.bfloat16)], jax.devices()[0])
    compile_ahead._pool().submit(int).result()


def test_a_kernel_is_begun_once(compiled):
    for key in ("a", "b", "a"):
        _begin(key)
    assert len(compiled) == 2
    (shape,) = compiled[0]
    assert (shape.shape, shape.dtype) == ((2, 3), jnp.bfloat16)


def test_what_fails_ahead_is_left_to_the_program(compiled):
    def kernel():
        raise ValueError

    _begin("a", kernel)
    _begin("b")
    assert len(compiled) == 2


def test_a_single_core_has_other_work(compiled, monkeypatch):
    monkeypatch.setattr(compile_ahead.os, "cpu_count", lambda: 1)
    _begin("a")
    assert not compiled


def test_of_several_processes_none_begins(compiled, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    _begin("a")
    assert not compiled


def test_triton_kernels_are_begun_where_they_will_run(monkeypatch):
    begun = []
    monkeypatch.setattr(call.compile_ahead, "begin", lambda key, *_: begun.append(hash(key)))

    def kernel():
        pass

    def launch(rows, static):
        outputs = [jax.ShapeDtypeStruct((rows,), jnp.float32)]
        arrays = [jnp.zeros((rows, 4), jnp.bfloat16)]
        call._begin(kernel, arrays, outputs, (rows, 1), Block(64, 64, 4, 2), static)

    launch(2, "a")  # There is no GPU.
    assert not begun
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for rows, static in ((2, "a"), (2, "a"), (3, "a"), (2, "b")):
        launch(rows, static)
    assert begun[0] == begun[1] and len(set(begun)) == 3
    with target.compile_for("sm90"):
        launch(5, "c")
    assert len(begun) == 4
