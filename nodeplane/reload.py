"""The configuration file is followed: what changes in it is in force a moment later, and what is wrong in it changes nothing.

    file changes --> wrong ----------------------> as before; log, status and metric say why, until it is right
               '--> only fields in LIVE differ --> the agent goes on with them, nothing is read or watched anew
               '--> others differ --------------> the process starts anew in its place: same pid, kernel forwarding all the while
    SIGHUP --------------------------------------> likewise anew, whatever differs: a new version of the program is taken up

So nothing in the file needs a restart by people. The file's directory is watched, so that it may be replaced by renaming, or by the swap
of links by which a kubelet changes a ConfigMap; what is looked at is its content. Decides which fields are which; who reads the file and
replaces the process is ``daemon.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import inotify_simple
import msgspec

from nodeplane.attendant import Attendant
from nodeplane.config import NodeConfig

LIVE_FIELDS = frozenset({"min_sync_period", "sync_period", "conntrack", "logs", "oom_score", "notes"})
"""Of NodeConfig, those that the agent takes up as it runs."""
LIVE_SERVICES = frozenset(
    {
        "masquerade_all",
        "masquerade_bit",
        "localhost_node_ports",
        "detect_local_mode",
        "cluster_cidrs",
        "bridge_interface",
        "interface_name_prefix",
        "node_port_addresses",
        "tcp_be_liberal",
        "dispatch_above",
        "guard_node_ports",
    }
)
"""Of ProxySettings, likewise: what decides rules, and nothing besides."""
_FLAGS = inotify_simple.flags
_EVENTS = _FLAGS.CLOSE_WRITE | _FLAGS.MOVED_TO | _FLAGS.MOVED_FROM | _FLAGS.CREATE | _FLAGS.DELETE

log = logging.getLogger("nodeplane")


def differing(before: NodeConfig, after: NodeConfig) -> list[str]:
    """Return the fields that differ: of NodeConfig, and of ``services`` as ``services.NAME``; sorted."""
    return sorted(_differing(before, after))


def _differing(before: NodeConfig, after: NodeConfig) -> Iterator[str]:
    for name in NodeConfig.__struct_fields__:
        old, new = getattr(before, name), getattr(after, name)
        if old == new:
            continue
        if name == "services" and old is not None and new is not None:
            yield from (f"services.{part}" for part in old.__struct_fields__ if getattr(old, part) != getattr(new, part))
        else:
            yield name


def is_live(field: str) -> bool:
    """Whether a field that differs can be taken up by an agent that runs."""
    section, _, name = field.rpartition(".")
    return name in LIVE_SERVICES if section == "services" else field in LIVE_FIELDS


def with_live(running: NodeConfig, wanted: NodeConfig) -> NodeConfig:
    """Return the configuration that runs, with the live fields of another; what etcd said of the network stays."""
    changes = {name: getattr(wanted, name) for name in LIVE_FIELDS}
    return msgspec.structs.replace(running, services=wanted.services, **changes)


class ConfigWatch(Attendant):
    """Notices that the file's content is another. Use from one thread."""

    def __init__(self, path: Path | None) -> None:
        """``path`` None: there is no file, and nothing to notice."""
        self._path = path
        self._inotify: inotify_simple.INotify | None = None
        self._content = self._read()
        self.is_due = False
        """Whether the file has to be read again; ``seen`` ends it."""
        if path is not None:
            self._watch(path)

    def _watch(self, path: Path) -> None:
        try:
            self._inotify = inotify_simple.INotify(nonblocking=True)
            for directory in {path.parent, path.resolve().parent}:
                self._inotify.add_watch(str(directory), _EVENTS)
        except OSError as error:
            if path.exists():  # else who reads it says so
                log.warning("%s: cannot be followed, SIGHUP makes the agent read it again: %s", path, error.strerror)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What becomes readable when there may be something to notice."""
        return (int(self._inotify.fileno()),) if self._inotify is not None else ()

    def turn(self) -> None:
        """Look at the file if something happened around it."""
        if self._inotify is None or not self._inotify.read(timeout=0):
            return
        content = self._read()
        if content != self._content:
            self._content, self.is_due = content, True

    def seen(self) -> None:
        """Note that the file is about to be read as it is now."""
        self._content, self.is_due = self._read(), False

    def close(self) -> None:
        """Stop watching."""
        if self._inotify is not None:
            self._inotify.close()

    def _read(self) -> bytes | None:
        try:
            return self._path.read_bytes() if self._path is not None else None
        except OSError:
            return None  # who reads it in earnest will say why
