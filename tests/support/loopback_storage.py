"""A storage host beside the loopback hub: takes blobs on another port of 127.0.0.1, as object stores of real hubs do.

with LoopbackHub() as hub, LoopbackStorage(hub) as storage:
    ...
    assert storage.requests
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.support.loopback_hub import LoopbackHub


class LoopbackStorage:
    """Puts what it is sent into the hub's store; `requests` has the headers of each, names in lower case.

    Args:
        hub: names this host to whoever uploads, for as long as this is open.
        needs_token: refuse who does not show the hub's token; else the address alone is the right to write.
    """

    def __init__(self, hub: LoopbackHub, needs_token: bool = False):
        self.hub, self.needs_token = hub, needs_token
        self.requests: list[Mapping[str, str]] = []

    def __enter__(self) -> LoopbackStorage:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.storage = self
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self.hub.storage = f"http://{self.host}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hub.storage = None
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    def do_PUT(self) -> None:
        storage: LoopbackStorage = self.server.storage
        headers = {name.lower(): value for name, value in self.headers.items()}
        storage.requests.append(headers)
        body = self.rfile.read(int(headers["content-length"]))
        status = 200
        if storage.needs_token and storage.hub.token not in headers.get("authorization", ""):
            status = 403
        elif hashlib.sha256(body).hexdigest() != self.path.rpartition("/")[2]:
            status = 400
        else:
            storage.hub.blobs.add(body)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.server.storage.requests.append({name.lower(): value for name, value in self.headers.items()})
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing: `LoopbackStorage.requests` is the log."""
