"""One shape for what a mode asks of the kernel: the programs that render Services, side by side.

    mode       chains and anchors   tables   servers, sets, addresses
    iptables   all of it
    ipvs       what surrounds it             all of it
    nftables                        all of it
    ebpf                            all of it, and before them what sockets are told

The pipeline moves whichever program the configuration names along with the cluster; ``kernel.py`` hands its state to the
reconcilers. A change names what may differ, so that nobody compares ten thousand Services for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Protocol

import msgspec

from clusterstate.snapshot import Name
from kernelstate.objects.address import Family, Prefix
from kernelstate.objects.ebpf import SocketChange, SocketTables
from kernelstate.objects.ipvs import IpvsState, ServerKey
from kernelstate.objects.netfilter import Anchor, ChainKey, Rule
from kernelstate.objects.nftables import Table, TableChange
from kernelstate.objects.sets import IpSet, IpSets
from proxy.render.iptables_program import IptablesProgram
from proxy.settings import NodeFacts, ProxySettings
from proxy.table import ServiceEntry

Entries = Mapping[Name, tuple[ServiceEntry, ...]]


class ServiceState(msgspec.Struct, frozen=True):
    """What should exist for Services. The mappings are the program's own, updated in place."""

    chains: dict[ChainKey, tuple[Rule, ...]] = {}
    anchors: tuple[Anchor, ...] = ()
    tables: dict[Family, Table] = {}
    servers: IpvsState = {}
    sets: IpSets = {}
    addresses: AbstractSet[Prefix] = frozenset()
    """What the node itself holds for Services, as host prefixes."""
    sysctls: tuple[tuple[str, str], ...] = ()
    sockets: SocketTables = SocketTables()

    @property
    def elements(self) -> int:
        """How many elements the tables hold."""
        return sum(len(held) for table in self.tables.values() for held in table.elements.values())


class ServiceChange(msgspec.Struct, frozen=True):
    """What may differ from the state before."""

    chains: frozenset[ChainKey] = frozenset()
    tables: dict[Family, TableChange] = {}
    servers: frozenset[ServerKey] = frozenset()
    sets: frozenset[str] = frozenset()
    addresses: frozenset[Prefix] = frozenset()
    sockets: SocketChange = SocketChange()


class ServiceProgram(Protocol):
    """One mode's rendered Services, moved along by changes."""

    node: NodeFacts
    families: tuple[Family, ...]

    @property
    def endpoints(self) -> int:
        """Endpoints reachable through any Service, counted once a ServicePort."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What is asked for and cannot be had, one line each."""

    @property
    def state(self) -> ServiceState:
        """What should exist now."""

    def update(self, entries: Entries, names: Iterable[Name] | None) -> ServiceChange:
        """Render the Services in ``names`` again (None: all) and say what may differ now."""


class IptablesServices:
    """Mode ``iptables``."""

    def __init__(self, settings: ProxySettings, node: NodeFacts, families: Iterable[Family]) -> None:
        self.node = node
        self.families = tuple(families)
        self._program = IptablesProgram(settings, node, self.families)

    @property
    def endpoints(self) -> int:
        """See ``ServiceProgram``."""
        return self._program.endpoints

    @property
    def problems(self) -> tuple[str, ...]:
        """See ``ServiceProgram``."""
        return self._program.problems

    @property
    def state(self) -> ServiceState:
        """See ``ServiceProgram``."""
        return ServiceState(self._program.chains, self._program.ruleset.anchors)

    def update(self, entries: Entries, names: Iterable[Name] | None) -> ServiceChange:
        """See ``ServiceProgram``."""
        return ServiceChange(frozenset(self._program.update(entries, names)))


