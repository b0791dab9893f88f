"""Which processes live in a lab's namespaces, and ending them: by what the kernel says, not by what we remember.

A process belongs to a lab if ``/proc/PID/ns/net`` of it or of one of its threads is one of the lab's namespaces: the agents, the
responders, and whatever people started with ``lab exec``. Recorded processes are ended besides, if they are still themselves.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from kernelstate.linux import netns
from netnslab.errors import LabError
from netnslab.state import Process

GONE_SECONDS = 10.0


def start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot (proc_pid_stat(5), field 22); None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_alive(process: Process) -> bool:
    """Whether a recorded process is still running, and still that one."""
    return start_time(process.pid) == process.start


def inodes(names: Iterable[str]) -> set[int]:
    """Return the inode numbers of those namespaces that exist."""
    return {netns.path(name).stat().st_ino for name in names if netns.exists(name)}


def netns_inode(pid: int) -> int | None:
    """Return the inode number of a process's network namespace, or None if it is gone."""
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    except OSError:
        return None


def living_in(namespaces: set[int]) -> set[int]:
    """Return the processes any thread of which is in one of these namespaces; never this process itself."""
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile
            if any((task / "ns/net").stat().st_ino in namespaces for task in (entry / "task").iterdir()):
                found.add(int(entry.name))
    return found


def running(module: str, argument: str) -> set[int]:
    """Return the processes that run a Python module with that one argument, whoever has started them."""
    wanted = [b"-m", module.encode(), argument.encode(), b""]
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                if (entry / "cmdline").read_bytes().split(b"\0")[-4:] == wanted:
                    found.add(int(entry.name))
    return found


def kill(find: Callable[[], set[int]], what: str) -> int:
    """Kill what ``find`` finds until it finds nothing more, and return how many that were. Raises LabError after 10 s."""
    killed: set[int] = set()
    end = time.monotonic() + GONE_SECONDS
    while pids := find():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed |= pids
        reap()
        if time.monotonic() > end:
            raise LabError(f"{what}: processes {sorted(pids)} do not end")
        time.sleep(0.01)  # between two looks; the kernel takes this long to take down a process
    return len(killed)


_started: list[subprocess.Popen[bytes]] = []


def let_run(process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """Leave a process we started running beyond us; keeps its handle, so that it can be reaped should it end before we do."""
    _started.append(process)
    return process


@atexit.register
def _leave() -> None:
    """Let those that run on do so without Python's warning about it: that is what they are for."""
    for process in _started:
        if process.poll() is None:
            process.returncode = 0


def reap() -> None:
    """Collect those of our own children that have ended: as zombies they would keep their numbers."""
    _started[:] = [process for process in _started if process.poll() is None]
