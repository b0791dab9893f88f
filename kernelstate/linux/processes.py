"""A process of ours that is not our child, or may not be: is it over, end it, and what was it started with.

A pidfd names one process for good, where a pid may be somebody else's the next moment. It becomes readable when the process ends,
and if that was a child of ours (we started it, and did not start anew since) it is taken off the process table here.
Source: pidfd_open(2), waitid(2), proc(5).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Callable
from pathlib import Path

KILL_SECONDS = 2.0


def has_ended(pidfd: int, seconds: float) -> bool:
    """Whether a process is over, or ends within so many seconds."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    if not poller.poll(1000 * seconds):
        return False
    with contextlib.suppress(ChildProcessError):  # not ours to reap
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    return True


def send(pidfd: int, number: signal.Signals) -> None:
    """Send a signal; a process that is gone is none to be told."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def end(pid: int, ask: Callable[[], None], patience: float = 1.0) -> bool:
    """Ask a process to end, then tell it to, then make it; each has ``patience`` seconds. False: not even that helped."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        ask()
        if has_ended(pidfd, patience):
            return True
        send(pidfd, signal.SIGTERM)
        if has_ended(pidfd, patience):
            return True
        send(pidfd, signal.SIGKILL)
        return has_ended(pidfd, KILL_SECONDS)
    finally:
        os.close(pidfd)


def kill(pid: int) -> bool:
    """End a process that nobody can talk to any more."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        send(pidfd, signal.SIGKILL)
        return has_ended(pidfd, KILL_SECONDS)
    finally:
        os.close(pidfd)


def command_line(pid: int) -> list[str]:
    """Return the words a process was started with; none if it is gone."""
    try:
        return [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]]
    except OSError:
        return []


def environment(pid: int, name: str) -> str:
    """Return a variable a process was started with; empty if it is not set or the process is gone."""
    try:
        found = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    start = os.fsencode(name) + b"="
    return next((os.fsdecode(one[len(start) :]) for one in found if one.startswith(start)), "")


def shares_network(pid: int) -> bool:
    """Whether a process is in the network namespace of the calling thread; one that is gone is."""
    try:
        theirs = Path(f"/proc/{pid}/ns/net").stat()
    except OSError:
        return True
    own = Path("/proc/thread-self/ns/net").stat()
    return (theirs.st_dev, theirs.st_ino) == (own.st_dev, own.st_ino)
