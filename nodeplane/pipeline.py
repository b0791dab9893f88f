"""From a snapshot to what the kernel should hold, for one node: pure, and as incremental as the change is small.

    Update --> ServiceCompiler --> the mode's program --.
       |                                                +--> Desired (rules, tables, servers, links, stale flows, problems)
       '-----> compile_peers ----> vxlan, host-gw, udp -'

The agent feeds it updates and hands the result to reconcilers; ``render`` and ``explain`` use it once. It never meets the kernel:
what the host contributes comes in as ``HostFacts``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TypedDict

import msgspec

from clusterstate.objects import Node
from clusterstate.snapshot import Name, Snapshot, Update
from kernelstate.diff_ipvs import IpvsOwnership
from kernelstate.objects.address import Family, Prefix
from kernelstate.objects.links import LinkState
from kernelstate.objects.netfilter import Anchor, ChainKey, Rule, Ruleset
from kernelstate.objects.nftables import Table
from kernelstate.objects.tunnel import TunnelState
from kernelstate.ownership import Ownership
from netpolicy.compile import PolicyCompiler
from netpolicy.render.iptables import CHAIN_NAMES as POLICY_CHAINS
from netpolicy.render.iptables import PREFIXES as POLICY_PREFIXES
from netpolicy.table import PolicyTable
from nodeplane.config import NodeConfig
from nodeplane.config_overlay import OverlayOptions
from nodeplane.policy_programs import POLICY_PROGRAMS, PolicyState, PolicyUpdate
from nodeplane.service_programs import PROGRAMS, ServiceChange, ServiceProgram, ServiceState
from nodeplane.status import LeaseStatus
from overlay.compile import compile_peers
from overlay.registration import Member
from overlay.registry.nodes import read_nodes
from overlay.render.checksums import set_checksums
from overlay.render.guard import render_guard
from overlay.render.hostgw import render_hostgw
from overlay.render.masquerade import CHAIN_NAMES as OVERLAY_CHAINS
from overlay.render.masquerade import render_masquerade
from overlay.render.masquerade_nftables import render_masquerade_tables
from overlay.render.udp import render_udp, render_udp_tunnel
from overlay.render.vxlan import render_vxlan
from overlay.table import PeerTable, Uplink
from proxy.compile import BALANCE, ServiceCompiler
from proxy.conntrack import StaleFlows
from proxy.health import HealthEndpoint, Places, health_places, service_health
from proxy.modes import TRAITS
from proxy.render.iptables_program import CHAIN_NAMES, CHAIN_PREFIXES
from proxy.render.ipvs_rules import CHAIN_NAMES as IPVS_CHAINS
from proxy.settings import NodeFacts, ProxySettings
from proxy.table import ServiceEntry

OWNERSHIP = Ownership(
    names=frozenset((*CHAIN_NAMES, *IPVS_CHAINS, *OVERLAY_CHAINS, *POLICY_CHAINS)),
    prefixes=(*CHAIN_PREFIXES, *POLICY_PREFIXES),
)
"""Which chains of the packet filter are ours, in whatever mode they were written."""

POLICY_KINDS = frozenset({"Pod", "Namespace", "NetworkPolicy", "ClusterNetworkPolicy"})
"""Kinds of objects that policies are made of."""

_OVERLAY_RENDERERS: dict[str, Callable[[PeerTable], LinkState]] = {
    "vxlan": render_vxlan,
    "host-gw": render_hostgw,
    "udp": render_udp,
}


class HostFacts(msgspec.Struct, frozen=True):
    """What the host tells: its addresses (loopback left out) and its link to the other nodes."""

    local_addresses: tuple[Prefix, ...] = ()
    uplink: Uplink | None = None
    unfit: frozenset[str] = frozenset()
    """Links of tunnels whose checksums the uplink's hardware does not do right."""
    members: tuple[Member, ...] | None = None
    """Who is in the overlay by the leases in etcd; None: not known (yet)."""
    lease: LeaseStatus | None = None
    """This node's own lease, for people."""


