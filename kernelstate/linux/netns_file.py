"""Being inside a network namespace that a file stands for: ``/run/netns/NAME``, ``/proc/PID/ns/net``, a bind mount anywhere.

Small on purpose, for a program that is executed once for each pod: it imports nothing but what switching takes. Namespaces that have
names, threads and processes in them are for ``netns.py``. Source: setns(2), ioctl_ns(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

from kernelstate.errors import KernelRefusedError

OWN = "/proc/thread-self/ns/net"
CLONE_NEWNET = 0x40000000


@contextlib.contextmanager
def inside_file(file: str) -> Iterator[None]:
    """Run the body with the calling thread inside the namespace of ``file``, then move it back. Raises KernelRefusedError."""
    home = os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = open_netns(file)
        try:
            _setns(there, "enter network namespace", file)
        finally:
            os.close(there)
        try:
            yield
        finally:
            _setns(home, "return from network namespace", file)
    finally:
        os.close(home)


def open_netns(file: str) -> int:
    """Open a namespace's file; the descriptor keeps the namespace alive. Raises KernelRefusedError, also if it is another file."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise KernelRefusedError("open network namespace", file, str(error.strerror)) from error
    if os.fstat(descriptor).st_dev != os.stat(OWN).st_dev:  # every namespace lies on the one nsfs
        os.close(descriptor)
        raise KernelRefusedError("open network namespace", file, "is not a network namespace")
    return descriptor


def is_held(file: str) -> bool:
    """Whether ``file`` stands for a namespace; a plain file left where one was mounted does not."""
    try:
        return os.stat(file).st_dev == os.stat(OWN).st_dev
    except OSError:
        return False


def is_own(file: str) -> bool:
    """Whether ``file`` stands for the namespace the calling thread is in."""
    found, own = os.stat(file), os.stat(OWN)
    return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)


def _setns(descriptor: int, operation: str, file: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET) != 0:
        raise KernelRefusedError(operation, file, os.strerror(ctypes.get_errno()))
