"""The health check ports of Services: any number of listening sockets, one thread that answers on all of them.

    agent's thread    set(...)   opens and closes ports, replaces what is answered      never waits for a client
    its own thread    epoll      accepts, reads one request, answers, waits for the next never waits for the agent

A client that is slow has TIMEOUT seconds for each request, and of too many clients the one that waited longest goes: nobody
can hold the thread, nor all of its sockets. Any method and path is answered alike; what: ``proxy/health.py``. Sockets are made
in the network namespace of the thread that calls ``set``.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from email.utils import formatdate

from clusterstate.objects import ObjectRef
from clusterstate.snapshot import Name
from kernelstate.objects.address import Family
from proxy.health import HealthEndpoint, Places, answer

TIMEOUT = 10.0
"""Seconds within which a request is complete, counted from the connection or from the answer before."""
CLIENTS = 512
"""Connections at a time."""
REQUEST = 8192
"""Bytes of a request's head, at most."""
SPARE_DESCRIPTORS = 256 + CLIENTS

_Key = tuple[Name, Family, str, int]
"""(Service, family, address, port)."""


class HealthServers:
    """Keeps the health check ports open. ``healthy`` is asked at each request, from the thread that answers."""

    def __init__(self, healthy: Callable[[], bool]) -> None:
        self._healthy = healthy
        self._endpoints: dict[tuple[Name, Family], HealthEndpoint] = {}
        self._keys: dict[int, _Key] = {}
        self._listeners: dict[_Key, socket.socket] = {}
        self._failed: dict[_Key, str] = {}
        self._asked: object = None
        self._poller = select.epoll()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller.register(self._stop, select.EPOLLIN)
        self._clients: OrderedDict[int, _Client] = OrderedDict()
        self._thread: threading.Thread | None = None

    def set(self, endpoints: Mapping[Name, tuple[HealthEndpoint, ...]], places: Places) -> list[str]:
        """Answer for exactly these Services from now on, at these places. To be called at each round.

        Returns one line for each port that could not be opened, sorted by Service; it is tried again at the next call.
        """
        flat = {(e.service, e.family): e for group in endpoints.values() for e in group}
        self._endpoints = flat
        wanted = {key: None for e in flat.values() for key in _keys(e, places)}
        if wanted != self._asked:
            self._asked = wanted
            self._failed = {}
            for key in [key for key in self._listeners if key not in wanted]:
                self._close(key)
            missing = sorted(key for key in wanted if key not in self._listeners)
            _make_room(len(wanted))
        else:
            missing = sorted(self._failed)
        for key in missing:
            self._open(key)
        if self._listeners and self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="service-health", daemon=True)
            self._thread.start()
        return [
            f"{ObjectRef('Service', *key[0])}: healthCheckNodePort {key[3]}: {self._failed[key]}"
            for key in sorted(self._failed)
        ]

    def close(self) -> None:
        """Close every port and connection and end the thread."""
        os.eventfd_write(self._stop, 1)
        if self._thread is not None:
            self._thread.join()
        for key in list(self._listeners):
            self._close(key)
        for client in self._clients.values():
            client.socket.close()
        self._poller.close()
        os.close(self._stop)

    def _open(self, key: _Key) -> None:
        _, family, address, port = key
        made = None
        try:
            made = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == 6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind((address, port))
            made.listen(128)
        except OSError as error:
            if made is not None:
                made.close()
            self._failed[key] = f"listen on {address}: {os.strerror(error.errno or errno.EIO)}"
            return
        self._failed.pop(key, None)
        self._listeners[key] = made
        self._keys[made.fileno()] = key
        self._poller.register(made.fileno(), select.EPOLLIN)

    def _close(self, key: _Key) -> None:
        """Close a port. The thread may just be about to accept on it: a closed socket object refuses, it is never another's."""
        listener = self._listeners.pop(key)
        del self._keys[listener.fileno()]
        self._poller.unregister(listener.fileno())
        listener.close()

    # -- the thread --------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            for descriptor, _ in self._poller.poll(self._seconds_left()):
                if descriptor == self._stop:
                    return
                client = self._clients.get(descriptor)
                if client is not None:
                    self._hear(client)
                else:
                    self._accept(descriptor)
            now = time.monotonic()
            while self._clients and (oldest := next(iter(self._clients.values()))).deadline <= now:
                self._drop(oldest)

    def _seconds_left(self) -> float | None:
        oldest = next(iter(self._clients.values()), None)
        return None if oldest is None else max(0.0, oldest.deadline - time.monotonic())

    def _accept(self, descriptor: int) -> None:
        key = self._keys.get(descriptor)
        listener = self._listeners.get(key) if key is not None else None
        if key is None or listener is None:
            return
        try:
            accepted, _ = listener.accept()
        except OSError as error:
            if error.errno in {errno.EMFILE, errno.ENFILE}:
                self._out_of_descriptors()
            return  # else the client has gone, or the port
        accepted.setblocking(False)
        if len(self._clients) >= CLIENTS:
            self._drop(next(iter(self._clients.values())))
        self._clients[accepted.fileno()] = _Client(accepted, (key[0], key[1]))
        self._poller.register(accepted.fileno(), select.EPOLLIN)

    def _out_of_descriptors(self) -> None:
        """Give one back; where there is none to give, wait a moment: the port stays readable and must not be spun on."""
        if self._clients:
            self._drop(next(iter(self._clients.values())))
        else:
            time.sleep(0.1)

    def _hear(self, client: _Client) -> None:
        """Take in what a client sends, and answer each request that is complete."""
        try:
            data = client.socket.recv(REQUEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        client.heard += data
        endpoint = self._endpoints.get(client.asks)
        stays = bool(data) and endpoint is not None
        while stays and endpoint is not None and (head := client.request()) is not None:
            stays = self._answer(client, endpoint, head)
        if not stays or len(client.heard) > REQUEST:
            self._drop(client)

    def _answer(self, client: _Client, endpoint: HealthEndpoint, head: bytes) -> bool:
        """Answer one request; return whether the connection stays open for another."""
        said = answer(endpoint, healthy=self._healthy())
        stays = _stays_open(head)
        headers = [*said.headers, ("Date", formatdate(usegmt=True)), ("Content-Length", str(len(said.body)))]
        if not stays:
            headers.append(("Connection", "close"))
        lines = [f"HTTP/1.1 {said.status.value} {said.status.phrase}", *(f"{name}: {value}" for name, value in headers)]
        text = "\r\n".join(lines).encode() + b"\r\n\r\n"
        if not head.startswith(b"HEAD "):
            text += said.body
        try:
            stays = client.socket.send(text) == len(text) and stays
        except OSError:
            return False  # who does not read its answers gets no more of them
        self._clients.move_to_end(client.socket.fileno())
        client.deadline = time.monotonic() + TIMEOUT
        return stays

    def _drop(self, client: _Client) -> None:
        del self._clients[client.socket.fileno()]
        self._poller.unregister(client.socket.fileno())
        client.socket.close()


class _Client:
    """A connection, and what it has said since the last answer."""

    def __init__(self, accepted: socket.socket, asks: tuple[Name, Family]) -> None:
        self.socket, self.asks = accepted, asks
        self.heard = b""
        self.deadline = time.monotonic() + TIMEOUT

    def request(self) -> bytes | None:
        """Take the head of the next request out of what was heard, None if it is not complete."""
        head, end, rest = self.heard.partition(b"\r\n\r\n")
        if not end:
            return None
        self.heard = rest
        return head


def _stays_open(head: bytes) -> bool:
    """Whether a connection outlives this request: as HTTP/1.1 has it, but for a request with a body, which is not read."""
    first, *lines = head.lower().split(b"\r\n")
    if not first.endswith(b"http/1.1"):
        return False
    headers = dict(line.split(b":", 1) for line in lines if b":" in line)
    has_body = headers.get(b"content-length", b"0").strip() != b"0" or b"transfer-encoding" in headers
    return not has_body and b"close" not in headers.get(b"connection", b"")


def _keys(endpoint: HealthEndpoint, places: Places) -> Iterator[_Key]:
    for address in places.get(endpoint.family, ()):
        yield endpoint.service, endpoint.family, address, endpoint.port


def _make_room(ports: int) -> None:
    """Let the process have as many descriptors as so many ports need, as far as its hard limit goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = ports + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