class Desired(msgspec.Struct, frozen=True):
    """What the kernel should hold now."""

    ruleset: Ruleset
    """Of Services, overlay and policies together."""
    families: tuple[Family, ...]
    changed_chains: frozenset[ChainKey] | None
    """Chains that differ from the ``Desired`` before; None: compare all."""
    services: ServiceState
    """What Services need besides, by mode."""
    service_change: ServiceChange | None
    """What of it differs from the ``Desired`` before; None: compare all."""
    links: LinkState | None
    """None: the overlay is somebody else's."""
    overlay_tables: Mapping[Family, Table]
    """The overlay's rules where they go through nftables."""
    tunnel: TunnelState | None
    """What stands behind or beside the links: the UDP tunnel and the source guard. None: nothing is known of peers yet."""
    peers: PeerTable | None
    stale: StaleFlows
    problems: tuple[str, ...]
    ipvs_ownership: IpvsOwnership = IpvsOwnership()
    """Which virtual servers are ours."""
    health: Mapping[Name, tuple[HealthEndpoint, ...]] = {}
    """What is answered on the health check ports of Services."""
    health_places: Places = {}
    """Where those ports are open."""
    policies: PolicyTable | None = None
    """Whom policies are about here, and what they say; None: they are not enforced."""
    policy_state: PolicyState = PolicyState()
    """What policies become."""
    policy_change: PolicyUpdate | None = None
    """What of policies differs from the ``Desired`` before; None: nothing."""

    @property
    def ruleset_but_policies(self) -> Ruleset:
        """The rules of Services and overlay alone."""
        policies = self.policy_state
        if not policies.chains:
            return self.ruleset
        chains = {key: rules for key, rules in self.ruleset.chains.items() if key not in policies.chains}
        return Ruleset(chains, tuple(anchor for anchor in self.ruleset.anchors if anchor not in policies.anchors))


class _Masquerade(TypedDict):
    ip_masq: bool
    random_fully: bool
    forward_rules: bool
    never_masquerade: tuple[Prefix, ...]


