"""The service table as iptables rules, chain for chain as kube-proxy writes them.

    nat PREROUTING, OUTPUT
      '-- KUBE-SERVICES                            a rule for each address and port that answers
            |-- cluster IP ---------------------------------.
            |-- external IP, load balancer IP               |
            |     |-- KUBE-FW-x   source ranges             |
            |     '-- KUBE-EXT-x  policy of outside traffic-+
            '-- KUBE-NODEPORTS -- KUBE-EXT-x ---------------+
                                                            v
                                KUBE-SVC-x (policy Cluster) or KUBE-SVL-x (policy Local)
                                                            |  one of n, by chance
                                                            v
                                KUBE-SEP-y   hairpin mark, DNAT
    nat POSTROUTING -- KUBE-POSTROUTING            masquerades what KUBE-MARK-MASQ marked
    filter INPUT, FORWARD, OUTPUT -- KUBE-SERVICES, KUBE-EXTERNAL-SERVICES, KUBE-PROXY-FIREWALL
                                                   what has nobody to answer: REJECT or DROP

NodePorts go through KUBE-FW-x as load balancers do where source ranges are to guard them too.

This file writes what one entry contributes; ``iptables_program.py`` puts entries together and adds the fixed rules.
Source: iptables-extensions(8); kube-proxy 1.36's rule set is the contract for names, order and shape (tests/golden).
"""

from __future__ import annotations

from functools import lru_cache

import msgspec

from clusterstate.objects import IPAddress
from kernelstate.objects.address import BITS, Family, Prefix
from kernelstate.objects.netfilter import (
    AddrType,
    ChainKey,
    Comment,
    Dnat,
    Jump,
    Match,
    Protocol,
    Recent,
    Reject,
    Rule,
    Statistic,
    Target,
    Transport,
    Verdict,
)
from proxy.names import endpoint_chain, port_hash
from proxy.settings import LocalDetector, NodePortScope
from proxy.table import Backend, Frontend, Kind, OnEmpty, ServiceEntry

TO_MARK_MASQ = Jump("KUBE-MARK-MASQ")
SERVICES = "KUBE-SERVICES"
NODE_PORTS = "KUBE-NODEPORTS"
EXTERNAL_SERVICES = "KUBE-EXTERNAL-SERVICES"
PROXY_FIREWALL = "KUBE-PROXY-FIREWALL"

SHARED_NAT = (SERVICES, NODE_PORTS)
SHARED_FILTER = (NODE_PORTS, SERVICES, EXTERNAL_SERVICES, PROXY_FIREWALL)


class EntryContext(msgspec.Struct, frozen=True):
    """What the rules of an entry depend on besides the entry: one value for a family."""

    family: Family
    masquerade_all: bool
    detector: LocalDetector | None
    node_ports: NodePortScope
    node_addresses: tuple[IPAddress, ...]
    """The node's own addresses of the family: a load balancer that allows one of them allows its own VIP as source."""
    localhost_node_ports: bool
    endpoint_comments: bool
    guard_node_ports: bool = False


class EntryRules(msgspec.Struct, frozen=True):
    """One entry's rules: ``chains`` are its own (all in nat), ``shared`` its lines in chains of several entries."""

    chains: dict[ChainKey, tuple[Rule, ...]]
    shared: dict[ChainKey, tuple[Rule, ...]]


def render_entry(entry: ServiceEntry, context: EntryContext) -> EntryRules:
    """Write the rules of one entry."""
    if is_plain(entry):
        return render_plain(entry, context)
    return EntryWriter(entry, context).write()


def is_plain(entry: ServiceEntry) -> bool:
    """Whether an entry is what most of a large cluster consists of: a ClusterIP and somebody behind it, nothing else."""
    return (
        len(entry.frontends) == 1
        and entry.frontends[0].kind is _CLUSTER_IP
        and entry.cluster != ()
        and not (entry.local or entry.internal_local or entry.affinity_seconds or entry.health_check_node_port)
    )


