"""A small HTTP server that misbehaves as told: what the client does with it is under test."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image


@dataclass
class Reply:
    """What the server sends: a status, a body (JSON unless bytes), headers, after a wait."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    wait: float = 0.0


def completion(text: str | None, **extra: Any) -> Reply:
    """A chat completion with that text."""
    message = {"role": "assistant", "content": text, **extra.pop("message", {})}
    choice = {"index": 0, "message": message, "finish_reason": "stop", **extra.pop("choice", {})}
    usage = {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}
    found = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "tiny-2026-01-01",
        "choices": [choice],
        "usage": usage,
    }
    return Reply({**found, **extra})


def error(status: int, message: str, code: str | None = None, **headers: str) -> Reply:
    """An error as OpenAI's servers send it."""
    return Reply({"error": {"message": message, "type": "x", "code": code}}, status, headers)


class FakeServer:
    """Answers each completion by ``reply(request number, request body)``; remembers what it was sent."""

    def __init__(self, reply: Callable[[int, dict[str, Any]], Reply], models: Reply | None = None) -> None:
        self.reply, self.models = reply, models or Reply({"object": "list", "data": []})
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.times: list[float] = []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self.url = ""

    def image(self, number: int) -> np.ndarray:
        """The image of a request."""
        url = self.requests[number]["messages"][0]["content"][0]["image_url"]["url"]
        assert url.startswith("data:image/png;base64,")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))

    def question(self, number: int) -> str:
        """The text of a request."""
        return str(self.requests[number]["messages"][0]["content"][1]["text"])

    def handle(self, body: dict[str, Any]) -> Reply:
        with self.lock:
            number = len(self.requests)
            self.requests.append(body)
            self.times.append(time.monotonic())
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
        try:
            found = self.reply(number, body)
            time.sleep(found.wait)
            return found
        finally:
            with self.lock:
                self.busy -= 1


@contextmanager
def serving(server: FakeServer) -> Iterator[FakeServer]:
    """The server on a free port of loopback for as long as the context is open."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send(server.models)

        def do_POST(self) -> None:
            server.keys.append(self.headers.get("Authorization", ""))
            content = self.rfile.read(int(self.headers["Content-Length"]))
            self.send(server.handle(json.loads(content)))

        def send(self, reply: Reply) -> None:
            raw = isinstance(reply.body, bytes)
            content = reply.body if raw else json.dumps(reply.body).encode()
            kind = {"Content-Type": "text/html" if raw else "application/json"}
            try:
                self.send_response(reply.status)
                for name, value in {**kind, **reply.headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass  # the client gave up

        def log_message(self, *args: Any) -> None:
            pass

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.daemon_threads = True
    server.url = f"http://127.0.0.1:{found.server_port}/v1"
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        found.shutdown()
        found.server_close()
        thread.join()
