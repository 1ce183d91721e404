"""A bucket of Google's on this machine: an emulator that can be told to fail.

    python -m tests.gcs_program PORT BUCKET FOLDER

What is told it by files in FOLDER, `tests.bucket_faults` says.

What the emulator lacks and TensorStore relies on is added: generations, and conditions on them.
"""

import re
import sys
from urllib.parse import parse_qs, unquote, urlparse

from gcp_storage_emulator import server

from tests.bucket_faults import RESET, Faults, break_off

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
    if status == RESET:
        break_off(handler.connection)
        handler.close_connection = True
        return
    handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    handler.send_response(status)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def main():
    port, bucket, fault = int(sys.argv[1]), sys.argv[2], Faults(sys.argv[3])
    handle, begin = server.Router.handle, server.Response.__init__

    def stricter(router, method):
        handler = router._request_handler
        name, handler.generation, query = _object(handler)
        if status := fault(method, name):
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
