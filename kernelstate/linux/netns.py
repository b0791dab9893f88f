"""Named network namespaces, as ``ip netns`` keeps them, and running code inside one.

A network namespace lives as long as something holds it: a process, a socket, or a bind mount of its file. A *named* one is
held by a mount under ``/run/netns``, so ``ip netns exec NAME ...`` works on ours and we work on those of others.

    thread --setns()--> /run/netns/NAME --bind mount--> nsfs inode --> links, routes, rules, sockets made from here

The kernel keeps the namespace per *thread*. So ``inside`` moves only the calling thread and moves it back, ``call`` uses a
thread of its own, and a process started by such a thread starts in the namespace. What follows the *process* instead is
``/proc/net`` (it is ``/proc/self/net``, the main thread's): code meant for namespaces reads ``/proc/thread-self/net``.

What is in a namespace (links, addresses, programs) is the caller's business. Source: setns(2), unshare(2), ip-netns(8).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from kernelstate.errors import KernelRefusedError

P = ParamSpec("P")
T = TypeVar("T")

RUN_DIR = Path("/run/netns")
OWN = "/proc/thread-self/ns/net"

CLONE_NEWNET = 0x40000000
MS_BIND, MS_REC, MS_SHARED, MNT_DETACH = 0x1000, 0x4000, 1 << 20, 2

_libc = ctypes.CDLL(None, use_errno=True)


def path(name: str) -> Path:
    """Return the file that holds the namespace ``name``. Raises ValueError when it cannot be a file's name."""
    if not name or "/" in name or name.startswith("."):
        raise ValueError(f"not a network namespace name: {name!r}")
    return RUN_DIR / name


def exists(name: str) -> bool:
    """Whether a namespace of that name is held; a plain file left by a failed creation is none."""
    return _is_held(path(name))


def names() -> list[str]:
    """Return the names of all held namespaces, sorted."""
    try:
        return sorted(entry.name for entry in RUN_DIR.iterdir() if _is_held(entry))
    except FileNotFoundError:
        return []


def create(name: str, *, loopback: bool = True) -> None:
    """Make the namespace ``name``, with its loopback up unless told otherwise. Raises KernelRefusedError, also if it exists."""
    target = path(name)
    _share_run_dir(target)
    try:
        os.close(os.open(target, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o444))
    except OSError as error:
        raise KernelRefusedError("create network namespace", name, str(error.strerror)) from error

    def make() -> None:
        # A thread of its own: unshare moves it into the new namespace for good, and the thread ends right after.
        _check(_libc.unshare(CLONE_NEWNET), "create network namespace", name)
        _mount(OWN, target, MS_BIND, name)
        if loopback:
            _loopback_up()

    try:
        _in_thread(make)
    except BaseException:
        delete(name)
        raise


def delete(name: str) -> None:
    """Let go of the namespace ``name``; the kernel tears it down once no process is left in it. Gone already is success."""
    target = path(name)
    if _libc.umount2(os.fsencode(target), MNT_DETACH) != 0:
        code = ctypes.get_errno()
        if code not in {errno.EINVAL, errno.ENOENT}:  # not a mount, or not there
            raise KernelRefusedError("delete network namespace", name, os.strerror(code))
    with contextlib.suppress(FileNotFoundError):
        target.unlink()


def enter(name: str) -> None:
    """Move the calling thread into ``name`` for good; a process does this before it starts threads."""
    _setns(path(name), name)


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """Run the body with the calling thread inside ``name``; sockets and processes made there stay there."""
    home = os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _setns(path(name), name)
        try:
            yield
        finally:
            _check(_libc.setns(home, CLONE_NEWNET), "return from network namespace", name)
    finally:
        os.close(home)


def call(name: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``function`` in a thread of its own inside ``name``; returns what it returns, raises what it raises."""

    def body() -> T:
        enter(name)
        return function(*args, **kwargs)

    return _in_thread(body)


def call_apart(function: Callable[[], T]) -> T:
    """Call ``function`` in a thread of its own inside a new namespace without a name, which is gone afterwards.

    Returns what it returns, raises what it raises; KernelRefusedError where a new namespace is not allowed.
    """

    def body() -> T:
        _check(_libc.unshare(CLONE_NEWNET), "create network namespace", "without a name")
        return function()

    return _in_thread(body)


def popen(name: str, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a program inside ``name``; ``options`` are those of ``subprocess.Popen``."""
    with inside(name):
        return subprocess.Popen(list(argv), **options)


def run(name: str, argv: Sequence[str], *, timeout: float = 120.0, stdin: str | None = None, check: bool = True) -> str:
    """Run a program to its end inside ``name`` and return its stdout; with ``check``, failure raises KernelRefusedError."""
    with inside(name):
        done = subprocess.run(list(argv), input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
    if check and done.returncode != 0:
        words = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
        raise KernelRefusedError(" ".join(argv), f"in {name}", words)
    return done.stdout


def _in_thread(function: Callable[[], T]) -> T:
    """Run ``function`` in a new thread to its end."""
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            result.append(function())
        except BaseException as error:  # handed to the caller below
            failure.append(error)

    thread = threading.Thread(target=body, name="netns")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def _setns(target: Path, name: str) -> None:
    try:
        fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise KernelRefusedError("enter network namespace", name, str(error.strerror)) from error
    try:
        _check(_libc.setns(fd, CLONE_NEWNET), "enter network namespace", name)
    finally:
        os.close(fd)


def _share_run_dir(target: Path) -> None:
    """Make the directory a shared mount, as ip-netns does, so that other mount namespaces see names come and go."""
    directory = target.parent
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    if _libc.mount(b"", os.fsencode(directory), b"none", ctypes.c_ulong(MS_SHARED | MS_REC), None) != 0:  # not a mount yet
        _mount(str(directory), directory, MS_BIND | MS_REC, str(directory))
        _mount("", directory, MS_SHARED | MS_REC, str(directory))


def _is_held(file: Path) -> bool:
    """Whether a namespace is mounted on the file: it then lies on another device (nsfs) than its directory."""
    try:
        return file.stat().st_dev != file.parent.stat().st_dev
    except FileNotFoundError:
        return False


def _mount(source: str, target: Path, flags: int, name: str) -> None:
    done = _libc.mount(source.encode(), os.fsencode(target), b"none", ctypes.c_ulong(flags), None)
    _check(done, "mount for network namespace", name)


def _check(result: int, operation: str, name: str) -> None:
    if result != 0:
        raise KernelRefusedError(operation, name, os.strerror(ctypes.get_errno()))


def _loopback_up() -> None:
    """Set IFF_UP on ``lo`` of the calling thread's namespace by ioctl: no netlink library needed for one bit."""
    import fcntl  # noqa: PLC0415  only creation needs these two
    import socket  # noqa: PLC0415

    siocsifflags, iff_up = 0x8914, 0x1
    request = b"lo".ljust(16, b"\0") + iff_up.to_bytes(2, "little") + bytes(22)  # struct ifreq: name, flags, padding
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock.fileno(), siocsifflags, request)
