"""The same tables of Services in several places, as one: what sockets ask, and what packets ask.

    SocketReconciler --> SeveralMaps --+--> programs at sockets
                                       '--> the short lane's program

Whoever is alike is written to together. Where one has lost its tables, or holds others, all are filled anew: that is rare, costs no
connection, and nobody has to keep books on each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kernelstate.reconcile_ebpf import ServiceMapsPort
from kernelstate.service_layout import Contents, MapWrite, Sizes


class SeveralMaps:
    """Implements ``ServiceMapsPort`` over at least one other."""

    def __init__(self, ports: Sequence[ServiceMapsPort]) -> None:
        self._ports = ports

    def observe(self) -> tuple[Sizes, Contents] | None:
        """Return what all of them hold; None if one has nothing or another content."""
        found = [port.observe() for port in self._ports]
        first = found[0]
        if first is None or any(one is None or not _are_alike(one, first) for one in found):
            return None
        return first

    def install(self, sizes: Sizes, writes: Sequence[MapWrite]) -> None:
        """Fill each, one after the other."""
        for port in self._ports:
            port.install(sizes, writes)

    def write(self, writes: Sequence[MapWrite]) -> None:
        """Change each."""
        for port in self._ports:
            port.write(writes)

    def is_intact(self) -> bool:
        """Whether all are."""
        return all(port.is_intact() for port in self._ports)

    def remove(self) -> bool:
        """Take all off; whether there was anything."""
        found = [port.remove() for port in self._ports]
        return any(found)

    def counters(self) -> Mapping[str, int]:
        """Return what each counts."""
        return {name: count for port in self._ports for name, count in port.counters().items()}


def _are_alike(one: tuple[Sizes, Contents], other: tuple[Sizes, Contents]) -> bool:
    (sizes, held), (other_sizes, other_held) = one, other
    return (
        sizes == other_sizes
        and held.frontends == other_held.frontends
        and held.slots == other_held.slots
        and held.own == other_held.own
        and set(held.members) == set(other_held.members)
    )