class Pipeline:
    """One node's compiled and rendered state, moved along by updates."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.settings = config.services
        self.compiler = ServiceCompiler(NodeFacts(config.node_name), tracked_protocols(config.services))
        self.program: ServiceProgram | None = None
        self.peers: PeerTable | None = None
        self.has_uplink = True
        self.rules = 0
        """How many rules there are in chains of ours."""
        self._chains: dict[ChainKey, tuple[Rule, ...]] = {}
        self._masquerade = Ruleset({})
        self._overlay_tables: dict[Family, Table] = {}
        self._consistent: set[Name] = set()
        self._health: dict[Name, tuple[HealthEndpoint, ...]] = {}
        self._service_families: Counter[Family] = Counter()
        self._overlay_input: object = None
        self._links: LinkState | None = None
        self._tunnel: TunnelState | None = None
        self.policies = PolicyCompiler(config.node_name) if config.policy else None
        self._policy_program = POLICY_PROGRAMS[config.policy](config.policy_log) if config.policy else None
        self._started = False

    def reconfigure(self, config: NodeConfig) -> None:
        """Go by another configuration from the next update on; mode, overlay and policies are as before."""
        self.config, self.settings = config, config.services
        self.program = None

    def update(self, update: Update, facts: HostFacts) -> Desired:
        """Take in a snapshot and say what the kernel should hold."""
        stale = StaleFlows(self.compiler.tracked)
        node = node_facts(self.config.node_name, update.snapshot, facts)
        node = msgspec.structs.replace(node, pod_networks=_pod_networks(self.config.overlay))
        change: ServiceChange | None = ServiceChange()
        if self.settings is not None:
            change = self._update_services(self.settings, update, node, stale)
        changed = None if change is None else change.chains
        if self.config.overlay is not None and self._update_overlay(self.config.overlay, update.snapshot, facts):
            changed = None
        policy_change = self._update_policies(update)
        if changed is not None and policy_change is not None:
            changed |= policy_change.chains
        if not self._started:
            changed = None
        self._started = True
        self._merge(changed)
        families = self.program.families if self.program else _overlay_families(self.config.overlay)
        return Desired(
            ruleset=Ruleset(self._chains, self._anchors()),
            families=families,
            changed_chains=changed,
            services=self.program.state if self.program else ServiceState(),
            service_change=change,
            links=self._links,
            overlay_tables=self._overlay_tables,
            tunnel=self._tunnel,
            peers=self.peers,
            stale=stale,
            problems=self._problems(update.snapshot),
            ipvs_ownership=ipvs_ownership(self.settings, facts),
            health=self._health,
            health_places=health_places(self.settings, node, families) if self.settings and self._health else {},
            policies=self.policies.table if self.policies is not None else None,
            policy_state=self._policy_program.state if self._policy_program is not None else PolicyState(),
            policy_change=policy_change,
        )

    def chains(self) -> list[tuple[ChainKey, tuple[Rule, ...]]]:
        """Return the chains of ours with their rules, as they are at this moment. Safe from any thread."""
        return list(self._chains.copy().items())

    @property
    def endpoints(self) -> int:
        """Endpoints that some Service can reach from here."""
        return self.program.endpoints if self.program else 0

    # -- Services ----------------------------------------------------------------------------------------------------

    def _update_services(
        self, settings: ProxySettings, update: Update, node: NodeFacts, stale: StaleFlows
    ) -> ServiceChange | None:
        names = update.service_changed
        if node != self.compiler.node or not self._started:
            self.compiler.node = node
            names = None
        changed = self.compiler.update(update.snapshot, names)
        self._update_health(update.snapshot, names)
        entries, in_use = self.compiler.entries, self._service_families
        for name, before in changed.items():
            after = entries.get(name, ())
            for entry in before:
                in_use[entry.family] -= 1
            for entry in after:
                in_use[entry.family] += 1
            self._note_consistent(name, after)
            if self._started:
                stale.note(before, after)
        if not self._started:
            stale.note_all(entries)
        families = self._families(settings, node)
        if self.program is None or self.program.node != node or self.program.families != families:
            self.program = PROGRAMS[self.config.mode](settings, node, families)
            self.program.update(entries, None)
            return None
        return self.program.update(entries, changed)

    def _update_health(self, snapshot: Snapshot, names: Iterable[Name] | None) -> None:
        """Count the ready endpoints here of Services that a load balancer asks after."""
        for name in (*self._health, *snapshot.services) if names is None else names:
            service = snapshot.services.get(name)
            found = service_health(service, snapshot.slices_of(name), self.config.node_name) if service else ()
            if found:
                self._health[name] = found
            else:
                self._health.pop(name, None)

    def _note_consistent(self, name: Name, entries: tuple[ServiceEntry, ...]) -> None:
        if entries and entries[0].consistent:
            self._consistent.add(name)
        else:
            self._consistent.discard(name)

    def _families(self, settings: ProxySettings, node: NodeFacts) -> tuple[Family, ...]:
        """Return the families in use: the node's, its pods' and the Services'; rules of another would never be met."""
        used: set[Family] = {a.version for a in node.addresses}
        used |= {c.family for c in (*node.pod_cidrs, *settings.cluster_cidrs)}
        used |= {family for family, count in self._service_families.items() if count > 0}
        used |= set(_overlay_families(self.config.overlay))
        return tuple(sorted(used)) or (4,)

    # -- policies ----------------------------------------------------------------------------------------------------

    def _update_policies(self, update: Update) -> PolicyUpdate | None:
        if self.policies is None or self._policy_program is None:
            return None
        changed = update.changed if self._started else None
        if changed is not None and not any(ref.kind in POLICY_KINDS for ref in changed):
            return None
        meaning = self.policies.update(update.snapshot, changed)
        return self._policy_program.update(self.policies.table, meaning)

    # -- overlay -----------------------------------------------------------------------------------------------------

    def _update_overlay(self, options: OverlayOptions, snapshot: Snapshot, facts: HostFacts) -> bool:
        """Compile and render peers if nodes or the uplink changed; return whether netfilter rules changed."""
        inputs = (snapshot.nodes if options.etcd is None else facts.members, facts.uplink, facts.unfit)
        if inputs == self._overlay_input:
            return False
        self._overlay_input = inputs
        self.has_uplink = facts.uplink is not None
        if facts.uplink is None or (options.etcd is not None and facts.members is None):
            return False  # what is programmed stays: a link that is away for a moment takes nothing down
        members: Iterable[Member] = facts.members or ()
        if options.etcd is None:
            members = read_nodes(snapshot.nodes, self.config.node_name, options.net_conf)
        self.peers = compile_peers(members, self.config.node_name, options.net_conf, facts.uplink)
        links = _OVERLAY_RENDERERS[options.net_conf.backend.type](self.peers)
        self._links = set_checksums(links, options.checksum_offload, facts.unfit)
        guard = render_guard(self.peers) if options.source_check else None
        self._tunnel = TunnelState(render_udp_tunnel(self.peers), guard)
        return self._render_masquerade(options, self.peers)

    def _render_masquerade(self, options: OverlayOptions, peers: PeerTable) -> bool:
        """Render the rules beside the tunnel, as iptables' or as nftables'; return whether the former changed."""
        before = self._masquerade
        wanted = _Masquerade(
            ip_masq=options.ip_masq,
            random_fully=self.settings.random_fully if self.settings else True,
            forward_rules=options.forward_rules,
            never_masquerade=options.no_masquerade,
        )
        if options.net_conf.nftables:
            self._overlay_tables = render_masquerade_tables(peers, **wanted)
        else:
            self._masquerade = render_masquerade(peers, **wanted)
        return self._masquerade != before

    # -- putting together --------------------------------------------------------------------------------------------

    def _merge(self, changed: frozenset[ChainKey] | None) -> None:
        rendered = self.program.state.chains if self.program else {}
        policies = self._policy_program.state.chains if self._policy_program is not None else {}
        if changed is None:
            self._chains = {**rendered, **self._masquerade.chains, **policies}
            self.rules = sum(map(len, self._chains.values()))
            return
        for key in changed:
            self.rules -= len(self._chains.pop(key, ()))
            rules = rendered.get(key) if key in rendered else policies.get(key)
            if rules is not None:
                self._chains[key] = rules
                self.rules += len(rules)

    def _anchors(self) -> tuple[Anchor, ...]:
        services = self.program.state.anchors if self.program else ()
        policies = self._policy_program.state.anchors if self._policy_program is not None else ()
        return (*services, *self._masquerade.anchors, *policies)

    def _problems(self, snapshot: Snapshot) -> tuple[str, ...]:
        found = list(self.compiler.problems)
        needs_nodes = self.settings is not None or (self.config.overlay is not None and self.config.overlay.etcd is None)
        if needs_nodes and self.config.node_name not in snapshot.nodes:
            found.append(f"Node {self.config.node_name} is not among the objects: its zone, addresses and podCIDRs are unknown")
        if self.program is not None:
            found += self.program.problems
        found += self._unhashed()
        if not self.has_uplink:
            wanted = self.config.overlay.iface if self.config.overlay else ""
            found.append(f"overlay.iface: no link {wanted or 'holds an address of the Node'}: the overlay is left as it is")
        if self.peers is not None:
            found += [str(problem) for problem in self.peers.problems]
        return tuple(found)

    def _unhashed(self) -> list[str]:
        """Name the Services that ask for consistent hashing in a mode that draws lots."""
        if not self._consistent or TRAITS[self.config.mode].hashes_clients:
            return []
        return [
            f"Service {ns}/{name}: metadata.annotations: {BALANCE}: consistent-hash cannot be had in mode {self.config.mode}"
            for ns, name in sorted(self._consistent)
        ]


