"""What is kept of the overlay over reboots: the last leases and the cluster's network, as etcd had them.

/var/lib/nodeplane/overlay.json    {"prefix", "config", "own", "until", "entries": {"10.5.52.0-24": {...}}}

So a node that boots while etcd is away has its subnet, its file ``subnet.env`` and its routes at once. Keys and values are kept
as text and read again as if etcd had sent them. The file is replaced as a whole and is on the disk before it takes its place; a
file that cannot be read, or is another prefix's, is as good as none.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

STATE_FILE = Path("/var/lib/nodeplane/overlay.json")


class SavedEntry(msgspec.Struct, frozen=True):
    """One lease: see ``overlay.registry.etcd.Entry``."""

    value: str
    lease: int = 0
    revision: int = 0


class Saved(msgspec.Struct, frozen=True):
    """The file's content. ``until``: when the own lease ends, seconds since the epoch; 0 for a reservation."""

    prefix: str
    config: str | None = None
    """The text of ``<prefix>/config``; None: there was none."""
    own: str = ""
    """The key this node holds; empty: none yet."""
    until: float = 0.0
    entries: dict[str, SavedEntry] = {}


def load(prefix: str, path: Path = STATE_FILE) -> Saved:
    """Return what was saved last for a prefix; nothing is an empty record."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        found = msgspec.json.decode(path.read_bytes(), type=Saved)
        if found.prefix == prefix:
            return found
    return Saved(prefix)


def save(saved: Saved, path: Path = STATE_FILE) -> None:
    """Replace the file; after a crash it is the old one or the new one. Raises OSError."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}.tmp")
    with fresh.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(saved), indent=1) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
