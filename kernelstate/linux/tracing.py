"""What bcc needs around it: tracefs, and kernel headers where it looks for them; for this process alone.

    mount namespace of its own
      /sys/kernel/tracing                      tracefs, which hosts do not always mount
      /lib/modules/<running kernel>/build      --> the headers of that kernel, else the newest that are installed
                                   /source     --> Debian keeps the half that does not depend on the architecture apart

Headers of another kernel than the running one do for arguments of tracepoints, whose layout the running kernel describes itself, and
for nothing else: no struct of theirs may be read through (``btf.py`` says where fields are). Source: bcc's loader.cc.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

from kernelstate.errors import KernelRefusedError, MissingFeatureError

TRACEFS = Path("/sys/kernel/tracing")
MODULES = Path("/lib/modules")
SOURCES = Path("/usr/src")
PACKAGE = "linux-headers-amd64"
KCONFIG = "include/linux/kconfig.h"
CLONE_NEWNS = 0x20000
MS_SLAVE, MS_REC = 1 << 19, 1 << 14
_libc = ctypes.CDLL(None, use_errno=True)


def prepare() -> None:
    """Move this process into a mount namespace with all of it. Raises MissingFeatureError, KernelRefusedError."""
    release = os.uname().release
    found = headers(release)
    if _libc.unshare(CLONE_NEWNS) != 0:
        raise KernelRefusedError("unshare", "mount namespace", os.strerror(ctypes.get_errno()))
    _mount(None, Path("/"), "", MS_SLAVE | MS_REC)
    if not (TRACEFS / "events").is_dir():
        _mount("nodeplane", TRACEFS, "tracefs")
    if found.parent != MODULES / release:
        build, source = found.resolve(), (found.parent / "source").resolve()
        _mount("nodeplane", MODULES, "tmpfs")
        (MODULES / release).mkdir()
        (MODULES / release / "build").symlink_to(build)
        (MODULES / release / "source").symlink_to(source)


def headers(release: str, modules: Path = MODULES) -> Path:
    """Return the ``build`` directory of the headers to use: the running kernel's, else the newest. Raises MissingFeatureError."""
    there = [
        path for path in modules.glob("*/build") if any((path.parent / part / KCONFIG).exists() for part in ("build", "source"))
    ]
    own = [path for path in there if path.parent.name == release]
    if own:
        return own[0]
    if not there:
        raise MissingFeatureError("kernel headers", f"none in {modules}; apt-get install {PACKAGE} (any version does)")
    return max(there, key=lambda path: [int(number) for number in re.findall(r"\d+", path.parent.name)])


def event_format(event: str) -> str:
    """Return how the running kernel describes an event, ``skb/kfree_skb``. Raises MissingFeatureError."""
    try:
        return (TRACEFS / "events" / event / "format").read_text()
    except OSError as error:
        raise MissingFeatureError(f"tracepoint {event}", str(error.strerror)) from error


def symbols(text: str, field: str) -> dict[int, str]:
    """Return the names that an event's format gives to the values of a field.

    Of ``__print_symbolic(REC->reason, { 2, "NOT_SPECIFIED" }, ...)``.
    """
    _, found, rest = text.partition(f"__print_symbolic(REC->{field},")
    return {int(value, 0): name for value, name in re.findall(r'\{\s*(\w+),\s*"([^"]*)"\s*\}', rest)} if found else {}


def _mount(source: str | None, target: Path, kind: str, flags: int = 0) -> None:
    words = source.encode() if source else None
    if _libc.mount(words, os.fsencode(target), kind.encode() or None, flags, None) != 0:
        raise KernelRefusedError("mount", f"{kind} on {target}", os.strerror(ctypes.get_errno()))