def render_plain(entry: ServiceEntry, context: EntryContext) -> EntryRules:
    """Write the rules of an entry that ``is_plain``: what ``EntryWriter`` writes, in a quarter of its time."""
    family, bits, title = context.family, BITS[context.family], str(entry.name)
    protocol = _PROTOCOLS[entry.name.protocol]
    frontend, pool = entry.frontends[0], entry.cluster
    svc = "KUBE-SVC-" + port_hash(title, protocol)
    match = (Comment(f"{title} cluster IP"), _transport(protocol, frontend.port))
    address = Prefix(family, int(frontend.address), bits)  # type: ignore[arg-type]  # a ClusterIP has one
    to_endpoint: list[Rule] = []
    if context.masquerade_all:
        to_endpoint.append(Rule(TO_MARK_MASQ, match, protocol, None, address))
    elif context.detector is not None:
        to_endpoint.append(_unless_local(Rule(TO_MARK_MASQ, match, protocol, None, address), context.detector))
    svc_key = ChainKey(family, "nat", svc)
    chains: dict[ChainKey, tuple[Rule, ...]] = {svc_key: ()}  # stands first, known last
    comments = context.endpoint_comments
    own: tuple[Match, ...] = (Comment(title),) if comments else ()
    to_pod = (*own, _transport(protocol, 0))
    left = len(pool)
    for backend in pool:
        name, number = backend.name, int(backend.address)
        sep, chance = endpoint_chain(title, protocol, name), _one_of(left)
        to_endpoint.append(Rule(Jump(sep), (Comment(f"{title} -> {name}"), *chance) if comments else chance))
        chains[ChainKey(family, "nat", sep)] = (
            Rule(TO_MARK_MASQ, own, "", Prefix(family, number, bits)),
            Rule(Dnat(family, number, backend.port), to_pod, protocol),
        )
        left -= 1
    chains[svc_key] = tuple(to_endpoint)
    return EntryRules(chains, {_nat_services(family): (Rule(Jump(svc), match, protocol, None, address),)})


