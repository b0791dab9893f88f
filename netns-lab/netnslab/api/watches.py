"""Those who watch: each has a queue of lines that are still to be written, and a writer that waits for them.

A watch that cannot keep up is ended, and its client begins again from where it was. Whoever asked for bookmarks is told each version
that is complete at once, not once a minute: so a lab knows when an agent has everything.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable

import msgspec

from netnslab.api.kinds import Kind
from netnslab.api.selectors import Raw, Selector
from netnslab.api.store import Change, Entry

MOST = 200_000
"""Lines that may wait."""
INITIAL_END = {"k8s.io/initial-events-end": "true"}


class Watch:
    """One watch of one kind. ``shown`` makes what is sent of an object; ``bookmarks``: whether it wants any."""

    def __init__(
        self, kind: Kind, namespace: str, choose: Selector, shown: Callable[[Entry], bytes], *, bookmarks: bool, since: int
    ) -> None:
        self._kind, self._namespace, self._choose, self._shown, self._bookmarks = kind, namespace, choose, shown, bookmarks
        self._lines: collections.deque[bytes] = collections.deque()
        self._ready = asyncio.Event()
        self._told = since
        self.is_over = False

    def take(self, change: Change) -> None:
        """Tell of a change, if it concerns this watch."""
        if change.kind is not self._kind or (self._namespace and change.key[0] != self._namespace):
            return
        seen = change.seen(self._choose)
        if seen is not None:
            self.add(*seen)

    def add(self, word: str, entry: Entry) -> None:
        """Tell of an object."""
        self._told = max(self._told, entry.version)
        self._put(b'{"type":"%b","object":%b}\n' % (word.encode(), self._shown(entry)))

    def bookmark(self, version: int, *, initial: bool = False) -> None:
        """Tell that everything up to a version has been told; ``initial``: that this was all there is."""
        if (self._bookmarks and version > self._told) or initial:
            self._told = max(self._told, version)
            metadata: Raw = {"resourceVersion": str(version), "creationTimestamp": None}
            if initial:
                metadata["annotations"] = INITIAL_END
            about = {"kind": self._kind.kind, "apiVersion": self._kind.api_version, "metadata": metadata}
            self._put(b'{"type":"BOOKMARK","object":%b}\n' % msgspec.json.encode(about))

    def end(self) -> None:
        """Let the client go."""
        self.is_over = True
        self._ready.set()

    def _put(self, line: bytes) -> None:
        if len(self._lines) >= MOST:
            self.end()
        self._lines.append(line)
        self._ready.set()

    async def lines(self) -> bytes:
        """Wait for something to say, and return all of it; nothing once it is over."""
        await self._ready.wait()
        self._ready.clear()
        if self.is_over:
            self._ready.set()
            return b""
        found = b"".join(self._lines)
        self._lines.clear()
        return found
