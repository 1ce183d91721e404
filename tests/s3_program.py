"""A bucket of Amazon's on this machine: an emulator that can be told to fail.

    python -m tests.s3_program PORT FOLDER

What is told it by files in FOLDER, `tests.bucket_faults` says.
"""

import os
import sys
from http import HTTPStatus

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import run_simple

from tests.bucket_faults import RESET, Faults, break_off


def main():
    port, fault = int(sys.argv[1]), Faults(sys.argv[2])
    os.environ["MOTO_PORT"] = str(port)
    emulator = DomainDispatcherApplication(create_backend_app)

    def application(environ, start):
        answer = fault(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        if answer is None:
            return emulator(environ, start)
        if answer == RESET:
            break_off(environ["werkzeug.socket"])
            raise ConnectionResetError
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start(f"{answer} {HTTPStatus(answer).phrase}", [("Content-Length", "0")])
        return [b""]

    run_simple("127.0.0.1", port, application, threaded=True, request_handler=MotoRequestHandler)


if __name__ == "__main__":
    main()