def ipvs_ownership(settings: ProxySettings | None, facts: HostFacts) -> IpvsOwnership:
    """Return how virtual servers of ours are told from those of others."""
    return IpvsOwnership(frozenset(facts.local_addresses), excluded=settings.exclude_cidrs if settings else ())


def tracked_protocols(settings: ProxySettings | None) -> frozenset[str]:
    """Return the protocols whose flows are looked after when an endpoint goes."""
    if settings is None or settings.flows_to_removed == "keep":
        return frozenset({"UDP"})
    return frozenset({"TCP", "UDP", "SCTP"})


def node_facts(name: str, snapshot: Snapshot, facts: HostFacts) -> NodeFacts:
    """Put together what is known of the node."""
    node: Node | None = snapshot.nodes.get(name)
    cidrs = tuple(sorted({Prefix.of(c) for one in snapshot.service_cidrs.values() for c in one.cidrs}))
    if node is None:
        return NodeFacts(name, local_addresses=facts.local_addresses, service_cidrs=cidrs)
    own = (node.internal_ip(4), node.internal_ip(6))
    first = next((a.ip.version for a in node.addresses), 4)
    addresses = tuple(a for a in (own if first == 4 else own[::-1]) if a is not None)
    return NodeFacts(
        name=name,
        zone=node.zone,
        addresses=addresses,
        pod_cidrs=tuple(Prefix.of(c) for c in node.pod_cidrs),
        local_addresses=facts.local_addresses,
        service_cidrs=cidrs,
    )


def _pod_networks(options: OverlayOptions | None) -> tuple[Prefix, ...]:
    found = [options.net_conf.network_of(family) for family in options.net_conf.families] if options else []
    return tuple(Prefix.of(network) for network in found if network is not None)


def _overlay_families(options: OverlayOptions | None) -> tuple[Family, ...]:
    return options.net_conf.families if options else ()  # type: ignore[return-value]
