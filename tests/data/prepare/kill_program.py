"""Prepares a corpus in child processes that are killed at every stage, then goes on.

    python -m tests.data.prepare.kill_program CORPUS FOLDER

For each stage a folder of that name is left in FOLDER, prepared after the kill, and a
folder "whole" that was never killed. Children are forked before anything has begun a
thread, which is what makes a kill cost no start of Python.
"""

import os
import signal
import sys
from pathlib import Path

from lazyattn.data.manifest import Manifest
from lazyattn.data.prepare import assemble, inputs, run, unit, workspace
from lazyattn.data.prepare.selection import Selection
from lazyattn.data.shards import Writer


def _die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def _after(owner, name, times=1):
    """Kills the process when something has been called so often, and has returned."""
    call = getattr(owner, name)
    left = [times]

    def patched(*args, **kwargs):
        value = call(*args, **kwargs)
        left[0] -= 1
        if not left[0]:
            _die()
        return value

    setattr(owner, name, patched)


STAGES = {
    "planned": lambda: _after(workspace, "claim"),
    "tokenizer": lambda: _after(run, "_tokenizer"),
    "documents": lambda: _after(Writer, "add", 30),
    "first_shard": lambda: _after(Writer, "close"),
    "second_shard": lambda: _after(Writer, "close", 2),
    "first_unit": lambda: _after(unit, "write_whole"),
    "some_units": lambda: _after(unit, "write_whole", 4),
    "moved_one": lambda: _after(assemble.shards, "shard_name", 2),
    "moved_some": lambda: _after(assemble.shards, "shard_name", 4),
    "joined": lambda: _after(assemble.shards, "write_shard"),
    "named": lambda: _after(assemble, "name_shards"),
    "no_manifest": lambda: setattr(Manifest, "write", _die),
    "manifest": lambda: _after(Manifest, "write"),
}


def _prepare(corpus, folder):
    run.prepare_shards(
        run.Preparation(
            inputs=(corpus,),
            output=str(folder),
            tokenizer="train",
            vocab_size=300,
            selection=Selection(validation_fraction=0.2),
            num_workers=1,
        )
    )


def _child(action):
    """Runs something in a child process; returns its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main():
    inputs._SMALLEST = 5000  # bytes: many pieces of little text
    corpus, parent = sys.argv[1], Path(sys.argv[2])
    assert _child(lambda: _prepare(corpus, parent / "whole")) == 0
    for name, patch in STAGES.items():

        def killed(name=name, patch=patch):
            patch()
            _prepare(corpus, parent / name)

        assert _child(killed) == -signal.SIGKILL, name
        assert _child(lambda name=name: _prepare(corpus, parent / name)) == 0, name


if __name__ == "__main__":
    main()
