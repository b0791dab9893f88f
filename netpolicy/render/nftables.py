"""The policy table as nftables: a packet finds its pod's chain by one look-up, and its peer and port by at most five.

    postrouting, just before source translation: whoever sent it, wherever it goes, addresses are those of the pods themselves
        ct state established,related accept          replies, and all that follows: nothing below costs them anything
        icmpv6 neighbour discovery accept
        ip saddr . ip daddr @self accept             a pod that reaches itself
        tcp flags without a SYN, ip saddr @isolated drop     the rest of a connection that was cut, whoever goes on speaking
        tcp flags without a SYN, ip daddr @isolated drop
        ip saddr vmap @egress                        10.244.1.7 : jump out-6f1c...   may it leave?
        ip daddr vmap @ingress                       10.244.1.9 : jump in-90b3...    may it come in?
    input, behind IPVS: packets to the node itself
        ct state established,related accept; neighbour discovery; ip saddr vmap @egress

    in-90b3...      the chain of a group of pods (groups.py): of each of its clauses (clauses.py) at most
        ip saddr @in-90b3...-peers return            peers on every port            return: this direction lets it through
        ip saddr @in-90b3...-blocks return
        meta l4proto . th dport @in-90b3...-ports return
        ip saddr . meta l4proto . th dport @in-90b3...-tuples return
        ip saddr . meta l4proto . th dport @in-90b3...-boxes return
        goto deny-ingress
    deny-ingress
        fib saddr type local accept                  from this node: a look at the routes that only those pay who would be denied
        ip daddr @denied-ingress                     counted; logged if that is wanted (denied.py)
        drop
    in-c24e...      one with an admin tier that passes packets on
        ip saddr @in-77a0...-peers goto deny-ingress a clause that denies; its sets are shared by all groups that ask it
        ip saddr @in-1f5d...-peers goto in-c24e...-rest
        goto in-c24e...-rest                         the same as above for NetworkPolicies, or the baseline tier

Postrouting is where IPVS' packets can be seen as well, and where Services have been resolved in every mode. An address is led to another
chain by one element, the chain is complete before (``diff_nftables.py``: in turn), and one that is left goes last: a change of policy is
one moment in each direction. Two pods that claim one address are held to what is said of either.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping

from clusterstate.objects import IPAddress
from kernelstate.objects.address import Family
from kernelstate.objects.nftables import (
    AcceptPacket,
    Chain,
    CtState,
    Data,
    DropPacket,
    ElementKey,
    FibLocal,
    Field,
    GotoChain,
    Hook,
    InSet,
    Interval,
    JumpChain,
    JumpTo,
    Key,
    LogSome,
    NamedSet,
    NeighbourDiscovery,
    OpensNoConnection,
    ReturnToCaller,
    Rule,
    Statement,
    Table,
    TableChange,
    VerdictMap,
)
from netpolicy.compile import PolicyChange
from netpolicy.render.clauses import Clause, Tuple, Union
from netpolicy.render.denied import GROUP, MARKS, DeniedLog
from netpolicy.render.grouping import Grouping
from netpolicy.render.groups import Does, Group, Step
from netpolicy.table import DIRECTIONS, Direction, PolicyTable
from netpolicy.wording import shorten

TABLE = "nodeplane-policy"
NAMES: Mapping[Family, str] = {4: TABLE, 6: TABLE}
FAMILIES: tuple[Family, ...] = (4, 6)

_SADDR, _DADDR, _PROTO, _DPORT = Field("saddr"), Field("daddr"), Field("l4proto"), Field("dport")
_PEER: dict[Direction, Field] = {"ingress": _SADDR, "egress": _DADDR}
_POD: dict[Direction, Field] = {"ingress": _DADDR, "egress": _SADDR}
DENIED: Mapping[Direction, str] = {"ingress": "denied-ingress", "egress": "denied-egress"}
"""Sets that count."""
COUNTING = {
    way: NamedSet(name, (_POD[way],), comment="denied packets of pods here", counter=True) for way, name in DENIED.items()
}
_MAPS = {
    "egress": NamedSet("egress", (_SADDR,), "verdict", comment="pods here that may not send everything"),
    "ingress": NamedSet("ingress", (_DADDR,), "verdict", comment="pods here that may not be sent everything"),
    "isolated": NamedSet("isolated", (_SADDR,), comment="pods here that are isolated in some direction"),
    **{named.name: named for named in COUNTING.values()},
    "self": NamedSet("self", (_SADDR, _DADDR), comment="pods here, each beside itself"),
}
_KNOWN = (Rule((CtState(("established", "related")),), (AcceptPacket(),)), Rule((NeighbourDiscovery(),), (AcceptPacket(),)))
_LEAVES = Rule((), (VerdictMap((_SADDR,), "egress"),))
COMMENT = 120
"""Characters; the kernel takes 127."""


class NftablesPolicyProgram:
    """Both families' tables for one node's policies; ``tables`` are updated in place."""

    def __init__(self, log: DeniedLog | None = None) -> None:
        """``log``: how often a packet that is denied is logged; None: never."""
        self.tables: dict[Family, Table] = {family: _empty(family, log) for family in FAMILIES}
        self._grouping = Grouping()

    def update(self, table: PolicyTable, change: PolicyChange) -> dict[Family, TableChange]:
        """Take in a change of the policy table; return what differs in each family's."""
        notes = {family: _Notes(self.tables[family]) for family in FAMILIES}
        moves = self._grouping.update(table, change)
        for family, note in notes.items():
            for clause, touched in moves.moved:
                _move(note, clause, family, touched[family])
            for clause in moves.clauses:
                for name, (named, elements) in _sets(clause, family).items():
                    note.set(name, named, elements)
            for group in moves.groups:
                for name, chain in _chains(group).items():
                    note.chain(name, chain)
        for direction, address in moves.places:
            self._lead(direction, address, notes[address.version])
        for note in notes.values():
            for group in moves.gone_groups:
                for name in _chains(group):
                    note.chain(name, None)
            for clause in moves.gone_clauses:
                for part in clause.parts:
                    note.set(f"{clause.name}-{part}", None, {})
        return {family: note.done() for family, note in notes.items()}

    def _lead(self, direction: Direction, address: IPAddress, note: _Notes) -> None:
        """Let an address lead to its pod's chain, or to one that asks the chains of all who claim it."""
        number = int(address)
        names = [group.name for group in self._grouping.at(direction, address)]
        before = note.table.elements[direction].get((number,))
        match names:
            case []:
                note.element(direction, (number,), None, present=False)
            case [name]:
                note.element(direction, (number,), JumpTo(name))
            case _:
                chain = f"both-{hashlib.sha256(repr(names).encode()).hexdigest()[:12]}"
                note.chain(chain, Chain(tuple(Rule((), (JumpChain(name),)) for name in names)))
                note.element(direction, (number,), JumpTo(chain))
        if isinstance(before, JumpTo) and before.chain.startswith("both-"):
            note.forget_if_unused(before.chain)
        isolated = self._grouping.is_isolated(address)
        note.element(DENIED[direction], (number,), None, present=bool(names))
        note.element("self", (number, number), None, present=isolated)
        note.element("isolated", (number,), None, present=isolated)


