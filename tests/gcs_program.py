"""A bucket of Google's on this machine: an emulator that can be told to fail.

    python -m tests.gcs_program PORT BUCKET FOLDER

Files in FOLDER tell it. `503` is how many requests are answered by one that is not 503; `401` and
`403`: all are answered that. `kill` has a process and the end of a name: whoever begins to write
such an object dies, and it is not written. FOLDER/answered counts what was answered so.

What the emulator lacks and TensorStore relies on is added: generations, and conditions on them.
"""

import itertools
import os
import re
import signal
import sys
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

from gcp_storage_emulator import server

_OBJECT = re.compile(r".*/b/(?P<bucket>[^/]+)/o(?:/(?P<name>[^/]+))?")


def _object(handler):
    """Returns name and generation of the object that a request is about; "0": there is none."""
    url = urlparse(handler.path)
    match, query = _OBJECT.fullmatch(url.path), parse_qs(url.query)
    if match is None:
        return "", None, query
    name = unquote(match["name"] or query.get("name", [""])[0])
    try:
        found = handler.storage.get_file_obj(match["bucket"], name)
        return name, str(found["generation"]), query
    except Exception:
        return name, "0", query


def _answer(handler, status):
    handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    handler.send_response(status)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def main():
    port, bucket, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    handle, begin, count = server.Router.handle, server.Response.__init__, itertools.count(1)

    def fault(method, name):
        for status in (401, 403):
            if (folder / str(status)).exists():
                return status
        if (folder / "503").exists() and next(count) % int((folder / "503").read_text()) == 0:
            return 503
        if (folder / "kill").exists() and method in (server.POST, server.PUT):
            process, end = (folder / "kill").read_text().split()
            if name.endswith(end):
                os.kill(int(process), signal.SIGKILL)
                return 500
        return None

    def stricter(router, method):
        handler = router._request_handler
        name, handler.generation, query = _object(handler)
        if status := fault(method, name):
            with (folder / "answered").open("a") as file:
                file.write(f"{status} {method} {name}\n")
            return _answer(handler, status)
        wanted = query.get("ifGenerationMatch", [handler.generation])[0]
        if handler.generation is not None and wanted != handler.generation:
            return _answer(handler, 412)
        if handler.generation in query.get("ifGenerationNotMatch", []) and method == server.GET:
            return _answer(handler, 404 if handler.generation == "0" else 304)
        handle(router, method)

    def with_generation(response, handler):
        begin(response, handler)
        if handler.generation not in (None, "0"):
            response["x-goog-generation"] = handler.generation

    server.Router.handle, server.Response.__init__ = stricter, with_generation
    server.create_server("127.0.0.1", port, in_memory=True, default_bucket=bucket).run()


if __name__ == "__main__":
    main()
