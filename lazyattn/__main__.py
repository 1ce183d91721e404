"""`python -m lazyattn`: the command, for where its folder is not on the PATH."""

from lazyattn.main import run

if __name__ == "__main__":
    run()
