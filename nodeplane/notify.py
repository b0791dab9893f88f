"""What systemd is told of the agent: that it is ready, how it is, that its loop turns, that it reloads, that it stops.

    NOTIFY_SOCKET  <-- READY=1       after the first round: from then on the node is kept as the objects say
                   <-- STATUS=...    a line for `systemctl status`, when it changes
                   <-- WATCHDOG=1    by each turn of the loop, at most every quarter of WATCHDOG_USEC
                   <-- RELOADING=1   SIGHUP; READY=1 follows from the process that takes over, or from this one if it stays
                   <-- STOPPING=1

Without NOTIFY_SOCKET nothing happens. Nobody waits for systemd: a message that cannot be sent is lost.
Source: sd_notify(3), systemd.service(5).
"""

from __future__ import annotations

import contextlib
import os
import socket
import time

from nodeplane.status import Status

SHARE = 4


class Notifier:
    """The socket of the service manager, if there is one. Use from one thread."""

    def __init__(self, environment: os._Environ[str] | dict[str, str] = os.environ) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        timeout = environment.get("WATCHDOG_USEC", "")
        self._period = int(timeout) / 1e6 / SHARE if timeout.isdecimal() else 0.0
        self._next = 0.0
        self._words = ""
        self._is_ready = False

    def publish(self, status: Status) -> None:
        """Say how the agent is, and once that it is ready."""
        words = summary(status)
        lines = [] if words == self._words else [f"STATUS={words}"]
        if not self._is_ready:
            lines.insert(0, "READY=1")
        self._is_ready, self._words = True, words
        self._send(lines)

    def alive(self) -> None:
        """Say that the loop turns, if it was a while since."""
        if self._period and self._is_ready and (now := time.monotonic()) >= self._next:
            self._next = now + self._period
            self._send(["WATCHDOG=1"])

    def reloading(self) -> None:
        """Say that the configuration is read again."""
        self._is_ready = False
        self._send(["RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}"])

    def stopping(self) -> None:
        """Say that this is the end."""
        self._send(["STOPPING=1"])

    def _send(self, lines: list[str]) -> None:
        if not self._address or not lines:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(lines).encode(), address)


def summary(status: Status) -> str:
    """Return how an agent is in one line."""
    words = f"{status.services} Services in {status.mode}, {status.endpoints} endpoints"
    if status.isolated:
        words += f", {status.isolated} isolated pods"
    if status.peers:
        words += f", {len(status.peers)} other nodes"
    if status.synced:
        return f"in sync: {words}"
    return f"not in sync: {status.errors[0] if status.errors else ', '.join(status.pending) or 'starting'}; {words}"