class EntryWriter:
    """The names and flags that all rules of one entry share."""

    def __init__(self, entry: ServiceEntry, context: EntryContext) -> None:
        self.entry = entry
        self.context = context
        self.family = context.family
        self.title = str(entry.name)
        self.protocol: Protocol = _PROTOCOLS[entry.name.protocol]
        digest = port_hash(self.title, self.protocol)
        self.svc, self.svl = "KUBE-SVC-" + digest, "KUBE-SVL-" + digest
        self.ext, self.fw = "KUBE-EXT-" + digest, "KUBE-FW-" + digest
        self.internal_chain = self.svl if entry.internal_local else self.svc
        self.external_chain = self.svl if entry.external_local else self.svc
        self.reachable = entry.reachable
        self.seps = {b.name: endpoint_chain(self.title, self.protocol, b.name) for b in self.reachable}
        self.internal = [f for f in entry.frontends if f.kind is Kind.CLUSTER_IP]
        self.has_external = len(self.internal) < len(entry.frontends)
        self.vips = [f for f in entry.frontends if f.kind is Kind.LOAD_BALANCER] if self.has_external else []
        self.guarded = self._guarded()
        self.uses_firewall = bool(self.reachable and self.guarded)
        self.rules = EntryRules({}, {})

    def write(self) -> EntryRules:
        """Write every rule of the entry."""
        for frontend in self.entry.frontends:
            self._dispatch(frontend)
        self._health_check()
        if self.reachable and self.entry.frontends:  # without one, all lost to other Services, nothing would ever jump here
            if self.entry.cluster:
                self._pool(self.svc, self.entry.cluster)
            if self.entry.local:
                self._pool(self.svl, self.entry.local)
            if self.has_external:
                self._external_chain()
            if self.uses_firewall:
                self._firewall_chain()
            self._endpoints()
        return self.rules

    def _guarded(self) -> list[Frontend]:
        """Return the frontends that only the source ranges may use."""
        if not self.entry.source_ranges:
            return []
        guards_node_ports = self.context.guard_node_ports and self._node_ports_open
        return [f for f in self.entry.frontends if f.kind is Kind.NODE_PORT and guards_node_ports] + self.vips

    # -- where packets come in ---------------------------------------------------------------------------------------

    def _dispatch(self, frontend: Frontend) -> None:
        """Write the line (or the refusal) by which a frontend is found."""
        if frontend.kind is Kind.CLUSTER_IP:
            if self.entry.pool(frontend.kind):
                self._share("nat", SERVICES, self._to(frontend, Jump(self.internal_chain)))
            else:
                self._share("filter", SERVICES, self._refuse(frontend))
            return
        if frontend.kind is Kind.NODE_PORT and not self._node_ports_open:
            return
        if self.reachable:
            chain = self.fw if frontend in self.guarded else self.ext
            table_chain = NODE_PORTS if frontend.kind is Kind.NODE_PORT else SERVICES
            self._share("nat", table_chain, self._to(frontend, Jump(chain)))
        if self.uses_firewall and frontend in self.guarded:
            text = f"{self.title} traffic not accepted by {self.fw}"
            self._share("filter", PROXY_FIREWALL, self._to_own(frontend, Verdict.DROP, text))
        if not self.entry.pool(frontend.kind):
            self._share("filter", EXTERNAL_SERVICES, self._refuse(frontend))

    @property
    def _node_ports_open(self) -> bool:
        return self.context.node_ports.everywhere or bool(self.context.node_ports.addresses)

    def _to(self, frontend: Frontend, target: Target, text: str = "", *between: Match) -> Rule:
        """Return the rule that meets exactly the packets to a frontend."""
        if not text:
            text = self.title if frontend.kind is Kind.NODE_PORT else f"{self.title} {_TITLES[frontend.kind]}"
        transport = _transport(self.protocol, frontend.port)
        return Rule(
            target,
            (Comment(text), *between, transport),
            self.protocol,
            destination=None if frontend.address is None else Prefix(self.family, int(frontend.address), BITS[self.family]),
        )

    def _refuse(self, frontend: Frontend) -> Rule:
        """Return the filter rule for a frontend with nobody behind it (docs/packet-walk.md, "Nobody there")."""
        rejects = self.entry.on_empty is OnEmpty.REJECT
        target: Target = Reject() if rejects else Verdict.DROP
        text = f"{self.title} has no {'' if rejects else 'local '}endpoints"
        return self._to_own(frontend, target, text)

    def _to_own(self, frontend: Frontend, target: Target, text: str) -> Rule:
        """Return the filter rule for what still has the frontend as destination; a NodePort's is any address of the node."""
        if frontend.kind is Kind.NODE_PORT:
            return self._to(frontend, target, text, AddrType(dst="LOCAL"))
        return self._to(frontend, target, text)

    def _health_check(self) -> None:
        port = self.entry.health_check_node_port
        if port:
            text = Comment(f"{self.title} health check node port")
            rule = Rule(Verdict.ACCEPT, (text, Transport("tcp", (port, port))), "tcp")
            self._share("filter", NODE_PORTS, rule)

    # -- the entry's own chains --------------------------------------------------------------------------------------

    def _pool(self, chain: str, pool: tuple[Backend, ...]) -> None:
        """Write KUBE-SVC or KUBE-SVL: who must be masqueraded, then one endpoint of n."""
        rules: list[Rule] = []
        if chain == self.internal_chain:
            rules += self._masquerade_outsiders()
        seps = [self.seps[b.name] for b in pool]
        comments = [self._comments(f"{self.title} -> {b.name}") for b in pool]
        if self.entry.affinity_seconds:
            rules += [
                Rule(Jump(sep), (*comment, Recent(sep, set=False, seconds=self.entry.affinity_seconds)))
                for sep, comment in zip(seps, comments, strict=True)
            ]
        rules += [
            Rule(Jump(sep), (*comment, *_one_of(len(seps) - i)))
            for i, (sep, comment) in enumerate(zip(seps, comments, strict=True))
        ]
        self._own(chain, rules)

    def _masquerade_outsiders(self) -> list[Rule]:
        """Return the rules that mark traffic to the ClusterIP whose replies would not come back by themselves."""
        rules = [self._to(frontend, TO_MARK_MASQ) for frontend in self.internal]
        detector = self.context.detector
        if self.context.masquerade_all:
            return rules
        return [_unless_local(rule, detector) for rule in rules] if detector is not None else []

    def _external_chain(self) -> None:
        """Write KUBE-EXT: traffic from outside, its source kept (Local) or replaced (Cluster)."""
        outside = f"{self.title} external destinations"
        rules = []
        if not self.entry.external_local:
            rules.append(Rule(TO_MARK_MASQ, (Comment(f"masquerade traffic for {outside}"),)))
        else:
            if self.context.detector is not None:
                pods = Rule(Jump(self.svc), (Comment(f"pod traffic for {outside}"),))
                rules.append(_if_local(pods, self.context.detector))
            from_node = AddrType(src="LOCAL")
            rules.append(Rule(TO_MARK_MASQ, (Comment(f"masquerade LOCAL traffic for {outside}"), from_node)))
            rules.append(Rule(Jump(self.svc), (Comment(f"route LOCAL traffic for {outside}"), from_node)))
        if self.entry.pool(Kind.NODE_PORT):
            rules.append(Rule(Jump(self.external_chain)))
        self._own(self.ext, rules)

    def _firewall_chain(self) -> None:
        """Write KUBE-FW: the allowed sources go on to KUBE-EXT, the others meet KUBE-PROXY-FIREWALL later."""
        text = Comment(f"{self.title} loadbalancer IP")
        ranges = self.entry.source_ranges
        rules = [Rule(Jump(self.ext), (text,), source=Prefix.of(r)) for r in ranges]
        if any(a in r for a in self.context.node_addresses for r in ranges):
            rules += [Rule(Jump(self.ext), (text,), source=Prefix.host(f.address)) for f in self.vips if f.address]
        rules.append(Rule(None, (Comment(f"other traffic to {self.title} will be dropped by KUBE-PROXY-FIREWALL"),)))
        self._own(self.fw, rules)

    def _endpoints(self) -> None:
        """Write KUBE-SEP: a pod that reaches itself through the Service is masqueraded, everybody is sent there.

        Most of a large cluster's rules are made here: what does not differ between endpoints is made once.
        """
        family, bits, protocol = self.family, BITS[self.family], self.protocol
        comment = self._comments(self.title)
        to_pod: tuple[Match, ...] = (*comment, _transport(protocol, 0))
        for backend in self.reachable:
            sep, number = self.seps[backend.name], int(backend.address)
            matches = (*comment, Recent(sep, set=True), to_pod[-1]) if self.entry.affinity_seconds else to_pod
            self.rules.chains[ChainKey(family, "nat", sep)] = (
                Rule(TO_MARK_MASQ, comment, "", Prefix(family, number, bits)),
                Rule(Dnat(family, number, backend.port), matches, protocol),
            )

    # -- small change ------------------------------------------------------------------------------------------------

    def _comments(self, text: str) -> tuple[Match, ...]:
        return (Comment(text),) if self.context.endpoint_comments else ()

    def _own(self, chain: str, rules: list[Rule]) -> None:
        self.rules.chains[ChainKey(self.family, "nat", chain)] = tuple(rules)

    def _share(self, table: str, chain: str, rule: Rule) -> None:
        key = ChainKey(self.family, table, chain)  # type: ignore[arg-type]
        self.rules.shared[key] = (*self.rules.shared.get(key, ()), rule)


