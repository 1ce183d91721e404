"""The repository's entry point: the command `lazyattn` (see `lazyattn/main.py`)."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C while JAX is imported ends the program, without a traceback; `run` takes over.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from lazyattn.main import run

if __name__ == "__main__":
    run()
