"""An API server with a memory: what it said last is used until it has said everything once, and is written down as it changes.

    start --> server answers in time ----------------------------------> its snapshot      the file is not looked at
         '--> it does not --> file whole and ours --> its snapshot --> the server's own, as soon as all lists are in
                         '--> file missing, cut short, another's --> wait, as long as it takes

The server's first snapshot replaces the file's altogether: what is not in it is gone. Before that nothing of the file is removed.
After a reboot the kernel holds nothing, so the file is used soon; while the machine has been up all the time the kernel holds what the
file does, or newer, so the server gets longer.

Writing happens in a thread of its own, with pauses for the agent, at most every ``EVERY`` seconds, and takes at most one part in
``SHARE`` of the time: in a large cluster a change is written down after half a minute.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from clusterstate.snapshot import Snapshot, Update
from nodeplane.kept_objects import OBJECTS_FILE, ForeignStateError, Identity, Kept, read_objects, write_objects

EVERY = 3.0
SHARE = 50
PAUSE = 0.01
"""Seconds for others after each piece that was printed."""
LAST = 5.0
"""Seconds that the last write may take when the agent ends."""
AFTER_BOOT, SAME_BOOT = 3.0, 10.0
"""Seconds that the server has before the file is used."""

log = logging.getLogger("nodeplane")


class Server(Protocol):
    """An API server as a source."""

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when something happened."""

    def wait(self, seconds: float) -> Update | None:
        """Return the first complete snapshot, None if it is not there in time."""

    def load(self) -> Update:
        """Return the first complete snapshot, however long it takes."""

    def poll(self) -> Update | None:
        """Return what happened since; None where nothing differs."""

    def why(self) -> str:
        """Say why the first snapshot is not there."""

    def close(self) -> None:
        """Stop following."""


class KeptSource:
    """A source like the server's own, see above. Use from one thread."""

    def __init__(self, server: Server, identity: Identity, path: Path | None = None) -> None:
        self.server, self._identity, self._path = server, identity, path or OBJECTS_FILE
        self._writer = Writer(identity, self._path)
        self._kept: Kept | None = None
        """What of the file is in use; None: nothing (any more)."""
        self._why = ""

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when something happened."""
        return self.server.fileno()

    def load(self) -> Update:
        """Return the server's first snapshot, or the file's where the server does not answer in time. Raises SourceError."""
        found = self.server.wait(AFTER_BOOT)
        kept = self._read() if found is None else None
        if kept is not None and kept.same_boot:
            found = self.server.wait(SAME_BOOT - AFTER_BOOT)
        if found is not None or kept is None:
            return self._written_down(found or self.server.load())
        self._kept = kept
        self._why = self.server.why()
        log.warning("%s: going by what was kept at %s: %s", self._identity.server, _time(kept.written), self._why)
        return self._from_file(kept)

    def poll(self) -> Update | None:
        """Return what happened since; None where nothing differs."""
        if self._kept is None:
            update = self.server.poll()
            return None if update is None else self._written_down(update)
        found = self.server.wait(0)
        if found is not None:
            log.info("%s: has said everything: what was kept is not needed any more", self._identity.server)
            self._kept = None
            return self._written_down(found)
        why = self.server.why()
        if why == self._why:
            return None
        self._why = why
        nothing = self._from_file(self._kept)
        return msgspec.structs.replace(nothing, changed=frozenset(), service_changed=frozenset())

    def close(self) -> None:
        """Stop following; what is not written down yet is."""
        self._writer.close()
        self.server.close()

    def _read(self) -> Kept | None:
        try:
            return read_objects(self._identity, self._path)
        except ForeignStateError as error:
            log.warning("what was kept of the cluster is not used: %s", error)
            return None

    def _from_file(self, kept: Kept) -> Update:
        words = f"as of {_time(kept.written)}, kept in {self._path}: {self._why}"
        return Update(kept.snapshot, None, kept=words)

    def _written_down(self, update: Update) -> Update:
        self._writer.offer(update.snapshot)
        return update


class Writer:
    """Writes the newest snapshot it was offered, not too often."""

    def __init__(self, identity: Identity, path: Path) -> None:
        self._identity, self._path = identity, path
        self._newest: Snapshot | None = None
        self._changed = threading.Condition()
        self._ending = threading.Event()
        self._failed = ""
        self._thread: threading.Thread | None = None

    def offer(self, snapshot: Snapshot) -> None:
        """Have a snapshot written down; never waits for the disk."""
        with self._changed:
            self._newest = snapshot
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kept objects", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Write what was offered last and end."""
        self._ending.set()
        with self._changed:
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(LAST)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest is not None or self._ending.is_set())
                snapshot, self._newest = self._newest, None
            if snapshot is None:
                return
            started = time.thread_time()
            self._write(snapshot)
            self._ending.wait(max(EVERY, SHARE * (time.thread_time() - started)))

    def _write(self, snapshot: Snapshot) -> None:
        try:
            write_objects(snapshot, self._identity, time.time(), self._path, pause=self._pauses())
        except Exception as error:  # a disk that is full must not end the thread: it may have room later
            words = f"{self._path}: what the cluster looks like cannot be kept: {error}"
            if words != self._failed:
                log.warning("%s", words)
            self._failed = words
        else:
            self._failed = ""

    def _pauses(self) -> Iterator[None]:
        while True:
            self._ending.wait(PAUSE)
            yield


def _time(written: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(written))