def _move(note: _Notes, clause: Clause, family: Family, touched: tuple[set[int], set[Tuple]]) -> None:
    union = clause.unions[family]
    addresses, tuples = touched
    for address in addresses:
        note.element(f"{clause.name}-peers", (address,), None, present=address in union.peers)
    for one in tuples:
        note.element(f"{clause.name}-tuples", _tuple(one), None, present=one in union.tuples)
    if "boxes" in clause.parts:
        note.set(f"{clause.name}-boxes", None, _boxes(union), only_elements=True)


def render_policies(table: PolicyTable, log: DeniedLog | None = None) -> dict[Family, Table]:
    """Render a whole policy table."""
    program = NftablesPolicyProgram(log)
    program.update(table, PolicyChange(dict.fromkeys(table.pods), dict.fromkeys(table.rules), {}))
    return program.tables


def _empty(family: Family, log: DeniedLog | None) -> Table:
    """Return a table that holds nobody back."""
    known = _KNOWN if family == 6 else _KNOWN[:1]
    itself = Rule((InSet((_SADDR, _DADDR), "self"),), (AcceptPacket(),))
    cut = [
        Rule((OpensNoConnection(), InSet((end,), "isolated")), (DropPacket(),), "the rest of a connection that was cut")
        for end in (_SADDR, _DADDR)
    ]
    comes_in = Rule((), (VerdictMap((_DADDR,), "ingress"),))
    chains = {
        "postrouting": Chain((*known, itself, *cut, _LEAVES, comes_in), Hook("filter", "postrouting", 95)),
        "input": Chain((*known, cut[0], _LEAVES), Hook("filter", "input", 101)),
        **{f"deny-{direction}": Chain(tuple(_deny(direction, log))) for direction in DIRECTIONS},
    }
    return Table(chains, dict(_MAPS), {name: {} for name in _MAPS})


def _deny(direction: Direction, log: DeniedLog | None) -> Iterator[Rule]:
    """Yield what happens to packets that are denied; a pod's own node never is."""
    if direction == "ingress":
        yield Rule((FibLocal("saddr"),), (AcceptPacket(),), "from this node")
    yield Rule((InSet((_POD[direction],), DENIED[direction]),), (), "counts them for the pod")
    if log is not None:
        yield Rule((), (LogSome(log.per_second, log.burst, MARKS[direction], GROUP),))
    yield Rule((), (DropPacket(),))


def _sets(clause: Clause, family: Family) -> dict[str, tuple[NamedSet, dict[ElementKey, Data]]]:
    """Return a clause's sets in one family: those that its rules may ever fill, so that peers can come."""
    found: dict[str, tuple[NamedSet, dict[ElementKey, Data]]] = {}
    for part in clause.parts:
        name, key = f"{clause.name}-{part}", _key(clause, part)
        elements = _elements(part, clause.unions[family])
        found[name] = (NamedSet(name, key, intervals=part in {"blocks", "ports", "boxes"}), elements)
    return found