@lru_cache(2)
def _nat_services(family: Family) -> ChainKey:
    return ChainKey(family, "nat", SERVICES)


@lru_cache(4096)
def _transport(protocol: Protocol, port: int) -> Transport:
    """Return the match of one destination port (0: any); many Services share a few."""
    return Transport(protocol, (port, port) if port else None)  # type: ignore[arg-type]


_CLUSTER_IP = Kind.CLUSTER_IP
_TITLES = {kind: kind.value for kind in Kind}
_PROTOCOLS: dict[str, Protocol] = {"TCP": "tcp", "UDP": "udp", "SCTP": "sctp"}
_ONE_OF: tuple[tuple[Match, ...], ...] = ((), (), *((Statistic.one_of(n),) for n in range(2, 256)))
"""What lets one packet in n pass: by index n, nothing for the last endpoint left."""


def _one_of(n: int) -> tuple[Match, ...]:
    return _ONE_OF[n] if n < len(_ONE_OF) else (Statistic.one_of(n),)


def _unless_local(rule: Rule, detector: LocalDetector) -> Rule:
    """Narrow a rule to what is not pod traffic; as ``replace`` would, which takes far longer."""
    by_prefix = detector.prefix is not None
    return Rule(
        rule.target,
        rule.matches,
        rule.protocol,
        detector.prefix,
        rule.destination,
        source_negated=by_prefix,
        in_interface=detector.interface,
        in_interface_negated=not by_prefix,
    )


def _if_local(rule: Rule, detector: LocalDetector) -> Rule:
    if detector.prefix is not None:
        return msgspec.structs.replace(rule, source=detector.prefix)
    return msgspec.structs.replace(rule, in_interface=detector.interface)
