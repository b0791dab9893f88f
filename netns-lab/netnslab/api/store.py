"""What etcd and the API server's cache are together: objects with resource versions, their history, and those who watch.

    create / replace / remove --> one version more --> history (the last 10,000 changes) --> everybody who watches the kind

Versions count all kinds together, as etcd's do. Pure but for the clock and uids, which are arguments; use from one thread.
Decides nothing about what objects mean.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import msgspec

from netnslab.api.kinds import KINDS, Kind
from netnslab.api.refusal import Refusal, expired, not_found
from netnslab.api.selectors import Raw, Selector, everything

HISTORY = 10_000
"""Changes that are remembered."""
Key: TypeAlias = tuple[str, str]
"""Namespace (empty where the kind has none) and name."""


class Entry:
    """One version of an object. Never changed; ``encoded`` is made once, for all who are told."""

    __slots__ = ("_encoded", "raw", "version")

    def __init__(self, raw: Raw, version: int) -> None:
        self.raw, self.version = raw, version
        self._encoded = b""

    @property
    def encoded(self) -> bytes:
        """Return it as JSON."""
        if not self._encoded:
            self._encoded = msgspec.json.encode(self.raw)
        return self._encoded


class Change(NamedTuple):
    """What became of an object: ``now`` None, it is gone (as ``last``, which has the version of its end); ``before`` None, it is new."""

    version: int
    kind: Kind
    key: Key
    before: Entry | None
    now: Entry | None
    last: Entry

    def seen(self, choose: Selector) -> tuple[str, Entry] | None:
        """Return the event as somebody sees it who watches what a selector leaves; None: nothing."""
        was = self.before is not None and choose(self.before.raw)
        is_ = self.now is not None and choose(self.now.raw)
        if is_ and self.now is not None:
            return ("MODIFIED" if was else "ADDED"), self.now
        return ("DELETED", self.last) if was else None


Watcher: TypeAlias = Callable[[Change], None]


class Store:
    """The objects of a lab."""

    def __init__(self, stamp: Callable[[], str], uid: Callable[[], str]) -> None:
        """``stamp``: the time in RFC 3339; ``uid``: a new one."""
        self._stamp, self._uid = stamp, uid
        self.version = 1
        self.floor = 1
        """Watches can go on from this version on."""
        self._held: dict[Kind, dict[Key, Entry]] = {kind: {} for kind in KINDS}
        self._history: collections.deque[Change] = collections.deque()
        self._watchers: dict[Watcher, None] = {}

    # -- reading -------------------------------------------------------------------------------------------------------

    def get(self, kind: Kind, key: Key) -> Entry:
        """Return an object. Raises Refusal."""
        found = self._held[kind].get(key)
        if found is None:
            raise not_found(kind.plural, kind.group, key[1])
        return found

    def find(self, kind: Kind, key: Key) -> Entry | None:
        """Return an object, or None."""
        return self._held[kind].get(key)

    def all(self, kind: Kind, namespace: str = "", choose: Selector = everything) -> list[Entry]:
        """Return the objects of a kind, sorted by namespace and name, of one namespace or (empty) all."""
        found = sorted(self._held[kind].items())
        return [e for (space, _), e in found if (not namespace or space == namespace) and choose(e.raw)]

    def changes(self, since: int) -> Iterator[Change]:
        """Yield what happened after a version. Raises Refusal where that is not known any more, or never was."""
        if since < self.floor or since > self.version:
            raise expired(since)
        return iter([change for change in self._history if change.version > since])

    def watch(self, watcher: Watcher) -> Callable[[], None]:
        """Tell somebody of every change from now on; returns what ends it."""
        self._watchers[watcher] = None
        return lambda: self._watchers.pop(watcher, None)

    # -- writing -------------------------------------------------------------------------------------------------------

    def load(self, kind: Kind, key: Key, raw: Raw) -> None:
        """Take in an object of an earlier life, with the version it had. Tells nobody."""
        metadata = raw.setdefault("metadata", {})
        version = int(metadata.get("resourceVersion") or 0) or self.version + 1
        self._complete(raw, version)
        self._held[kind][key] = Entry(raw, version)
        self.resume(version)

    def resume(self, version: int) -> None:
        """Begin no earlier than at a version that an earlier life had reached."""
        self.version = self.floor = max(self.version, version)

    def create(self, kind: Kind, key: Key, raw: Raw) -> Entry:
        """Add an object. Raises Refusal when there is one."""
        if key in self._held[kind]:
            resource = f"{kind.plural}.{kind.group}" if kind.group else kind.plural
            raise Refusal(409, "AlreadyExists", f'{resource} "{key[1]}" already exists', name=key[1], kind=kind.plural)
        raw = {**raw, "metadata": {**raw["metadata"], "uid": self._uid(), "creationTimestamp": self._stamp()}}
        return self._put(kind, key, None, raw)

    def replace(self, kind: Kind, key: Key, raw: Raw) -> Entry:
        """Put an object in the place of what it was. What does not differ is no change."""
        before = self.get(kind, key)
        metadata = {field: before.raw["metadata"][field] for field in ("uid", "creationTimestamp", "resourceVersion")}
        raw = {**raw, "metadata": {**raw["metadata"], **metadata}}
        return before if raw == before.raw else self._put(kind, key, before, raw)

    def remove(self, kind: Kind, key: Key) -> Entry:
        """Take an object away; returns it as it was last. Raises Refusal when there is none."""
        before = self.get(kind, key)
        del self._held[kind][key]
        self.version += 1
        last = Entry(_versioned(before.raw, self.version), self.version)
        self._tell(Change(self.version, kind, key, before, None, last))
        return last

    def _put(self, kind: Kind, key: Key, before: Entry | None, raw: Raw) -> Entry:
        self.version += 1
        entry = self._held[kind][key] = Entry(_versioned(raw, self.version), self.version)
        self._tell(Change(self.version, kind, key, before, entry, entry))
        return entry

    def _complete(self, raw: Raw, version: int) -> None:
        metadata = raw["metadata"]
        metadata.setdefault("uid", self._uid())
        metadata.setdefault("creationTimestamp", self._stamp())
        metadata["resourceVersion"] = str(version)

    def _tell(self, change: Change) -> None:
        self._history.append(change)
        if len(self._history) > HISTORY:
            self.floor = self._history.popleft().version
        for watcher in tuple(self._watchers):
            watcher(change)


def _versioned(raw: Raw, version: int) -> Raw:
    return {**raw, "metadata": {**raw["metadata"], "resourceVersion": str(version)}}
