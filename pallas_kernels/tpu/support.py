"""What these kernels can do, decided without compiling anything."""

import re

import jax

from pallas_kernels import target
from pallas_kernels.problem import Problem
from pallas_kernels.tpu import config

MAX_HEAD_DIM = 256


def generation() -> str | None:
    """Returns the generation of the TPU in use, of `target.TPU_GENERATIONS`; None: no such."""
    named = target.named()
    if named is not None:
        return named.generation
    device = jax.local_devices()[0]
    if device.platform != "tpu":
        return None
    return generation_of(device.device_kind)


def generation_of(device_kind: str) -> str | None:
    """Returns the generation that a device kind names, e.g. "TPU v5 lite"."""
    kind = device_kind.lower().replace("tpu", "").strip()
    match = re.match(r"v?(\d)\s*(lite|e|p|x)?", kind)
    if match is None:
        return None
    number, letter = match.groups()
    named = {"4": "v4", "5": "v5p", "6": "v6e", "7": "7x"}.get(number)
    if number == "5" and letter in ("lite", "e"):
        named = "v5e"
    if number == "4" and letter in ("lite", "i"):
        named = None
    return named


def unavailable() -> str | None:
    """Returns why there is no TPU to compile for, as the end of "... since ..."; None: there is."""
    if generation() is not None:
        return None
    if target.platform() == "tpu":
        return f"the TPU is {jax.local_devices()[0].device_kind!r}, older than v4 or unknown"
    return f"it needs a TPU and JAX runs on {target.platform()!r}"


def unsupported(problem: Problem, batch: int) -> str | None:
    """Returns why a call can't be done, as the end of "... since ..."; None: it can."""
    reason = unavailable()
    if reason is not None:
        return reason
    if problem.head_dim > MAX_HEAD_DIM:
        return f"head_dim is {problem.head_dim}, above {MAX_HEAD_DIM}"
    if problem.value_dim != problem.head_dim:
        return f"value_dim is {problem.value_dim} and head_dim {problem.head_dim}"
    if problem.dtype not in ("float32", "bfloat16"):
        return f"inputs are {problem.dtype}"
    tpu = generation()
    assert tpu is not None
    return config.refusal(
        tpu, batch, problem.heads, problem.length, problem.head_dim, problem.itemsize
    )
