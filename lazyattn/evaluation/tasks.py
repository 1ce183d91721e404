"""Where `run_tasks` was: it is in `lazyattn.eval.tasks` now."""

from lazyattn.eval.tasks import run_tasks

__all__ = ["run_tasks"]
