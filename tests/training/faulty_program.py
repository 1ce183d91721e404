"""train.py with something going wrong at a step of one process, as FAULT says.

    FAULT=what,step,process python -m tests.training.faulty_program [flags of train.py]

kill: SIGKILL while a checkpoint is half written: all arrays are there, its name is not.
full: no space is left on the device when this process has a checkpoint to write.
raise: this process has an error, after this step, that nobody has thought of.
nan: the loss of this process's rows is NaN at this step and the one after.
"""

import errno
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

# Rows of this segment have a loss that is NaN.
POISON = 1 << 20


def _in_a_save(step, do):
    """Does something in Orbax's thread, between the arrays' end and the new name."""
    from lazyattn.checkpoint.save_agreement import SaveAgreement

    waits = SaveAgreement.__call__

    def faulty_waits(agreement, *, key, timeout_ms):
        if "async_write_complete" in key and f".{step}" in key.partition("complete")[2]:
            do()
        waits(agreement, key=key, timeout_ms=timeout_ms)

    SaveAgreement.__call__ = faulty_waits


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def stumble(step):
    from lazyattn.training.log import RunLog

    write = RunLog.write

    def stumbling(log, record):
        write(log, record)
        if record["step"] == step:
            raise RuntimeError("nobody has thought of this")

    RunLog.write = stumbling


def poison(step, here):
    """Marks rows of `here`, and makes the loss (on all processes) know the mark."""
    from lazyattn.training import beginning, remat

    make_loss_fn, train_iterator = remat.make_loss_fn, beginning.train_iterator

    def poisonable(*arguments, **settings):
        loss_fn = make_loss_fn(*arguments, **settings)

        def loss(params, batch, *rest):
            bad = jnp.where(jnp.any(batch["segment_ids"] == POISON), jnp.nan, 1.0)
            return jax.tree.map(lambda x: x * bad, loss_fn(params, batch, *rest))

        return loss

    def marked(*arguments, **settings):
        batches = train_iterator(*arguments, **settings)

        class Poisoned(type(batches)):
            def __next__(self):
                batch = super().__next__()
                if here and self.position()[0] in (step, step + 1):
                    batch = batch | {"segment_ids": np.full_like(batch["segment_ids"], POISON)}
                return batch

        batches.__class__ = Poisoned
        return batches

    remat.make_loss_fn, beginning.train_iterator = poisonable, marked


def main(argv):
    what, step, process = os.environ["FAULT"].split(",")
    here = process == next(
        (a.partition("=")[2] for a in sys.argv if a.startswith("--process_id")), "0"
    )
    if what == "nan":
        poison(int(step), here)
    elif here and what == "raise":
        stumble(int(step))
    elif here:
        _in_a_save(int(step), {"kill": kill, "full": full}[what])
    from lazyattn import main as train

    return train.main(argv)


if __name__ == "__main__":
    from lazyattn import main as train

    app.run(main, flags_parser=train._parse)
