"""The repository's entry point: the command `lazyattn` (see `lazyattn/main.py`)."""

from lazyattn.main import run

if __name__ == "__main__":
    run()
