"""Compiling for a machine that is not here."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.interpreters import ad, mlir

from lazyattn.call import Call
from lazyattn.errors import InputError, require
from lazyattn.identity import identity
from pallas_kernels import target

# What JAX calls a device of each generation, and its cores: Pallas wants to know.
_TPUS = {
    "v4": ("TPU v4", 1),
    "v5e": ("TPU v5 lite", 1),
    "v5p": ("TPU v5", 2),
    "v6e": ("TPU v6 lite", 1),
    "7x": ("TPU7x", 1),
}


def compile_for(name: str) -> AbstractContextManager[None]:
    """Makes `lazy_attention` choose for the named device what is traced inside.

    For ahead-of-time compilation and `jax.export` on a machine without that device:

        with lazyattn.compile_for("v5p"):
            exported = jax.export.export(jax.jit(step), platforms=["tpu"])(*shapes)

    JAX knows of it: what was traced for another target is traced again.

    Args:
      name: "v4", "v5e", "v5p", "v6e" or "7x" for a TPU, "sm80", "sm90" and the like for an
        NVIDIA GPU, "cpu". Kernels in Triton need JAX for such GPUs, "jax[cuda13]".

    Raises:
      InputError: for any other name.
    """
    known = isinstance(name, str) and target.parse(name) is not None
    require(known, "the target of compile_for", name, target.ALLOWED)
    return _compile_for(name)


@contextlib.contextmanager
def _compile_for(name: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(target.compile_for(name))
        if name in _TPUS and jax.sharding.get_abstract_mesh().empty:
            kind, cores = _TPUS[name]
            device = jax.sharding.AbstractDevice(kind, cores, "tpu")
            mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
        yield


def check_platform(call: Call) -> Call:
    """Returns a call that is refused where it is lowered for a platform it was not chosen for."""
    if target.named() is not None:
        return call
    query = _chosen_here.bind(call.query, name=target.platform())
    return dataclasses.replace(call, query=query)


_chosen_here = identity("chosen_here")
ad.deflinear2(_chosen_here, lambda cotangent, x, name: [cotangent])


def _lower(platform: str, context: Any, x: Any, *, name: str) -> list[Any]:
    if platform != name:
        raise InputError(
            f"lazy_attention was traced for the platform {name!r} and is lowered for"
            f" {platform!r}: trace it inside `with lazyattn.compile_for(...)`, e.g. for"
            f' {_EXAMPLES[platform]}, or name an implementation, "xla_chunked" for any platform.'
        )
    return [x]


_EXAMPLES = {"tpu": '"v5p"', "gpu": '"sm90"', "cpu": '"cpu"'}
for _name, _platform in (("cpu", "cpu"), ("tpu", "tpu"), ("cuda", "gpu"), ("rocm", "gpu")):
    mlir.register_lowering(_chosen_here, functools.partial(_lower, _platform), platform=_name)
