"""An API server over HTTP: a FakeApi on a port of loopback, in this network namespace or another, and the kubeconfig that names it."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from fake_api import FakeApi

from clusterstate.sources.reflector import ApiError
from kernelstate.linux import netns

Check = Callable[[BaseHTTPRequestHandler], bool]


class Server:
    """A FakeApi behind HTTP, on a port of loopback that the kernel chose."""

    def __init__(self, check: Check = lambda _request: True, tls: ssl.SSLContext | None = None, space: str = "") -> None:
        """``space``: a network namespace, else this one."""
        self.api, self.headers = FakeApi(), list[dict[str, str]]()
        self.patches: list[tuple[str, bytes]] = []
        self.posts: list[tuple[str, dict[str, Any]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                outer.headers.append(dict(self.headers))
                if not check(self):
                    self.answer(401, {"kind": "Status", "message": "Unauthorized"})
                    return
                path, _, query = self.path.partition("?")
                parameters = dict(pair.split("=", 1) for pair in query.split("&") if pair)
                try:
                    if parameters.get("watch") == "true":
                        self.stream(path, parameters)
                    else:
                        self.answer(200, json.loads(outer.api.get(path, parameters)))
                except ApiError as error:
                    self.answer(error.status or 503, {"kind": "Status", "message": str(error)})

            def do_PATCH(self) -> None:
                outer.headers.append(dict(self.headers))
                outer.patches.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
                if check(self):
                    self.answer(200, outer.api.patch(self.path, outer.patches[-1][1]))
                else:
                    self.answer(403, {"kind": "Status", "message": "forbidden"})

            def do_POST(self) -> None:
                outer.posts.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
                self.answer(201, outer.posts[-1][1])

            def answer(self, status: int, body: Any) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def stream(self, path: str, parameters: dict[str, str]) -> None:
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for line in outer.api.lines(path, parameters):
                    half = len(line) // 2
                    for piece in (line[:half], line[half:] + b"\n"):  # lines and chunks have nothing to do with each other
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.close_connection = True  # in the middle of the answer: no last chunk

        with netns.inside(space) if space else nullcontext():
            self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        if tls is not None:
            self.http.socket = tls.wrap_socket(self.http.socket, server_side=True)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.http.server_port}"
        self._thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.api.away("the test is over")
        self.http.shutdown()
        self.http.server_close()


def kubeconfig(folder: Path, server: str, user: dict[str, Any], **cluster: str) -> Path:
    """Write a kubeconfig."""
    context = {"cluster": "c", "user": "u"}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "x",
        "clusters": [{"name": "c", "cluster": {"server": server, **cluster}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "x", "context": context}],
    }
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(content))
    return path
