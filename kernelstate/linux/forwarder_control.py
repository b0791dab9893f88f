r"""Speaks to a running forwarder over its control socket: lines of text in one message, answered in one or several.

    peer 10.244.2.0/24 192.168.1.2 8285   -->   ok
    show peers                            -->   peer ...\npeer ...\nok        (a long answer in several messages, ``ok`` ends it)
    anything it refuses                   -->   error WORDS

Knows words and sockets; which process should run, and with which table, is for ``forwarder.py`` and its callers.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Self

from kernelstate.errors import KernelRefusedError
from kernelstate.objects.address import Prefix
from kernelstate.objects.tunnel import TunnelPeer
from kernelstate.text.udp_tunnel import peer_line

ANSWER_SECONDS = 2.0
"""A forwarder answers in microseconds; one that takes this long hangs."""
MESSAGE = 1 << 16
BATCH = 64
"""Lines in one message of a long request: some 6 kB."""
_UCRED = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED


class Control:
    """One connection; use it as a context. Raises OSError where nobody listens."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.settimeout(ANSWER_SECONDS)
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    @property
    def listener(self) -> int:
        """The pid of the process that listens, by the kernel's word: known even of one that answers nothing."""
        pid: int = _UCRED.unpack(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0]
        return pid

    def ask(self, lines: Sequence[str]) -> list[str]:
        """Send one request and return the answer's lines. Raises KernelRefusedError, TimeoutError, OSError."""
        self._socket.send("".join(f"{line}\n" for line in lines).encode())
        found: list[str] = []
        while True:
            message = self._socket.recv(MESSAGE)
            if not message:
                raise ConnectionError("closed the connection")
            found += message.decode(errors="replace").splitlines()
            last = found[-1] if found else ""
            if last == "ok":
                return found[:-1]
            if last.startswith("error"):
                raise KernelRefusedError(lines[0], "forwarder", last.removeprefix("error").strip() or "no reason given")

    def values(self, request: str) -> dict[str, str]:
        """Ask for ``NAME VALUE`` lines; the first of a name counts."""
        found: dict[str, str] = {}
        for line in self.ask([request]):
            name, _, value = line.partition(" ")
            found.setdefault(name, value)
        return found

    def peers(self) -> Iterator[TunnelPeer]:
        """Return the table. Raises KernelRefusedError for a line that cannot be read."""
        for line in self.ask(["show peers"]):
            words = line.split()
            try:
                _, prefix, address, _ = words
                yield TunnelPeer(Prefix.parse(prefix), ip_address(address))
            except ValueError as error:
                raise KernelRefusedError("show peers", "forwarder", f"answers {line!r}") from error

    def replace(self, peers: Iterable[TunnelPeer], port: int) -> None:
        """Exchange the whole table at once: it is the old one or the new one, never part of one."""
        lines = [peer_line(peer, port) for peer in peers]
        self.ask(["peers begin"])
        for start in range(0, len(lines), BATCH):
            self.ask(lines[start : start + BATCH])
        self.ask(["peers commit"])
