"""What is compiled for: the devices of this process, or others that it names.

Which kernel does a call, and how its tiles are laid out, depends on the device. A context says
which one it will be; JAX knows of it, so that nothing traced for one target serves another.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator

import jax

TPU_GENERATIONS = ("v4", "v5e", "v5p", "v6e", "7x")
ALLOWED = f'"sm80", "sm90" and the like, {", ".join(map(repr, TPU_GENERATIONS))} or "cpu"'


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device.

    Attributes:
      platform: as `jax.default_backend` calls it: "cpu", "gpu" or "tpu".
      capability: compute capability of an NVIDIA GPU, e.g. 90; else None.
      generation: of a TPU; else None.
    """

    platform: str
    capability: int | None = None
    generation: str | None = None


_named = jax.make_user_context(None)


def parse(name: str) -> Target | None:
    """Returns the target of that name, one of `ALLOWED`; None: there is none."""
    if name == "cpu":
        return Target("cpu")
    if name in TPU_GENERATIONS:
        return Target("tpu", generation=name)
    match = re.fullmatch(r"sm_?(\d{2,3})", name)
    return Target("gpu", capability=int(match.group(1))) if match else None


@contextlib.contextmanager
def compile_for(name: str) -> Iterator[None]:
    """Traces what is inside for the named target, which need not be here."""
    target = parse(name)
    assert target is not None, name
    with _named(target):
        yield


def named() -> Target | None:
    """Returns what a context names; None: the devices of this process."""
    return _named.value


def platform() -> str:
    """Returns the platform compiled for, as `jax.default_backend` calls it."""
    target = named()
    return jax.default_backend() if target is None else target.platform
