"""The process that answers for all pods of one node: TCP, UDP and SCTP on every port they declare.

                      control socket: one JSON line with all pods, one line back once their sockets are open
                            |
    node's responder -- epoll --+-- listening socket born in default.web-1's namespace
                                +-- listening socket born in default.web-2's namespace
                                '-- ...

A socket belongs for life to the namespace of the thread that made it. So a helper thread steps into a pod's namespace, opens its
sockets, and the one event loop serves them all: 100 pods need no 100 processes.

The answer is one line: ``namespace/name`` and the source address the pod saw. A client that begins with an HTTP request gets it
as an HTTP response; one that says nothing gets it after 50 ms. The sockets of a pod that is taken from the list close at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

from kernelstate.errors import KernelStateError
from kernelstate.linux import netns

SILENCE = 0.05
"""Seconds after which a client that says nothing is answered anyway."""
LINGER = 2.0
"""Seconds a client has to close after its answer."""
METHODS = (b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"OPTIONS ", b"PATCH ")
IP_PKTINFO = 8
"""linux/in.h; Python names only the IPv6 one."""
IPPROTO_SCTP = 132


class Connection:
    """One accepted connection: answered or not yet, and until when it may stay."""

    def __init__(self, pod: str, sock: socket.socket, peer: str) -> None:
        self.pod, self.sock, self.peer = pod, sock, peer
        self.heard = b""
        self.answered = False
        self.deadline = time.monotonic() + SILENCE


class Responder:
    """The event loop. ``pods`` maps ``namespace/name`` to what was asked for it; ``sockets`` to what is open."""

    def __init__(self, control: Path) -> None:
        self.selector = selectors.DefaultSelector()
        self.pods: dict[str, dict[str, Any]] = {}
        self.sockets: dict[str, list[socket.socket]] = {}
        self.connections: set[Connection] = set()
        self.control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        control.unlink(missing_ok=True)
        self.control.bind(str(control))
        self.control.listen(16)
        self.selector.register(self.control, selectors.EVENT_READ, self._command)

    def run(self) -> None:
        """Serve until killed."""
        while True:
            due = min((c.deadline for c in self.connections), default=None)
            wait = None if due is None else max(0.0, due - time.monotonic())
            for key, _ in self.selector.select(wait):
                if key.fileobj.fileno() >= 0:  # type: ignore[union-attr]  # not closed by an earlier event of this round
                    key.data()
            now = time.monotonic()
            for connection in [c for c in self.connections if c.deadline <= now]:
                if connection.answered:
                    self._close(connection)
                else:
                    self._answer(connection)

    # -- what is to be served ----------------------------------------------------------------------------------------

    def _command(self) -> None:
        client, _ = self.control.accept()
        with client, contextlib.suppress(OSError, ValueError):  # one that only looked whether somebody listens says nothing
            client.settimeout(5)
            with client.makefile("rb") as lines:
                wanted = json.loads(lines.readline())
            client.sendall(json.dumps({"errors": self._set(wanted)}).encode() + b"\n")

    def _set(self, wanted: dict[str, dict[str, Any]]) -> list[str]:
        """Close what is not wanted any more, open what is new; return what could not be opened, a line each."""
        for pod in [p for p, want in self.pods.items() if wanted.get(p) != want]:
            self._drop(pod)
        errors: list[str] = []
        for pod, want in wanted.items():
            if pod not in self.pods:
                try:
                    netns.call(want["netns"], self._open, pod, want, errors)
                except KernelStateError as error:
                    errors.append(f"Pod {pod}: {error}")
                else:
                    self.pods[pod] = want
        return errors

    def _drop(self, pod: str) -> None:
        del self.pods[pod]
        for sock in self.sockets.pop(pod, []):
            self.selector.unregister(sock)
            sock.close()
        for connection in [c for c in self.connections if c.pod == pod]:
            self._close(connection)

    def _open(self, pod: str, want: dict[str, Any], errors: list[str]) -> None:
        """Open a pod's sockets; runs in a thread inside its namespace, while the event loop waits for it."""
        for protocol, port in want["ports"]:
            for family in (socket.AF_INET, socket.AF_INET6) if want["ipv6"] else (socket.AF_INET,):
                try:
                    self._listen(pod, protocol, port, family)
                except OSError as error:
                    errors.append(f"Pod {pod}: {protocol} port {port}: {error.strerror}")

    def _listen(self, pod: str, protocol: str, port: int, family: socket.AddressFamily) -> None:
        kind = socket.SOCK_DGRAM if protocol == "UDP" else socket.SOCK_STREAM
        sock = socket.socket(family, kind, IPPROTO_SCTP if protocol == "SCTP" else 0)
        try:
            sock.setblocking(False)
            if protocol != "UDP":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))
            if protocol == "UDP":
                _tell_destination(sock, family)
                self.selector.register(sock, selectors.EVENT_READ, lambda: self._datagram(pod, sock, family))
            else:
                sock.listen(1024)
                self.selector.register(sock, selectors.EVENT_READ, lambda: self._accept(pod, sock))
        except BaseException:
            sock.close()
            raise
        self.sockets.setdefault(pod, []).append(sock)

    # -- answering ---------------------------------------------------------------------------------------------------

    def _datagram(self, pod: str, sock: socket.socket, family: socket.AddressFamily) -> None:
        """Answer one datagram, from the address it was sent to: a node has several."""
        with contextlib.suppress(OSError):
            _, ancillary, _, peer = sock.recvmsg(2048, 256)
            sock.sendmsg([answer(pod, peer[0])], _as_source(ancillary, family), 0, peer)

    def _accept(self, pod: str, listener: socket.socket) -> None:
        try:
            sock, peer = listener.accept()
        except OSError:  # the client left meanwhile
            return
        sock.setblocking(False)
        connection = Connection(pod, sock, peer[0])
        self.connections.add(connection)
        self.selector.register(sock, selectors.EVENT_READ, lambda: self._hear(connection))

    def _hear(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            self._close(connection)
            return
        if connection.answered:
            if not data:
                self._close(connection)
            return
        connection.heard = (connection.heard + data)[-65536:]
        incomplete = connection.heard.startswith(METHODS) and b"\r\n\r\n" not in connection.heard
        if incomplete and data:
            connection.deadline = time.monotonic() + LINGER
        else:
            self._answer(connection)

    def _answer(self, connection: Connection) -> None:
        body = answer(connection.pod, connection.peer)
        if connection.heard.startswith(METHODS):
            head = f"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            body = head.encode() + (b"" if connection.heard.startswith(b"HEAD ") else body)
        connection.answered, connection.deadline = True, time.monotonic() + LINGER
        try:
            connection.sock.send(body)
            connection.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._close(connection)

    def _close(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self.selector.unregister(connection.sock)
        connection.sock.close()


def answer(pod: str, peer: str) -> bytes:
    """Return what a pod says to a client."""
    return f"{pod} {peer}\n".encode()


def _tell_destination(sock: socket.socket, family: socket.AddressFamily) -> None:
    """Ask the kernel to say with each datagram which address it was sent to."""
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)


def _as_source(ancillary: list[tuple[int, int, bytes]], family: socket.AddressFamily) -> list[tuple[int, int, bytes]]:
    """Turn a received packet info into that of the answer: the same address, and a way the kernel chooses (interface 0)."""
    for level, kind, data in ancillary:
        if family == socket.AF_INET and (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
            return [(level, kind, struct.pack("=I4s4s", 0, data[8:12], bytes(4)))]  # struct in_pktinfo, ip(7)
        if family == socket.AF_INET6 and (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            return [(level, kind, data[:16] + bytes(4))]
    return []


def main() -> None:
    """Serve on the control socket named by the only argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the lab, not for its pods
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    responder = Responder(Path(sys.argv[1]))
    os.write(1, b"ready\n")
    responder.run()


if __name__ == "__main__":
    main()
