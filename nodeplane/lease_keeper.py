"""Follows the leases in etcd in a thread of its own; the agent sees immutable results.

                    list (revision R)
                      |  claim: this node's own key (own_lease.py)      <---- lost a race: list again
                      v
    agent <--post-- book <--events-- watch from R+1
      |               |                 |
      |               '--save--> /var/lib/nodeplane/overlay.json
      '--tell--> public addresses       '-- ended, compacted, own key gone, an hour over: list again, after 0.1 to 5 s

Whatever goes wrong ends in listing again, so there is one way in which things get right. While etcd does not answer, the last
known members stay members: routes, neighbours and subnet.env are not touched. A key of ours that somebody deleted is written
again, for the same subnet if that is free; the agent never ends over it. The lease is kept when the agent ends: its pods go on.

What keys mean is for ``overlay/registry``; what becomes of members, for the pipeline.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from random import Random

import msgspec

from clusterstate.objects import IPAddress
from nodeplane import lease_store
from nodeplane.config_overlay import OverlayOptions
from nodeplane.etcd_client import CompactedError, EtcdClient, EtcdError, WatchStream
from nodeplane.etcd_wire import Event, KeyValue
from nodeplane.lease_store import STATE_FILE, Saved, SavedEntry
from nodeplane.network_config import check_network
from nodeplane.own_lease import LostRaceError, OwnLease
from nodeplane.status import LeaseStatus
from overlay.registration import Member
from overlay.registry.etcd import CONFIG, SUBNETS, NoLeaseError
from overlay.registry.etcd_book import Key, LeaseBook
from overlay.subnet_env import read_subnet_env

log = logging.getLogger("nodeplane.leases")

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between two attempts, doubled each time; a random part of up to a half is taken off."""
STEADY = 10.0
"""Seconds after which a view that lasted counts as good, and the next pause is the shortest again."""
PROBE = 60.0
"""Seconds after which etcd is asked for one key: a watch of an etcd that hangs is as silent as one where nothing happens."""
RELIST = 3600.0
"""Seconds after which everything is listed again, should a watch have missed something; a part of it off, so that nodes spread."""
MEMORY = 3600.0
"""Seconds for which nodes are remembered that an etcd which was restored or emptied does not know."""
SAVE_PAUSE = 2.0
"""Seconds at least between two writes of the state file."""


class LeaseState(msgspec.Struct, frozen=True):
    """What the agent sees. ``members`` None: not known (yet), what is programmed stays."""

    members: tuple[Member, ...] | None = None
    lease: LeaseStatus = LeaseStatus()
    network_found: bool = False
    """etcd says a network, and this agent was started without one."""


