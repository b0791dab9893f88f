"""Kernel parameters under ``/proc/sys``; those below ``net`` are of the calling thread's network namespace.

A name is written with dots or slashes. A link's name may itself hold dots (``eth0.100``), so such names use slashes:
``net/ipv4/conf/eth0.100/forwarding``.
"""

from __future__ import annotations

from pathlib import Path

from kernelstate.errors import KernelRefusedError, MissingFeatureError

ROOT = Path("/proc/sys")


def read(name: str) -> str:
    """Return a parameter's value, stripped. Raises MissingFeatureError when this kernel has no such parameter."""
    try:
        return _path(name).read_text(encoding="ascii").strip()
    except FileNotFoundError as error:
        raise MissingFeatureError(f"sysctl {name}") from error
    except OSError as error:
        raise KernelRefusedError("read sysctl", name, str(error.strerror)) from error


def write(name: str, value: str | int) -> bool:
    """Set a parameter; returns whether it had another value before. Raises MissingFeatureError, KernelRefusedError."""
    text = str(value)
    if read(name).split() == text.split():
        return False
    try:
        _path(name).write_text(text + "\n", encoding="ascii")
    except OSError as error:
        raise KernelRefusedError("write sysctl", f"{name} = {text}", str(error.strerror)) from error
    return True


def _path(name: str) -> Path:
    """Return the parameter's file. Raises ValueError for a name that leaves /proc/sys."""
    relative = name if "/" in name else name.replace(".", "/")
    if relative.startswith("/") or ".." in relative.split("/"):
        raise ValueError(f"not a sysctl name: {name!r}")
    return ROOT / relative
