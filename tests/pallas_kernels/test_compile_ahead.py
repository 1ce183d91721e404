"""Kernels that are compiled before the program they are in."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import compile_ahead


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