class LeaseKeeper:
    """The thread and what it knows. ``state``, ``drain``, ``tell``, ``stop`` and ``fileno`` are for the agent's thread."""

    def __init__(self, options: OverlayOptions, node: str, *, path: Path = STATE_FILE, random: Random | None = None) -> None:
        assert options.etcd is not None
        self.options, self.etcd, self.net_conf = options, options.etcd, options.net_conf
        self._path, self._random = path, random or Random()
        self._client = EtcdClient(self.etcd)
        self._own = OwnLease(self._client, self.etcd, node, self.net_conf, self._random)
        self._book = LeaseBook()
        self._public_ips: Mapping[int, IPAddress] = {}
        self._told = False
        self._error, self._lost_since = "", 0.0
        self._forget_at = 0.0
        self._saved = lease_store.load(self.etcd.prefix, path)
        self._is_dirty, self._next_save = False, 0.0
        self._stopping = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._news = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, daemon=True, name="leases")
        self._load()
        self.state = LeaseState()
        self._post()

    # -- for the agent -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread, in the network namespace of the caller."""
        self._thread.start()

    def stop(self, seconds: float = 2.0) -> None:
        """Let the thread end; the lease stays. One that waits for an answer of etcd ends with the process."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(seconds)

    def tell(self, public_ips: Mapping[int, IPAddress]) -> None:
        """Say the node's addresses, by family; the key is written anew if they differ."""
        if public_ips != self._public_ips:
            self._public_ips, self._told = dict(public_ips), True
            os.eventfd_write(self._wake, 1)

    def fileno(self) -> int:
        """Return a descriptor that is readable when ``state`` is another."""
        return self._news

    def drain(self) -> bool:
        """Empty that descriptor; whether there was news. Never blocks."""
        return _read_eventfd(self._news)

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        attempts = 0
        while not self._stopping:
            began = time.monotonic()
            self._attempt()
            self._save(at_once=True)  # perhaps etcd is away for long, and the machine is next
            if self._stopping:
                break
            attempts = 0 if time.monotonic() - began > STEADY else min(attempts + 1, 10)
            longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempts)
            self._wait(longest * self._random.uniform(0.5, 1.0))

    def _attempt(self) -> None:
        """Follow etcd until that fails or ends; what happened is in the log and in the state."""
        try:
            self._list_and_follow()
        except LostRaceError:
            log.info("another node was faster: choosing again")
        except CompactedError as error:
            log.info("%s: listing again", error)
        except NoLeaseError as error:
            if str(error) != self._error:
                log.warning("no lease: %s", error)
            self._lost_since, self._error = 0.0, str(error)
            self._post()
        except EtcdError as error:
            self._lose(str(error))
        except Exception as error:
            # The overlay must not stop being followed over a mistake of ours: said loudly, and tried again.
            log.exception("following leases")
            self._lose(f"{type(error).__name__}: {error}")

    def _list_and_follow(self) -> None:
        """List, see to the own key, and follow until something asks for another listing."""
        self._told = False
        listing = self._client.list(f"{self.etcd.prefix}/")
        before, self._is_dirty = self._book.revision, True
        self._book.replace(map(self._key, listing.kvs), listing.header.revision)
        if self._book.revision < before:
            self._forget_at = time.monotonic() + MEMORY
            log.warning("etcd is at revision %d and was at %d: remembering who was there", self._book.revision, before)
        if self._may_claim():
            self._claim()
        with contextlib.closing(self._client.watch(f"{self.etcd.prefix}/", listing.header.revision + 1)) as stream:
            if self._lost_since:
                log.info("etcd answers again, after %.1f s", time.time() - self._lost_since)
            self._lost_since, self._error = 0.0, ""
            self._post()
            self._follow(stream)

    def _may_claim(self) -> bool:
        return bool(self.net_conf.families and self._public_ips)

    def _claim(self) -> None:
        before = self._own.key
        self._own.claim(self._book, self._public_ips)
        if self._own.key != before:
            log.log(logging.WARNING if before else logging.INFO, "this node's subnet is %s", self._own.key)
        self._post()
        self._save(at_once=True)

    def _follow(self, stream: WatchStream) -> None:
        now = time.monotonic()
        relist_at, probe_at = now + RELIST * self._random.uniform(0.5, 1.0), now + PROBE
        while not self._stopping and not self._told:
            now = time.monotonic()
            if now >= relist_at:
                return
            if now >= probe_at:
                self._client.get(f"{self.etcd.prefix}/{CONFIG}")
                self._own.contest, probe_at = "", time.monotonic() + PROBE
                self._post()
            if self._book.remembered and now >= self._forget_at:
                self._book.forget()
                self._post()
            if self._own.renew_at is not None and now >= self._own.renew_at:
                if not self._own.renew():
                    return
                self._is_dirty = True
                self._post()
            self._save()
            self._wait(self._seconds_until(min(relist_at, probe_at)), stream)
            if not self._take(stream.read()):
                return

    def _take(self, events: list[Event]) -> bool:
        """Take in changes; False: the own key is not as it should be."""
        for event in events:
            if event.type == "DELETE":
                self._book.delete(self._name(event.kv), event.kv.mod_revision)
            else:
                self._book.put(*self._key(event.kv))
        if not events:
            return True
        self._is_dirty = True
        if self._may_claim() and not self._own.holds(self._book):
            log.warning("the lease %s was deleted or changed by somebody: taking it again", self._own.key)
            return False
        self._post()
        return True

    def _seconds_until(self, otherwise: float) -> float:
        times = [otherwise]
        times += [self._own.renew_at] if self._own.renew_at is not None else []
        times += [self._next_save] if self._is_dirty else []
        times += [self._forget_at] if self._book.remembered else []
        return max(0.0, min(times) - time.monotonic())

    def _wait(self, seconds: float, stream: WatchStream | None = None) -> None:
        """Wait for the stream, for the agent, or for that long."""
        if stream is not None and stream.pending:
            return
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        if stream is not None:
            poller.register(stream.fileno(), select.POLLIN)
        poller.poll(1000 * seconds)
        _read_eventfd(self._wake)

    # -- what the agent and the next one see -------------------------------------------------------------------------

    def _post(self) -> None:
        """Let the agent know, if there is anything new."""
        own = self._own.member
        members = self._book.members(own, self._own.key, self.net_conf) if own else None
        found, problem = check_network(self.options, self._book.config)
        state = LeaseState(
            members,
            LeaseStatus(
                subnets=tuple(map(str, self._own.entry.subnets.networks)) if self._own.entry else (),
                until=self._own.until,
                endpoint=self._client.endpoint,
                lost_since=self._lost_since,
                error=self._error,
                problems=tuple(text for text in (self._own.contest, problem) if text),
            ),
            network_found=found is not None and not self.net_conf.families,
        )
        if state.network_found and not self.state.network_found:
            self._save(at_once=True)  # the agent starts anew over this: it shall find it, whatever becomes of etcd
        if state != self.state:
            self.state = state
            os.eventfd_write(self._news, 1)

    def _lose(self, error: str) -> None:
        """Note that etcd does not answer; everything that is known stays."""
        if not self._lost_since:
            log.warning("etcd is lost, what is known is kept: %s", error)
            self._lost_since = time.time()
        self._error = error
        self._post()

    def _load(self) -> None:
        """Begin with what was known last."""
        for name, one in self._saved.entries.items():
            self._book.put(SUBNETS + name, one.value, one.lease, one.revision)
        with contextlib.suppress(OSError, UnicodeDecodeError):
            self._own.previous = read_subnet_env(Path(self.options.subnet_file).read_text())
        own = self._book.entries.get(self._saved.own)
        if own is not None:
            self._own.resume(own, self._saved.until)
        self._book.config = self._saved.config

    def _save(self, *, at_once: bool = False) -> None:
        """Write the state file if it would be another and it is time."""
        now = time.monotonic()
        if not self._is_dirty or (now < self._next_save and not at_once):
            return
        self._is_dirty, self._next_save = False, now + SAVE_PAUSE
        found, _ = check_network(self.options, self._book.config)
        current = Saved(
            self.etcd.prefix,
            self._book.config if found is not None else self._saved.config,
            own=self._own.key,
            until=self._own.until,
            entries={e.subnets.name: SavedEntry(e.value, e.lease, e.revision) for e in self._book.known},
        )
        if current == self._saved:
            return
        try:
            lease_store.save(current, self._path)
            self._saved = current
        except OSError as error:
            log.warning("write %s: %s", self._path, error.strerror)

    # -- keys --------------------------------------------------------------------------------------------------------

    def _name(self, kv: KeyValue) -> str:
        return kv.key.decode(errors="replace").removeprefix(f"{self.etcd.prefix}/")

    def _key(self, kv: KeyValue) -> Key:
        return self._name(kv), kv.value.decode(errors="replace"), kv.lease, kv.mod_revision


def _read_eventfd(descriptor: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        return os.eventfd_read(descriptor) > 0
    return False