class NftablesServices:
    """Mode ``nftables``."""

    def __init__(self, settings: ProxySettings, node: NodeFacts, families: Iterable[Family]) -> None:
        self.node = node
        self.families = tuple(families)
        from proxy.render.nftables_program import NftablesProgram  # noqa: PLC0415 (only where the mode asks for it)

        self._program = NftablesProgram(settings, node, self.families)

    @property
    def endpoints(self) -> int:
        """See ``ServiceProgram``."""
        return self._program.endpoints

    @property
    def problems(self) -> tuple[str, ...]:
        """See ``ServiceProgram``."""
        return self._program.problems

    @property
    def state(self) -> ServiceState:
        """See ``ServiceProgram``."""
        return ServiceState(tables=self._program.tables)

    def update(self, entries: Entries, names: Iterable[Name] | None) -> ServiceChange:
        """See ``ServiceProgram``."""
        return ServiceChange(tables=self._program.update(entries, names))


class EbpfServices(NftablesServices):
    """Mode ``ebpf``: what sockets are told, and the rules of mode ``nftables`` for all that comes as packets.

    Those have no NodePorts on loopback, which only sockets can have.
    """

    def __init__(self, settings: ProxySettings, node: NodeFacts, families: Iterable[Family]) -> None:
        from proxy.render.ebpf_program import EbpfProgram  # noqa: PLC0415 (only where the mode asks for it)

        super().__init__(msgspec.structs.replace(settings, localhost_node_ports=False), node, families)
        self._sockets = EbpfProgram(settings, node, self.families)

    @property
    def state(self) -> ServiceState:
        """See ``ServiceProgram``."""
        return ServiceState(tables=self._program.tables, sockets=self._sockets.tables)

    def update(self, entries: Entries, names: Iterable[Name] | None) -> ServiceChange:
        """See ``ServiceProgram``."""
        names = None if names is None else tuple(names)
        return ServiceChange(tables=self._program.update(entries, names), sockets=self._sockets.update(entries, names))


class IpvsServices:
    """Mode ``ipvs``."""

    def __init__(self, settings: ProxySettings, node: NodeFacts, families: Iterable[Family]) -> None:
        from proxy.render.ipvs import SET_TYPES, set_spec  # noqa: PLC0415 (only where the mode asks for it)
        from proxy.render.ipvs_program import IpvsProgram  # noqa: PLC0415

        self.node = node
        self.families = tuple(families)
        self._program = IpvsProgram(settings, node, self.families)
        specs = [set_spec(name, family) for family in self.families for name in SET_TYPES]
        self._specs = {spec.name: spec for spec in specs}
        self._sets: IpSets = {}
        self._addresses: set[Prefix] = set()

    @property
    def endpoints(self) -> int:
        """See ``ServiceProgram``."""
        return self._program.endpoints

    @property
    def problems(self) -> tuple[str, ...]:
        """See ``ServiceProgram``."""
        return self._program.problems

    @property
    def state(self) -> ServiceState:
        """See ``ServiceProgram``."""
        program = self._program
        return ServiceState(
            program.chains,
            program.anchors,
            servers=program.servers,
            sets=self._sets,
            addresses=self._addresses,
            sysctls=program.sysctls,
        )

    def update(self, entries: Entries, names: Iterable[Name] | None) -> ServiceChange:
        """See ``ServiceProgram``. Sets are values: those that changed are made again, the others stay the same objects."""
        change = self._program.update(entries, names)
        for name, moved in change.sets.items():
            members = (self._sets[name].members if name in self._sets else frozenset()) - moved.removed | moved.added
            if members:
                self._sets[name] = IpSet(self._specs[name], members)
            else:
                del self._sets[name]
        self._addresses -= change.removed_addresses
        self._addresses |= change.added_addresses
        return ServiceChange(
            change.chains,
            servers=change.servers,
            sets=frozenset(change.sets),
            addresses=change.added_addresses | change.removed_addresses,
        )


PROGRAMS: dict[str, Callable[[ProxySettings, NodeFacts, tuple[Family, ...]], ServiceProgram]] = {
    "iptables": IptablesServices,
    "ipvs": IpvsServices,
    "nftables": NftablesServices,
    "ebpf": EbpfServices,
}
"""The program of each mode."""
