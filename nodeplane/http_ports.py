"""Small HTTP servers of a node: any number of listening sockets, one thread that answers on all of them.

    agent's thread    set(...)   opens and closes ports                                 never waits for a client
    its own thread    epoll      accepts, reads one request, answers, waits for the next never waits for the agent

A client that is slow has TIMEOUT seconds for each request and its answer, and of too many clients the one that waited longest goes:
nobody can hold the thread, nor all of its sockets. What is said is for whoever makes the servers. Sockets are made in the network
namespace of the thread that calls ``set``.
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
from collections.abc import Callable, Iterable
from email.utils import formatdate
from typing import Any, NamedTuple

from kernelstate.objects.address import Family
from proxy.health import Answer

TIMEOUT = 10.0
"""Seconds within which a request is complete, counted from the connection or from the answer before."""
CLIENTS = 512
"""Connections at a time."""
REQUEST = 8192
"""Bytes of a request's head, at most."""
SPARE_DESCRIPTORS = 256 + CLIENTS


class Place(NamedTuple):
    """Where one server listens, and whose it is. ``address`` as text, wildcards included."""

    owner: Any
    """Sortable and hashable; two owners of one port are two places, and the first has it."""
    family: Family
    address: str
    port: int


class HttpPorts:
    """Keeps ports open. ``answer`` is given the place and the head of each request, in the thread that answers; None hangs up."""

    def __init__(self, answer: Callable[[Place, bytes], Answer | None], *, clients: int = 0, name: str = "http") -> None:
        """Take how many connections there may be at a time; 0: ``CLIENTS``."""
        self._answer_to, self._most, self._name = answer, clients, name
        self._places: dict[int, Place] = {}
        self._listeners: dict[Place, socket.socket] = {}
        self._failed: dict[Place, str] = {}
        self._asked: object = None
        self._poller = select.epoll()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller.register(self._stop, select.EPOLLIN)
        self._clients: OrderedDict[int, _Client] = OrderedDict()
        self._thread: threading.Thread | None = None

    def set(self, places: Iterable[Place]) -> dict[Place, str]:
        """Listen at exactly these places from now on. To be called again and again.

        Returns why a place could not be opened; it is tried again at the next call.
        """
        wanted = dict.fromkeys(places)
        if wanted != self._asked:
            self._asked = wanted
            self._failed = {}
            for place in [place for place in self._listeners if place not in wanted]:
                self._close(place)
            missing = sorted(place for place in wanted if place not in self._listeners)
            _make_room(len(wanted))
        else:
            missing = sorted(self._failed)
        for place in missing:
            self._open(place)
        if self._listeners and self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()
        return self._failed

    def close(self) -> None:
        """Close every port and connection and end the thread."""
        os.eventfd_write(self._stop, 1)
        if self._thread is not None:
            self._thread.join()
        for place in list(self._listeners):
            self._close(place)
        for client in self._clients.values():
            client.socket.close()
        self._poller.close()
        os.close(self._stop)

    def _open(self, place: Place) -> None:
        made = None
        family = socket.AF_INET if place.family == 4 else socket.AF_INET6
        try:
            made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if place.family == 6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind((place.address, place.port))
            made.listen(128)
        except OSError as error:
            if made is not None:
                made.close()
            self._failed[place] = f"listen on {place.address}: {os.strerror(error.errno or errno.EIO)}"
            return
        self._failed.pop(place, None)
        self._listeners[place] = made
        self._places[made.fileno()] = place
        self._poller.register(made.fileno(), select.EPOLLIN)

    def _close(self, place: Place) -> None:
        """Close a port. The thread may just be about to accept on it: a closed socket object refuses, it is never another's."""
        listener = self._listeners.pop(place)
        del self._places[listener.fileno()]
        self._poller.unregister(listener.fileno())
        listener.close()

    # -- the thread --------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            for descriptor, _ in self._poller.poll(self._seconds_left()):
                if descriptor == self._stop:
                    return
                client = self._clients.get(descriptor)
                if client is None:
                    self._accept(descriptor)
                elif client.unsent:
                    self._go_on(client)
                else:
                    self._hear(client)
            now = time.monotonic()
            while self._clients and (oldest := next(iter(self._clients.values()))).deadline <= now:
                self._drop(oldest)

    def _seconds_left(self) -> float | None:
        oldest = next(iter(self._clients.values()), None)
        return None if oldest is None else max(0.0, oldest.deadline - time.monotonic())

    def _accept(self, descriptor: int) -> None:
        place = self._places.get(descriptor)
        listener = self._listeners.get(place) if place is not None else None
        if place is None or listener is None:
            return
        try:
            accepted, _ = listener.accept()
        except OSError as error:
            if error.errno in {errno.EMFILE, errno.ENFILE}:
                self._out_of_descriptors()
            return  # else the client has gone, or the port
        accepted.setblocking(False)
        if len(self._clients) >= (self._most or CLIENTS):
            self._drop(next(iter(self._clients.values())))
        self._clients[accepted.fileno()] = _Client(accepted, place)
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
        if not data or not self._answer_all(client) or len(client.heard) > REQUEST:
            self._drop(client)

    def _answer_all(self, client: _Client) -> bool:
        """Answer what was heard, up to an answer that cannot be sent at once; whether the connection stays open."""
        while not client.unsent and (head := client.request()) is not None:
            said = self._answer_to(client.asks, head)
            if said is None:
                return False
            client.stays = _stays_open(head)
            client.unsent = _printed(said, stays=client.stays, with_body=not head.startswith(b"HEAD "))
            self._clients.move_to_end(client.socket.fileno())
            client.deadline = time.monotonic() + TIMEOUT
            if not self._send(client):
                return False
        return True

    def _send(self, client: _Client) -> bool:
        """Send what the socket takes of an answer, the rest when it takes more; whether the connection stays open."""
        try:
            client.unsent = client.unsent[client.socket.send(client.unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            return False
        self._poller.modify(client.socket.fileno(), select.EPOLLOUT if client.unsent else select.EPOLLIN)
        return bool(client.unsent) or client.stays

    def _go_on(self, client: _Client) -> None:
        """Send more of an answer, then look at what was asked meanwhile."""
        if not self._send(client) or not self._answer_all(client):
            self._drop(client)

    def _drop(self, client: _Client) -> None:
        del self._clients[client.socket.fileno()]
        self._poller.unregister(client.socket.fileno())
        client.socket.close()


class _Client:
    """A connection, what it has said since the last answer, and what of that is still to be sent."""

    def __init__(self, accepted: socket.socket, asks: Place) -> None:
        self.socket, self.asks = accepted, asks
        self.heard = self.unsent = b""
        self.stays = True
        self.deadline = time.monotonic() + TIMEOUT

    def request(self) -> bytes | None:
        """Take the head of the next request out of what was heard, None if it is not complete."""
        head, end, rest = self.heard.partition(b"\r\n\r\n")
        if not end:
            return None
        self.heard = rest
        return head


def path_of(head: bytes) -> str:
    """Return the path that a request names, without its query."""
    words = head.split(b"\r\n", 1)[0].split()
    return words[1].partition(b"?")[0].decode("ascii", "replace") if len(words) > 1 else ""


def _printed(said: Answer, *, stays: bool, with_body: bool) -> bytes:
    headers = [*said.headers, ("Date", formatdate(usegmt=True)), ("Content-Length", str(len(said.body)))]
    if not stays:
        headers.append(("Connection", "close"))
    lines = [f"HTTP/1.1 {said.status.value} {said.status.phrase}", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + (said.body if with_body else b"")


def _stays_open(head: bytes) -> bool:
    """Whether a connection outlives this request: as HTTP/1.1 has it, but for a request with a body, which is not read."""
    first, *lines = head.lower().split(b"\r\n")
    if not first.endswith(b"http/1.1"):
        return False
    headers = dict(line.split(b":", 1) for line in lines if b":" in line)
    has_body = headers.get(b"content-length", b"0").strip() != b"0" or b"transfer-encoding" in headers
    return not has_body and b"close" not in headers.get(b"connection", b"")


def _make_room(ports: int) -> None:
    """Let the process have as many descriptors as so many ports need, as far as its hard limit goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = ports + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
