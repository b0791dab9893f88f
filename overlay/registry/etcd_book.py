"""All leases of a cluster as this node knows them, moved along by what etcd tells. Pure.

    list at revision R --replace--> book <--put, delete-- changes after R
                                     |
                                     +--> members: who is in the overlay
                                     '--> known: what is taken

An etcd that comes back with a lower revision than it had was restored or emptied: it has not seen the leases that are missing,
so it cannot have ended them. Their nodes are remembered until they write again, or ``forget`` is called. A key that is missing at
a higher revision has been deleted while nobody looked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from clusterstate.objects import IPNetwork
from overlay.netconf import NetConf
from overlay.registration import Member
from overlay.registry.etcd import SUBNETS, Entry, LeaseError, Subnets, parse_entry, parse_key, read_members
from overlay.table import PeerProblem

Key = tuple[str, str, int, int]
"""Name below the prefix, value, number of the etcd lease, revision."""


SHOWN = 200
"""Characters of a value that makes no sense."""


class LeaseBook:
    """What is below the prefix. Names are relative to it."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        """By the last part of the key."""
        self.remembered: dict[str, Entry] = {}
        """What an earlier state of etcd had."""
        self.config: str | None = None
        self.revision = 0
        self._faults: dict[str, PeerProblem] = {}

    def replace(self, keys: Iterable[Key], revision: int) -> None:
        """Take in a full listing."""
        before = self.remembered
        if revision < self.revision:
            before = before | self.entries
        self.entries, self.remembered, self._faults, self.config = {}, {}, {}, None
        self.revision = revision
        for name, value, lease, changed in keys:
            self.put(name, value, lease, changed)
        back = {entry.attrs.public_ip for entry in self.entries.values()}
        self.remembered = {
            name: entry
            for name, entry in before.items()
            if name not in self.entries and entry.attrs.public_ip not in back and not self._overlaps(entry)
        }

    def put(self, name: str, value: str, lease: int, revision: int) -> None:
        """Take in one key; what is older than what is known changes nothing."""
        self.revision = max(self.revision, revision)
        if name == "config":
            self.config = value
        if not name.startswith(SUBNETS):
            return
        key = name.removeprefix(SUBNETS)
        if key in self.entries and self.entries[key].revision > revision:
            return
        self._drop(key)
        try:
            entry = parse_entry(key, value, lease, revision)
        except LeaseError as error:
            self._faults[key] = PeerProblem(key, "etcd value", error.value[:SHOWN], error.reason)
            return
        self.entries[key] = entry
        self.remembered = {k: e for k, e in self.remembered.items() if not _is_replaced(e, entry)}

    def delete(self, name: str, revision: int) -> None:
        """Take in that a key is gone."""
        self.revision = max(self.revision, revision)
        if name == "config":
            self.config = None
        key = name.removeprefix(SUBNETS)
        if key not in self.entries or self.entries[key].revision <= revision:
            self._drop(key)

    def forget(self) -> None:
        """Let go of what only an earlier state of etcd had."""
        self.remembered = {}

    @property
    def known(self) -> list[Entry]:
        """All leases, those that are remembered included."""
        return [*self.entries.values(), *self.remembered.values()]

    @property
    def unreadable(self) -> list[IPNetwork]:
        """Subnets whose key is there with a value that makes no sense: nobody can take them."""
        found: list[IPNetwork] = []
        for key in sorted(self._faults):
            with contextlib.suppress(ValueError):
                found += parse_key(key).networks
        return found

    def members(self, own: Member, own_key: str, net_conf: NetConf) -> tuple[Member, ...]:
        """Return who is in the overlay, this node first, and what could not be read."""
        found = read_members(self.known, own, own_key, net_conf)
        return (*found, *(Member(key, (), (self._faults[key],)) for key in sorted(self._faults)))

    def _drop(self, key: str) -> None:
        self.entries.pop(key, None)
        self._faults.pop(key, None)

    def _overlaps(self, entry: Entry) -> bool:
        return any(_share(entry.subnets, other.subnets) for other in self.entries.values())


def _is_replaced(old: Entry, new: Entry) -> bool:
    return old.attrs.public_ip == new.attrs.public_ip or _share(old.subnets, new.subnets)


def _share(a: Subnets, b: Subnets) -> bool:
    return a.v4.overlaps(b.v4) or (a.v6 is not None and b.v6 is not None and a.v6.overlaps(b.v6))