def _elements(part: str, union: Union) -> dict[ElementKey, Data]:
    match part:
        case "peers":
            return {(address,): None for address in union.peers}
        case "blocks":
            return {(Interval(b.first, b.last),): None for b in union.blocks}
        case "ports":
            return {(p.protocol.lower(), Interval(p.first, p.last)): None for p in union.ports}
        case "tuples":
            return {_tuple(one): None for one in union.tuples}
        case _:
            return _boxes(union)


def _key(clause: Clause, part: str) -> Key:
    peer = _PEER[clause.key.direction]
    match part:
        case "peers" | "blocks":
            return (peer,)
        case "ports":
            return (_PROTO, _DPORT)
        case _:
            return (peer, _PROTO, _DPORT)


def _chains(group: Group) -> dict[str, Chain]:
    """Return a group's chain, and the one to which its steps pass packets on."""
    asked = [rule for step in group.steps for rule in _ask(group, step)]
    rest = [*(rule for step in group.rest for rule in _ask(group, step)), *_end(group)]
    if not group.passes:
        return {group.name: Chain((*asked, *rest))}
    if not group.ends_before_rest:
        asked.append(Rule((), (_pass(group),)))
    return {group.name: Chain(tuple(asked)), f"{group.name}-rest": Chain(tuple(rest))}


def _ask(group: Group, step: Step) -> Iterator[Rule]:
    """Yield the look-ups of one clause."""
    does: dict[Does, Statement] = {"accept": ReturnToCaller(), "deny": _denied(group), "pass": _pass(group)}
    clause, verdict = step.clause, does[step.does]
    if clause.everything:
        yield Rule((), (verdict,), shorten(group.words_about_all(step), COMMENT))
        return
    for part in clause.parts:
        asked = InSet(_key(clause, part), f"{clause.name}-{part}")
        yield Rule((asked,), (verdict,), shorten(clause.words(part), COMMENT))


def _pass(group: Group) -> GotoChain:
    return GotoChain(f"{group.name}-rest")


def _denied(group: Group) -> GotoChain:
    return GotoChain(f"deny-{group.key.direction}")


def _end(group: Group) -> tuple[Rule, ...]:
    """Return how a group's chain ends for what met no rule: whoever isolates lets nothing more through."""
    return (Rule((), (_denied(group),), shorten(group.who, COMMENT)),) if group.is_closed else ()


def _tuple(one: Tuple) -> ElementKey:
    return (one.address, one.protocol.lower(), one.port)


def _boxes(union: Union) -> dict[ElementKey, Data]:
    return {
        (Interval(box.first, box.last), box.ports.protocol.lower(), Interval(box.ports.first, box.ports.last)): None
        for box in union.boxes
    }


class _Notes:
    """Changes one table in place and notes what may differ."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self._chains: set[str] = set()
        self._sets: set[str] = set()
        self._elements: dict[str, set[ElementKey]] = defaultdict(set)
        self._unused: set[str] = set()

    def chain(self, name: str, chain: Chain | None) -> None:
        """Let a chain be so, None: not be."""
        if self.table.chains.get(name) == chain:
            return
        self._chains.add(name)
        if chain is None:
            del self.table.chains[name]
        else:
            self.table.chains[name] = chain

    def set(self, name: str, named: NamedSet | None, elements: dict[ElementKey, Data], *, only_elements: bool = False) -> None:
        """Let a set hold exactly these elements; without ``named`` the set itself goes, or stays as it is."""
        if not only_elements and self.table.sets.get(name) != named:
            self._sets.add(name)
            if named is None:
                del self.table.sets[name], self.table.elements[name]
                self._elements.pop(name, None)
                return
            self.table.sets[name] = named
        held = self.table.elements.setdefault(name, {})
        for key in [*held.keys() - elements.keys(), *elements.keys() - held.keys()]:
            self.element(name, key, None, present=key in elements)

    def element(self, name: str, key: ElementKey, data: Data, *, present: bool = True) -> None:
        """Let an element be there with this data, or not be there."""
        held = self.table.elements[name]
        if present == (key in held) and held.get(key) == data:
            return
        self._elements[name].add(key)
        if present:
            held[key] = data
        else:
            del held[key]

    def forget_if_unused(self, chain: str) -> None:
        """Drop a chain at the end if no element leads to it then."""
        self._unused.add(chain)

    def done(self) -> TableChange:
        """Return what was noted."""
        if self._unused:
            led = {data.chain for way in DIRECTIONS for data in self.table.elements[way].values() if isinstance(data, JumpTo)}
            for chain in self._unused - led:
                self.chain(chain, None)
        elements = {name: frozenset(keys) for name, keys in self._elements.items() if keys}
        return TableChange(frozenset(self._chains), frozenset(self._sets), elements)
