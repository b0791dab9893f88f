"""The tables of all Services at the socket: what each contributes put together, changes followed.

A contribution is a pure function of a Service's entries, so that of before is computed again rather than kept. Whatever the order
of updates, the tables equal those of the last cluster rendered afresh (tests/property).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from clusterstate.snapshot import Name
from kernelstate.objects.address import Family
from kernelstate.objects.ebpf import SocketChange, SocketFrontend, SocketTables
from proxy.render.ebpf import NOTHING, SocketContext, SocketContribution, own_addresses, render_entries
from proxy.settings import NodeFacts, ProxySettings
from proxy.table import ServiceEntry, ServiceTable


class EbpfProgram:
    """What the programs at sockets shall know of every Service; ``tables`` are updated in place."""

    def __init__(self, settings: ProxySettings, node: NodeFacts, families: Iterable[Family]) -> None:
        self._context = SocketContext.of(settings, node, families)
        self.tables = SocketTables({}, {}, own_addresses(settings, node, families))
        self._entries: dict[Name, tuple[ServiceEntry, ...]] = {}

    def update(self, entries: Mapping[Name, tuple[ServiceEntry, ...]], names: Iterable[Name] | None) -> SocketChange:
        """Render the Services in ``names`` again (None: all) from ``entries``; return what differs now."""
        moved: list[tuple[SocketContribution, SocketContribution]] = []
        for name in dict.fromkeys((*self._entries, *entries) if names is None else names):
            before, after = self._entries.pop(name, ()), entries.get(name, ())
            if after:
                self._entries[name] = after
            if before != after:
                moved.append((self._render(before), self._render(after)))
        return self._replace(moved)

    def _render(self, entries: tuple[ServiceEntry, ...]) -> SocketContribution:
        return render_entries(self._context, entries) if entries else NOTHING

    def _replace(self, moved: list[tuple[SocketContribution, SocketContribution]]) -> SocketChange:
        """Take out first, of all: what one Service gives up another may claim."""
        frontends: set[SocketFrontend] = set()
        pools: set[int] = set()
        tables = self.tables
        for old, new in moved:
            for key in old.frontends.keys() - new.frontends.keys():
                del tables.frontends[key]
                frontends.add(key)
            for number in old.pools.keys() - new.pools.keys():
                del tables.pools[number]
                pools.add(number)
        for old, new in moved:
            changed = {number for number, pool in new.pools.items() if old.pools.get(number) != pool}
            for key, service in new.frontends.items():
                if old.frontends.get(key) != service or service.pool in changed:
                    frontends.add(key)
                    tables.frontends[key] = service
            tables.pools.update({number: new.pools[number] for number in changed})
            pools |= changed
        return SocketChange(frozenset(frontends), frozenset(pools))


def render_ebpf(
    table: ServiceTable, settings: ProxySettings, node: NodeFacts, families: Iterable[Family] = (4, 6)
) -> SocketTables:
    """Render a whole table of Services."""
    program = EbpfProgram(settings, node, families)
    program.update(table.entries, None)
    return program.tables
