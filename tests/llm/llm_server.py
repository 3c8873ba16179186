"""A server on loopback that speaks OpenAI's chat protocol and can misbehave."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[[int, str], tuple[str, Any]]
"""What is done with a call, by its number and prompt: ``("answer", text)``, ``("status", 429)``, ``("raw", bytes)``,
``("cut", None)`` and ``("slow", (seconds, text))``."""


class Server(ThreadingHTTPServer):
    """Counts calls by prompt and by idempotency key."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour = behaviour
        self.lock = threading.Lock()
        self.calls = 0
        self.prompts: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        server = self.server
        with server.lock:
            number = server.calls
            server.calls += 1
            server.prompts[prompt] += 1
            server.headers.append(dict(self.headers))
        what, value = server.behaviour(number, prompt)
        if what == "slow":
            time.sleep(value[0])
            what, value = "answer", value[1]
        if what == "cut":
            self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"choi')
            self.wfile.flush()
            self.connection.close()
            return
        if what == "status":
            self.send_response(value)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if what == "answer":
            told = {
                "choices": [{"message": {"role": "assistant", "content": value}}],
                "usage": {"prompt_tokens": 10, "completion_tokens": 5},
            }
            value = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(value)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(value)

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving(behaviour: Behaviour) -> Iterator[Server]:
    """A context with a running server."""
    server = Server(behaviour)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
