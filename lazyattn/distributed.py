"""Several processes that train as one: how they find each other, and what they agree on."""

from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jaxtyping import Int32

from lazyattn.errors import InputError, require


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags."""
    where: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string(
        "coordinator",
        None,
        "several processes: HOST:PORT of process 0, the same for all; auto finds it, and the two"
        " flags below, where Slurm, Open MPI, Kubernetes or a TPU pod tells.",
        **where,
    )
    flags.DEFINE_integer("process_id", None, "several processes: this one, from 0.", **where)
    flags.DEFINE_integer("process_count", None, "several processes: how many.", **where)


def initialize(values: flags.FlagValues = flags.FLAGS) -> None:
    """Joins the other processes, if the flags say that there are some.

    Nothing may have asked JAX for devices before. Waits for all to come.

    Raises:
      InputError: for flags that don't go together, or if the environment doesn't tell
        what they leave out.
    """
    coordinator, index, count = values.coordinator, values.process_id, values.process_count
    if coordinator is None:
        for name, value in (("process_id", index), ("process_count", count)):
            if value is not None:
                raise InputError(
                    f"--{name} is {value}, but --coordinator, which it needs, is not given."
                )
        return
    host, _, port = coordinator.rpartition(":")
    require(
        coordinator == "auto" or (bool(host) and port.isdecimal()),
        "--coordinator",
        coordinator,
        "HOST:PORT or auto",
    )
    require(count is None or count >= 1, "--process_count", count, "at least 1")
    require(
        index is None or (index >= 0 and (count is None or index < count)),
        "--process_id",
        index,
        "at least 0 and below --process_count" + ("" if count is None else f" = {count}"),
    )
    try:
        jax.distributed.initialize(None if coordinator == "auto" else coordinator, count, index)
    except ValueError as error:
        raise InputError(
            "--coordinator, --process_id and --process_count must all be given, since this"
            f" environment does not tell what is left out ({error})."
        ) from None


class Agreement:
    """Whether some process said yes, known to all of them at the same step.

    Asked every step, it answers for the step before: so nobody waits, and all processes
    read the same answer at the same step.
    """

    def __init__(self) -> None:
        self._sent: Any = None
        if jax.process_count() == 1:
            return
        first: dict[int, Any] = {}
        for device in jax.devices():
            first.setdefault(device.process_index, device)
        devices = np.array([first[process] for process in sorted(first)])
        mesh = jax.sharding.Mesh(devices, ("process",))
        self._each = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("process"))
        self._any = jax.jit(
            lambda said: said.max(),
            out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
        )

    def __call__(self, said: bool) -> bool:
        """Returns what all said at the call before; with one process, `said`."""
        if jax.process_count() == 1:
            return said
        mine = np.array([said], np.int32)
        shape = (jax.process_count(),)
        sent = self._any(jax.make_array_from_callback(shape, self._each, lambda _: mine))
        before, self._sent = self._sent, sent
        return before is not None and bool(before.addressable_data(0))


def gather_rows(
    rows: Int32[np.ndarray, "rows columns"], shares: list[int]
) -> Int32[np.ndarray, "all_rows columns"]:
    """Returns rows of all processes, one after the other; each of them calls this.

    Args:
      rows: this process's, as many as every other's.
      shares: for each process which rows it has; of several with the same, one counts.
    """
    every = np.asarray(multihost_utils.process_allgather(rows)).reshape(-1, *rows.shape)
    first = {share: process for process, share in reversed(list(enumerate(shares)))}
    return np.concatenate([every[first[share]] for share in sorted(first)])


def wait_for_all(name: str) -> None:
    """Returns when every process has called this; `name` says what for."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
