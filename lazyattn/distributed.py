"""Several processes that train as one: how they find each other, and what they agree on.

JAX has `multihost_utils.reached_preemption_sync_point`: SIGTERM to one process ends all after the
same step. It doesn't do for us, and we turn its service off:

- It knows SIGTERM alone. Ctrl-C, and data that one process can't read, must stop all as well.
- Its handler takes the place of Python's or the other way round. With its own, a process doesn't
  know of SIGTERM before all do, and outside of training SIGTERM would end nothing.
- It says nothing of how many steps later all stop, which reading ahead must know.

What a process tells the others goes by JAX's client of the coordinator, which has no public name.
Rows of arrays go by `multihost_utils`.
"""

import contextlib
import itertools
import os
import re
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import jax
import numpy as np
from absl import flags
from jax._src import clusters, distributed
from jax.experimental import multihost_utils
from jaxtyping import Int32

from lazyattn.errors import InputError, bad_value, require
from lazyattn.patience import no_answer, waiting
from lazyattn.quantity import quantity

# For processes that are slower at what all do; one that is gone is noticed sooner.
_PATIENCE_MS = 3_600_000
# Seconds for all processes to come. JAX's own limit ends a process with a native stack trace.
_ALL_COME = 300
_LATER = 60
_times = itertools.count(1)


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags."""
    where: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string(
        "coordinator",
        None,
        "train, check, eval: of several processes, HOST:PORT of process 0, the same for all; auto"
        " finds it, and the other two flags, where Slurm, Open MPI, Kubernetes or a TPU pod tells;"
        " none: one process. Default: auto where Slurm, Open MPI or a TPU pod tells of several.",
        **where,
    )
    flags.DEFINE_integer(
        "process_id", None, "train, check, eval: this process's number, from 0.", **where
    )
    flags.DEFINE_integer("process_count", None, "train, check, eval: how many processes.", **where)


def _told_of_several() -> bool:
    """Returns whether the environment says that this is one of several processes.

    Kubernetes doesn't say so by itself: its interface would have to be asked.
    """
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    for cluster in (clusters.SlurmCluster, clusters.GkeTpuCluster, clusters.GceTpuCluster):
        if cluster.is_env_present():
            return cluster.get_process_count() > 1
    return False


def _devices_of_slurm() -> list[int] | None:
    """Returns which of the GPUs that Slurm shows are this task's; None: the one of its number.

    JAX takes that one always. But a task that is alone on its host has all, and one that Slurm
    has bound to its own GPUs sees no others.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not visible or not clusters.SlurmCluster.is_env_present():
        return None
    number = len(visible.split(","))
    alone = re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return list(range(number)) if alone or number == 1 else None


def initialize(values: flags.FlagValues = flags.FLAGS, *, automatic: bool = True) -> None:
    """Joins the other processes, if the flags or the environment say that there are some.

    Nothing may have asked JAX for devices before. Waits for all to come. SIGTERM does what it did.

    Args:
      values: where the flags are.
      automatic: whether the environment's word is enough.

    Raises:
      InputError: for flags that don't go together, or if the environment doesn't tell
        what they leave out.
    """
    coordinator, index, count = values.coordinator, values.process_id, values.process_count
    if coordinator in (None, "none"):
        for name, value in (("process_id", index), ("process_count", count)):
            if value is not None:
                raise InputError(
                    f"--{name} is {value}, but --coordinator, which it needs, is not given."
                )
        if coordinator == "none" or not (automatic and _told_of_several()):
            return
        coordinator = "auto"
    host, _, port = coordinator.rpartition(":")
    require(
        coordinator == "auto" or (bool(host) and port.isdecimal()),
        "--coordinator",
        coordinator,
        "HOST:PORT, auto or none",
    )
    require(count is None or count >= 1, "--process_count", count, "at least 1")
    require(
        index is None or (index >= 0 and (count is None or index < count)),
        "--process_id",
        index,
        "at least 0 and below --process_count" + ("" if count is None else f" = {count}"),
    )
    if index == 0 and coordinator != "auto":
        _check_free(coordinator, int(port))
    jax.config.update("jax_enable_preemption_service", False)
    address, devices = (None, _devices_of_slurm()) if coordinator == "auto" else (coordinator, None)
    seconds = _ALL_COME + _LATER
    try:
        with waiting(_who_is_missing, _ALL_COME, _end_alone):
            jax.distributed.initialize(
                address, count, index, devices, initialization_timeout=seconds
            )
    except ValueError as error:
        raise InputError(
            "--coordinator, --process_id and --process_count must all be given, since this"
            f" environment does not tell what is left out ({error})."
        ) from None


def _check_free(coordinator: str, port: int) -> None:
    """Checks that process 0 can listen there; JAX's own try may end it by a fault of memory.

    Raises:
      InputError: if it can't.
    """
    try:
        socket.create_server(("", port)).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise bad_value(
            *("--coordinator", coordinator, f"HOST:PORT where process 0 can listen ({why})")
        ) from None


