"""A forwarder in memory: a process that is there or not, with a table, and that can be killed, changed and broken.

Implements ``reconcile_forwarder.ForwarderPort`` for tests that need no kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from kernelstate.errors import KernelRefusedError
from kernelstate.objects.address import Prefix
from kernelstate.objects.tunnel import TunnelPeer, UdpTunnel
from kernelstate.reconcile_forwarder import PeerChange


class FakeProcess:
    """A running forwarder. ``arguments`` are a tunnel without peers."""

    def __init__(self, arguments: UdpTunnel, program: str, table: dict[Prefix, TunnelPeer]) -> None:
        self.arguments, self.program, self.table = arguments, program, table


class FakeForwarder:
    """The machine's forwarder, and the agent's view of it. ``written`` counts lines, ``spoiled`` makes everything fail."""

    def __init__(self, refuse: Callable[[PeerChange], bool] = lambda _c: False) -> None:
        self.process: FakeProcess | None = None
        self.program = "1"
        """What would be started now."""
        self.starts = self.replaced = self.written = self.whole_tables = 0
        self.spoiled = False
        self.refuse = refuse
        self._known: FakeProcess | None = None

    # -- ForwarderPort -----------------------------------------------------------------------------------------------

    def ensure(self, tunnel: UdpTunnel) -> bool:
        """Keep, replace or start the process; one that is replaced by another program hands over its table."""
        self._check("start")
        arguments = msgspec.structs.replace(tunnel, peers=(), uplink="")
        running = self.process
        before = (self.starts, self.replaced)
        if running is None or running.arguments != arguments:
            self.starts += 1
            self.process = FakeProcess(arguments, self.program, {})
        elif running.program != self.program:
            self.replaced += 1
            self.process = FakeProcess(arguments, self.program, running.table)
        self._known = self.process
        return before != (self.starts, self.replaced)

    def peers(self) -> tuple[TunnelPeer, ...]:
        """Return the table of the process."""
        return tuple(sorted(self._asked("show peers").table.values()))

    def replace(self, peers: Sequence[TunnelPeer]) -> None:
        """Exchange the whole table."""
        self._asked("peers commit").table = {peer.prefix: peer for peer in peers}
        self.whole_tables += 1
        self.written += len(peers)

    def apply(self, changes: Sequence[PeerChange]) -> list[str]:
        """Do each, going on after failures."""
        table = self._asked("peer").table
        answers = []
        for change in changes:
            if self.refuse(change):
                answers.append("refused by the test")
                continue
            answers.append("")
            self.written += 1
            if change.gone:
                table.pop(change.peer.prefix, None)
            else:
                table[change.peer.prefix] = change.peer
        return answers

    def is_alive(self) -> bool:
        """Whether the process that was last ensured is the one that runs."""
        return self._known is not None and self._known is self.process

    def stop(self) -> bool:
        """End it."""
        self._check("stop")
        was, self.process = self.process, None
        return was is not None

    # -- somebody else -----------------------------------------------------------------------------------------------

    def kill(self) -> None:
        """Kill it, whatever it was doing."""
        self.process = None

    def _asked(self, what: str) -> FakeProcess:
        self._check(what)
        if self.process is None:
            raise KernelRefusedError(what, "forwarder", "Connection refused")
        return self.process

    def _check(self, what: str) -> None:
        if self.spoiled:
            raise KernelRefusedError(what, "forwarder", "spoiled by the test")
