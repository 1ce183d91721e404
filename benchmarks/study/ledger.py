"""Which runs are finished, and which another process of this machine has taken."""

import fcntl
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from lazyattn.errors import InputError

# An `error` that begins so would come again: such a run is not repeated.
FOR_GOOD = "non-finite"
_AHEAD = "ahead"


class Ledger:
    """A file of lines, one a finished run, and claims on runs that are under way."""

    def __init__(self, output: Path, claims: Path | None):
        """Reads nothing yet.

        Args:
          output: the file of lines; it need not exist.
          claims: folder of the claims, shared by processes of one machine; None: no others.
        """
        self._output, self._claims = output, claims
        output.parent.mkdir(parents=True, exist_ok=True)
        if claims is not None:
            claims.mkdir(parents=True, exist_ok=True)

    def lines(self) -> list[dict[str, Any]]:
        """Returns the lines so far.

        Raises:
          InputError: for a line that is no JSON object.
        """
        return read_lines(self._output) if self._output.exists() else []

    def finished(self) -> set[str]:
        """Returns the identities of the runs that need not be made any more."""
        done = set()
        for line in self.lines():
            if "error" not in line or str(line["error"]).startswith(FOR_GOOD):
                done.add(str(line.get("id")))
        return done

    def append(self, line: dict[str, Any]) -> None:
        """Writes a line whole, whoever else writes."""
        text = json.dumps(clean(line), allow_nan=False) + "\n"
        with self._output.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def claim(self, identity: str, *, ahead: bool = False, steal: bool = False) -> bool:
        """Takes a run for this process, unless another that still lives has it.

        Args:
          identity: of the run.
          ahead: it is only prepared for; another process that has nothing else may take it.
          steal: take it from one that only prepares for it.
        """
        if self._claims is None:
            return True
        with (self._claims / short_name(identity)).open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            owner, _, kind = file.read().partition(" ")
            taken = bool(owner) and int(owner) != os.getpid() and _lives(int(owner))
            if taken and not (steal and kind == _AHEAD):
                return False
            file.truncate(0)
            file.write(f"{os.getpid()} {_AHEAD if ahead else ''}")
        return True


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns a file's JSON lines.

    Raises:
      InputError: for a line that is no JSON object, naming it.
    """
    found = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            raise InputError(f"{path}, line {number}, is no JSON object.")
        found.append(line)
    return found


def clean(value: Any) -> Any:
    """Returns plain data fit for JSON: numbers that aren't finite become None."""
    if isinstance(value, dict):
        return {str(name): clean(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [clean(x) for x in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def short_name(identity: str) -> str:
    """Returns a file name for a run."""
    return f"{identity.split()[0]}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
