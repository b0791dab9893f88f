"""Asks peers in the background whether checksums that are left to the uplink's hardware arrive right; the agent never waits.

    agent --take(links, peers)--> thread --probe--> a peer: good    that was it
      ^                             |                     : bad     the link's checksums are to be finished before
      '--- fileno, drain, unfit <---'                     : unknown another peer, later and later

A verdict is about the hardware, so it outlives the link: one that is made anew is set as the old one was. A link that an earlier
agent, or somebody's udev rule, has already set is left so: a probe through it would find nothing wrong.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from kernelstate.linux import ethtool
from kernelstate.linux.offload_probe import End, Verdict, probe
from overlay.netconf import VxlanBackend
from overlay.table import PeerTable, Reach

log = logging.getLogger("nodeplane.checksums")

FIRST, LONGEST = 0.5, 300.0
"""Seconds before the first question (the link is just being made), and at most between two."""
PEERS = 3
"""So many peers are asked in a row."""


class Task(NamedTuple):
    """One link, its own end, and who can be asked through it."""

    own: End
    peers: tuple[End, ...]


class ChecksumTest:
    """The test of one node's links. ``take``, ``unfit`` and ``drain`` are for the agent's thread."""

    def __init__(
        self,
        links: Iterable[str],
        ask: Callable[[str, End, End], Verdict] = probe,
        is_left_to_it: Callable[[str], bool] = ethtool.tx_checksum,
    ) -> None:
        self._ask, self._is_left_to_it = ask, is_left_to_it
        self.unfit = frozenset(link for link in links if not self._is_left(link))
        """Links whose checksums are to be finished before."""
        self._tasks: dict[str, Task] = {}
        self._judged: set[str] = set(self.unfit)
        self._changed = threading.Event()
        self._stopped = False
        self._news = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="checksums", daemon=True)

    def _is_left(self, link: str) -> bool:
        try:
            return self._is_left_to_it(link)
        except OSError:
            return True  # there is no such link yet

    def take(self, tasks: Mapping[str, Task]) -> None:
        """Ask through these links from now on, as far as nothing is known of them yet."""
        if dict(tasks) == self._tasks:
            return
        self._tasks = dict(tasks)
        self._changed.set()
        if not self._thread.ident and set(tasks) - self._judged:
            self._thread.start()

    def fileno(self) -> int:
        """Return a descriptor that is readable when ``unfit`` has changed."""
        return self._news

    def drain(self) -> bool:
        """Whether ``unfit`` has changed since the last call. Never blocks."""
        try:
            return os.eventfd_read(self._news) > 0
        except BlockingIOError:
            return False

    def stop(self) -> None:
        """End the thread; it may still be waiting for one answer."""
        self._stopped = True
        self._changed.set()
        if self._thread.ident:
            self._thread.join(5.0)
        os.close(self._news)

    # -- in the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = FIRST
        while not self._stopped:
            waiting = {link: task for link, task in self._tasks.items() if link not in self._judged}
            if self._changed.wait(pause if waiting else None):
                self._changed.clear()
                pause = FIRST  # other peers: they may answer
                continue
            for link, task in waiting.items():
                self._judge(link, task)
            pause = min(LONGEST, 2 * pause)

    def _judge(self, link: str, task: Task) -> None:
        for peer in task.peers[:PEERS]:
            try:
                verdict = self._ask(link, task.own, peer)
            except OSError:
                return  # no link, or down: later
            if self._stopped or verdict == "unknown":
                continue
            self._judged.add(link)
            if verdict == "bad":
                log.warning(
                    "%s: packets whose checksum is left to hardware do not reach %s: finished before", link, peer.address
                )
                self.unfit |= {link}
                os.eventfd_write(self._news, 1)
            return


def tasks_of(table: PeerTable) -> dict[str, Task]:
    """Return who can be asked through which link: peers behind vxlan, by their ends' addresses."""
    backend = table.net_conf.backend
    if not isinstance(backend, VxlanBackend):
        return {}
    found = {}
    for end in table.own:
        ways = [way for way in table.ways(end.family) if way.reach is Reach.VXLAN and way.vtep is not None]
        peers: Sequence[End] = [End(way.vtep.mac, way.pod_cidr.network_address) for way in ways if way.vtep]
        if end.vtep is not None and peers:
            own = End(end.vtep.mac, end.pod_cidr.network_address)
            found[backend.link_name(end.family)] = Task(own, tuple(peers))
    return found
