"""A web server on this machine with what a test puts into it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """Files by name. `asked` counts requests; `claimed` bytes more than there are is what the answer's length says.

    While `gate` is closed, an answer stops in its middle, and `halfway` tells so.
    """

    address: str
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    claimed: int = 0
    gate: threading.Event = field(default_factory=threading.Event)
    halfway: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def url(self, name: str) -> str:
        return f"{self.address}/{name}"


class Server(ThreadingHTTPServer):
    """Serves `served`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.served = Served(f"http://127.0.0.1:{self.server_port}")
        self.served.gate.set()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        served, name = self.server.served, self.path[1:]
        served.asked.append(name)
        if name not in served.files:
            self.send_error(404)
            return
        content = served.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) + served.claimed))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        served.halfway.release()
        served.gate.wait(30)
        self.wfile.write(content[len(content) // 2 :])

    def log_message(self, *args: object) -> None:
        pass
