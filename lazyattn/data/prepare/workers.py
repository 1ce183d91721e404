"""Units spread over processes."""

import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from absl import logging

from lazyattn.data.prepare.readers import Unit
from lazyattn.data.prepare.selection import Selection
from lazyattn.data.prepare.unit import Progress, UnitResult, process_unit
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError

_POLL = 0.2  # seconds


def process_all(
    units: Sequence[Unit],
    work: Path,
    tokenizer: Path,
    selection: Selection,
    *,
    fatal: bool,
    num_workers: int,
    report: Callable[[Progress], Any],
) -> Iterator[UnitResult]:
    """Yields each unit's result as it is done, in any order.

    Args:
      units: what to do.
      work, selection, fatal, report: as for `process_unit`.
      tokenizer: its file, which every process reads.
      num_workers: processes; 1: none but this one.

    Raises:
      InputError: for a fault, if they are fatal, or if a process dies.
      OSError: if nothing can be written.
    """
    if num_workers == 1 or len(units) <= 1:
        loaded = Tokenizer.load(tokenizer)
        for unit in units:
            yield process_unit(unit, work, loaded, selection, fatal=fatal, report=report)
        return
    # Not forked: Arrow's and the tokenizer's threads would not survive it.
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    pool = ProcessPoolExecutor(
        min(num_workers, len(units)),
        mp_context=context,
        initializer=_begin,
        initargs=(work, tokenizer, selection, fatal, reports),
    )
    try:
        waiting: set[Future[UnitResult]] = {pool.submit(_process, unit) for unit in units}
        while waiting:
            finished, waiting = wait(waiting, timeout=_POLL, return_when=FIRST_COMPLETED)
            _drain(reports, report)
            for future in finished:
                yield future.result()
    except BrokenProcessPool as error:
        raise InputError(
            "A worker process of the preparation was killed (out of memory?); run the same command"
            " again to go on, with a smaller --num_workers if it was."
        ) from error
    finally:
        processes = list((pool._processes or {}).values())  # shutdown forgets them
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes if sys.exc_info()[0] is not None else []:
            process.terminate()  # what it was at will be done again
        reports.close()


def _drain(reports: Any, report: Callable[[Progress], Any]) -> None:
    report(Progress())  # shows that time goes on
    while True:
        try:
            report(reports.get_nowait())
        except queue.Empty:
            return


_worker: dict[str, Any] = {}


def _begin(work: Path, tokenizer: Path, selection: Selection, fatal: bool, reports: Any) -> None:
    """Sets up a worker process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for every core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    logging.set_verbosity(logging.ERROR)  # of the tokenizer, the parent has warned
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker.update(
        work=work,
        tokenizer=Tokenizer.load(tokenizer),
        selection=selection,
        fatal=fatal,
        report=reports.put,
    )


def _process(unit: Unit) -> UnitResult:
    return process_unit(unit, **_worker)


def _die_with_parent() -> None:
    """Ends this process when the one that started it is gone, even by kill -9."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