def _who_is_missing() -> str:
    """Returns for whom this process waits while it joins the others."""
    state = distributed.global_state
    address = state.coordinator_address
    if address is None:
        return "what this environment tells of the other processes"
    others = state.num_processes - 1
    if state.process_id == 0:
        return f"{quantity(others, 'other process', 'other processes')} to come to {address}"
    host, _, port = address.rpartition(":")
    if why := no_answer(host.strip("[]"), int(port)):
        return f"process 0 at {address}, which does not answer process {state.process_id} ({why})"
    return f"all {others + 1} processes at {address}, which process {state.process_id} has reached"


def _end_alone(missing: str) -> None:
    """Ends this process, for which the others have not come."""
    text = (
        f"Gave up waiting for {missing}, after {_ALL_COME} s. A process that is missing is one"
        " that did not start, or can't reach process 0."
    )
    print(text, file=sys.stderr, flush=True)
    os._exit(1)


def joined() -> bool:
    """Returns whether JAX waits for other processes before this one ends."""
    return jax.distributed.is_initialized()


def client() -> Any:
    """Returns JAX's client of the coordinator; None: there is one process."""
    return distributed.global_state.client if jax.process_count() > 1 else None


def say(text: str, file: TextIO | None = None) -> None:
    """Prints on the first process."""
    if jax.process_index() == 0:
        print(text, file=file, flush=True)


@contextlib.contextmanager
def not_left_waiting(*agreed: type[Exception]) -> Iterator[None]:
    """Ends this process at once at an error that the other processes don't know of.

    If it cleaned up first, it would wait for them, in a save or in JAX's end, and they wait for it:
    for minutes, or for ever. They notice sooner that it is gone. A program of one process is left
    alone.

    Args:
      *agreed: errors that all processes have together, which go their way.
    """
    try:
        yield
    except agreed:
        raise
    except (Exception, KeyboardInterrupt):
        if not joined():
            raise
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


class StopAgreement:
    """Makes all processes stop after the same step, whoever of them is asked to.

    By way of the coordinator, not of devices: see `one_at_a_time`.

    Attributes:
      why: what a process gave as its reason, once all stop; "" if there was none.
    """

    _PREFIX = "lazyattn/stop/"
    # A process that has fetched the numbers of step n - 1 knows that all have begun it. So
    # whoever looks after step n + 2 began it after all looked after step n.
    STEPS_TO_SPREAD = 2

    def __init__(self) -> None:
        self._client = distributed.global_state.client if jax.process_count() > 1 else None
        self._asked = False
        self.why = ""

    def __call__(self, asked: bool, step: int, why: str = "") -> bool:
        """Returns whether to stop after this step; to be called after every one.

        Args:
          asked: whether this process should stop.
          step: that was dispatched last, the numbers of the one before having been
            fetched.
          why: for `why` of all processes.
        """
        if self._client is None:
            return asked
        if asked and not self._asked:
            self._asked = True
            key = f"{self._PREFIX}{jax.process_index()}"
            self._client.key_value_set(key, f"{step + self.STEPS_TO_SPREAD} {why}")
        found = [text.partition(" ") for _, text in self._client.key_value_dir_get(self._PREFIX)]
        if not any(step >= int(last) for last, _, _ in found):
            return False
        self.why = next((reason for _, _, reason in found if reason), "")
        return True


def tell_all(what: str, text: str) -> list[str]:
    """Returns what each process told, in order; each of them calls this.

    Args:
      what: they tell, a name of its own for every time.
      text: this process's.
    """
    if jax.process_count() == 1:
        return [text]
    client: Any = distributed.global_state.client
    prefix = f"lazyattn/told/{what}/"
    client.key_value_set(f"{prefix}{jax.process_index():08d}", text)

    def missing() -> str:
        """Returns who is waited for; one process alone says it."""
        here = {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(prefix)}
        absent = [n for n in range(jax.process_count()) if n not in here]
        if not absent or jax.process_index() > min(here):
            return ""
        few = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
        who = f"process {few}" if len(absent) == 1 else f"processes {few}"
        return f"{who}, behind process {jax.process_index()}"

    with waiting(missing):
        client.wait_at_barrier(f"{prefix}all", _PATIENCE_MS)
    return [found for _, found in sorted(client.key_value_dir_get(prefix))]


def together[T](what: str, call: Callable[[], T]) -> T:
    """Returns what `call` returns here, once it has returned on all processes.

    Each of them calls this. `call` itself must not wait for the others.

    Raises:
      InputError: on all of them, if it is raised on one.
    """
    found: list[T] = []
    problem = ""
    try:
        found.append(call())
    except InputError as error:
        problem = str(error)
    told = tell_all(f"{what} {next(_times)}", problem)
    process, text = next(((n, each) for n, each in enumerate(told) if each), (0, ""))
    if text:
        raise InputError(text if len(set(told)) == 1 else f"On process {process}: {text}")
    return found[0]


def one_at_a_time(arrays: Any) -> Any:
    """Returns `arrays`, waiting for them where another program had better not begin yet.

    On CPUs of several processes, two programs under way between the same devices take
    each other's messages: sums came out wrong, and programs waited for ever.
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        return jax.block_until_ready(arrays)
    return arrays


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
