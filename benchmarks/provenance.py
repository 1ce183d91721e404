"""When and by which command a file of results was made."""

import datetime
import os
import shlex
import sys
from collections.abc import Sequence

# Paths say nothing to a reader on another machine.
_PATHS = {
    **dict.fromkeys(("learned", "text", "spans"), "FILE"),
    **{"path": "FOLDER", "workdir": "RUN", "output": ""},
}


def made_by(program: str, argv: Sequence[str] | None = None) -> dict[str, str]:
    """Returns `date` and `command` of a run, to stand in the file that it writes.

    Args:
      program: the module, such as "benchmarks.attention".
      argv: its arguments; those of this process if None.
    """
    words = [f"python -m {program}"]
    if flags := os.environ.get("XLA_FLAGS"):
        words.insert(0, f"XLA_FLAGS={shlex.quote(flags)}")
    for word in sys.argv[1:] if argv is None else argv:
        name = word.lstrip("-").split("=")[0]
        instead = _PATHS.get(name)
        if instead == "":
            continue
        words.append(shlex.quote(word) if instead is None else f"--{name}={instead}")
    return {"date": datetime.date.today().isoformat(), "command": " ".join(words)}
