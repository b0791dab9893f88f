"""This node's own key in etcd: taken, kept and renewed. Every step compares before it writes, so a race has one winner.

    choose (pure) --> grant --> txn: if nothing changed since the listing { delete stale keys; put key } --> held
                                  '-- else: revoke, LostRaceError: whoever called lists again

A lease that is there already is kept and let begin anew, not replaced: the other nodes hear nothing, and etcd is left with no
empty lease. A reservation is written without one. Which key it is to be is for ``overlay/registry/etcd_claim.py``, when to ask for
``lease_keeper.py``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from ipaddress import IPv4Address
from random import Random

import msgspec

from clusterstate.objects import IPAddress, IPNetwork
from nodeplane.config_overlay import EtcdOptions
from nodeplane.etcd_client import EtcdClient
from overlay.netconf import NetConf
from overlay.registration import Member
from overlay.registry.etcd import LEASE_SECONDS, SUBNETS, Entry, NoLeaseError, own_attrs, own_member, print_attrs
from overlay.registry.etcd_book import LeaseBook
from overlay.registry.etcd_claim import Claim, Held, choose
from overlay.registry.subnets import pools_of


class LostRaceError(Exception):
    """Somebody else wrote meanwhile: list again."""


class OwnLease:
    """What this node holds. ``entry`` None: nothing yet. ``until``: seconds since the epoch, 0 for a reservation."""

    def __init__(self, client: EtcdClient, options: EtcdOptions, node: str, net_conf: NetConf, random: Random) -> None:
        self._client, self._options, self._random = client, options, random
        self._node, self._net_conf = node, net_conf
        self.entry: Entry | None = None
        self.until = 0.0
        self.renew_at: float | None = None
        """On the monotonic clock."""
        self.previous: tuple[IPNetwork, ...] = ()
        """Subnets the node had, as far as that is known."""
        self.contest = ""
        """Who else writes this key, if anybody does."""

    @property
    def key(self) -> str:
        """The key's last part; empty: there is none."""
        return self.entry.subnets.name if self.entry else ""

    @property
    def member(self) -> Member | None:
        """This node as it states itself."""
        return own_member(self._node, self.entry.subnets, self.entry.attrs, self._net_conf) if self.entry else None

    def resume(self, entry: Entry, until: float) -> None:
        """Begin with what was held before the agent started, if it is still of this network; etcd need not be there."""
        if {one.version for one in entry.subnets.networks} != set(self._net_conf.families):
            return
        if not own_member(self._node, entry.subnets, entry.attrs, self._net_conf).problems:
            self.entry, self.until = entry, until

    def claim(self, book: LeaseBook, public_ips: Mapping[int, IPAddress]) -> None:
        """See to it that etcd, as the book has it, holds this node's key. Raises EtcdError, NoLeaseError, LostRaceError."""
        public_ip, before = public_ips.get(4), self.entry
        if not isinstance(public_ip, IPv4Address):
            raise NoLeaseError("this node has no IPv4 address to tell the others; set overlay.publicIP or overlay.iface")
        claim = choose(
            [*book.entries.values(), *(e for e in book.remembered.values() if not self._is_mine(e, public_ip))],
            pools_of(self._net_conf),
            public_ip,
            held=Held(before.subnets.name, before.lease) if before else None,
            previous=(*(before.subnets.networks if before else ()), *self.previous),
            blocked=book.unreadable,
            random=self._random,
        )
        earlier = [e.attrs for e in (claim.entry, *claim.stale, before) if e is not None]
        attrs = own_attrs(self._net_conf, self._node, public_ips, earlier)
        held = self._write(claim, Entry(claim.subnets, attrs, print_attrs(attrs)))
        for stale in claim.stale:
            book.delete(SUBNETS + stale.subnets.name, held.revision)
        book.put(SUBNETS + held.subnets.name, held.value, held.lease, held.revision)
        self.entry = held

    def renew(self) -> bool:
        """Let the lease begin anew; False: it has ended. Raises EtcdError."""
        assert self.entry is not None
        seconds = self._client.keep_alive(self.entry.lease)
        self._set_times(seconds)
        return seconds > 0

    def holds(self, book: LeaseBook) -> bool:
        """Whether etcd, as the book has it, still holds the key as this node wrote it."""
        assert self.entry is not None
        found = book.entries.get(self.key)
        if found is not None and found.value != self.entry.value:
            self.contest = f"etcd key {self.key}: somebody else writes it as well: {found.value}"
        return found is not None and (found.value, found.lease) == (self.entry.value, self.entry.lease)

    def path(self, name: str) -> str:
        """Return a key of etcd by its last part."""
        return f"{self._options.prefix}/{SUBNETS}{name}"

    def _is_mine(self, entry: Entry, public_ip: IPv4Address) -> bool:
        return entry.attrs.public_ip == public_ip or entry.subnets.name == self.key

    def _write(self, claim: Claim, wanted: Entry) -> Entry:
        """Carry out a claim: write what differs, under the lease that is there or a new one; none for a reservation."""
        found, lease, seconds, granted = claim.entry, 0, 0, 0
        if found is None or found.lease:
            lease, seconds = (found.lease, self._seconds_left(found.lease)) if found else (0, 0)
            if seconds <= 0:
                lease, seconds = granted, _ = self._client.grant(LEASE_SECONDS), LEASE_SECONDS
        revision = found.revision if found else 0
        if granted or claim.stale or found is None or found.value != wanted.value:
            revision = self._put(claim, wanted, lease, granted)
        self._set_times(seconds if lease else None)
        return msgspec.structs.replace(wanted, lease=lease, revision=revision)

    def _put(self, claim: Claim, wanted: Entry, lease: int, granted: int) -> int:
        """Write in one step, if all is still as it was listed; return the revision."""
        key = self.path(wanted.subnets.name)
        stale = {self.path(entry.subnets.name): entry.revision for entry in claim.stale}
        expect = {**stale, key: claim.entry.revision if claim.entry else 0}
        answer = self._client.write(key, wanted.value, lease=lease, expect=expect, delete=sorted(stale))
        if answer.succeeded:
            return answer.header.revision
        if granted:
            self._client.revoke(granted)
        raise LostRaceError

    def _seconds_left(self, lease: int) -> int:
        """Return what a lease has left, renewed first if that is due."""
        left = self._client.time_to_live(lease)
        return self._client.keep_alive(lease) if 0 < left <= self._options.renew_margin else left

    def _set_times(self, seconds: int | None) -> None:
        """Note how long the lease is; None: for ever. One shorter than the margin is renewed after a third of it."""
        if seconds is None:
            self.until, self.renew_at = 0.0, None
            return
        margin = self._options.renew_margin
        self.until = time.time() + seconds
        self.renew_at = time.monotonic() + (seconds - margin if seconds > margin else seconds / 3)
