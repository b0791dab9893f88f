"""The policy table as iptables chains and ipsets: what ``render/nftables.py`` says, where a packet finds its pod by a tree of chains.

    mangle POSTROUTING   before source translation, behind every kind of destination translation
      NETPOL
        -m conntrack --ctstate RELATED,ESTABLISHED -j RETURN      replies, and all that follows: nothing below costs them anything
        -m set ! NETPOL-ISOLATED-4 src, ! ... dst -j RETURN       neither end is a pod here that is isolated
        -p tcp ! --syn -j DROP                                    the rest of a connection that was cut, whoever goes on speaking
        -j NETPOL-EGRESS            may it leave?                 a tree of chains by source (kernelstate/chain_tree.py)
        -j NETPOL-INGRESS           may it come in?               a tree by destination
          NETPOL-IN-10.244.1.0-28
            ! -s 10.244.1.9 -d 10.244.1.9 -j NETPOL-IN-90B3...    "shop/db-1"; what a pod sends itself is nobody's business
    mangle INPUT         packets to the node itself
      NETPOL-INPUT       the same, up to NETPOL-EGRESS

    NETPOL-IN-90B3...    one chain for all pods of whom policies say the same; for each of its clauses, whatever the number of peers, at most
      -m set PEERS src                 -j RETURN     pods, on every port
      -m set BLOCKS src                -j RETURN     address blocks, on every port
      -m set TUPLES src,dst            -j RETURN     a pod on a port
      -m set NETS src,dst              -j RETURN     a block, or anybody, on a port
      -p tcp --dport a:b [-m set R..]  -j RETURN     one rule for each large range of ports that is stated
      -g NETPOL-DENY-INGRESS                         clauses of tiers end there or in -g NETPOL-IN-90B3...-REST as well

    NETPOL-DENY-INGRESS
      -m addrtype --src-type LOCAL -j RETURN         from this node: a look at the routes that only those pay who would be denied
      -m set DENIED dst                              counted; logged if that is wanted (denied.py)
      -j DROP

A RETURN from a group's chain goes on to the other direction; the end of NETPOL goes on to whatever else is in the table. Sets come
before the rules that ask them, and peers that come and go are members of sets: no rule is written for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from clusterstate.snapshot import Name
from kernelstate.chain_tree import Addresses, Line, Tree
from kernelstate.diff_sets import MemberChange
from kernelstate.objects.address import Family, IPAddress, Prefix
from kernelstate.objects.netfilter import (
    AddrType,
    Anchor,
    ChainKey,
    Comment,
    ConnState,
    Jump,
    Limit,
    Match,
    Nflog,
    OpensNoConnection,
    Protocol,
    Rule,
    SetMatch,
    Target,
    Verdict,
)
from kernelstate.objects.sets import IpSet, IpSets, Member, SetSpec
from netpolicy.compile import PolicyChange
from netpolicy.render.clauses import Clause, Touched
from netpolicy.render.denied import GROUP, MARKS, DeniedLog
from netpolicy.render.grouping import GroupChange, Grouping, Place
from netpolicy.render.groups import Does, Group, Step
from netpolicy.render.iptables_sets import HEADS, Side, look_ups, moves_of, own_name, ranges_of, sets_of
from netpolicy.table import DIRECTIONS, Direction, PolicyTable
from netpolicy.wording import shorten

FAMILIES: tuple[Family, ...] = (4, 6)
CHAIN, INPUT_CHAIN = "NETPOL", "NETPOL-INPUT"
BRANCHES: Mapping[Direction, str] = {"egress": "NETPOL-EGRESS", "ingress": "NETPOL-INGRESS"}
DENIALS: Mapping[Direction, str] = {"egress": "NETPOL-DENY-EGRESS", "ingress": "NETPOL-DENY-INGRESS"}
CHAIN_NAMES = frozenset({CHAIN, INPUT_CHAIN, *BRANCHES.values(), *DENIALS.values()})
PREFIXES = tuple(HEADS.values())
"""How names of chains of ours start, and those of sets besides ISOLATED."""
ISOLATED = "NETPOL-ISOLATED-"
DENIED: Mapping[Direction, str] = {"egress": "NETPOL-DENIED-EGRESS-", "ingress": "NETPOL-DENIED-INGRESS-"}
"""Sets that count."""
LOGGED_BYTES = 128
COMMENT = 255
"""Bytes; the kernel takes 256 with the NUL at the end."""

_SIDES: Mapping[Direction, Side] = {"egress": "src", "ingress": "dst"}
"""On which side of a packet the pod is."""


class IptablesPolicyChange(NamedTuple):
    """What may differ from before: chains, whole sets (some of them gone), and members of sets that stay."""

    chains: frozenset[ChainKey]
    sets: frozenset[str]
    members: tuple[MemberChange, ...]


class IptablesPolicyProgram:
    """Both families' chains and sets for one node's policies; ``chains`` and ``sets`` are updated in place."""

    def __init__(self, log: DeniedLog | None = None) -> None:
        """``log``: how often a packet that is denied is logged; None: never."""
        self.chains: dict[ChainKey, tuple[Rule, ...]] = {}
        self.sets: IpSets = {}
        self._members: dict[str, set[Member]] = {}
        """What the sets hold: the same objects."""
        self._grouping = Grouping()
        self._trees = {(f, d): Tree(Addresses(f, HEADS[d], _SIDES[d])) for f in FAMILIES for d in DIRECTIONS}
        self._lines: dict[Place, tuple[Line, ...]] = {}
        self._chains_noted: set[ChainKey] = set()
        self._sets_noted: set[str] = set()
        self._moves: list[MemberChange] = []
        for family in FAMILIES:
            self._set(SetSpec(f"{ISOLATED}{family}", "hash:ip", family), ())
            for direction in DIRECTIONS:
                self._set(counting_set(direction, family), ())
            for name, rules in _entrance(family, log).items():
                self._chain(ChainKey(family, "mangle", name), rules)

    @property
    def anchors(self) -> tuple[Anchor, ...]:
        """The rules that lead here."""
        doors = {"POSTROUTING": CHAIN, "INPUT": INPUT_CHAIN}
        return tuple(
            Anchor(ChainKey(family, "mangle", door), Rule(Jump(chain), (Comment("NetworkPolicy"),)))
            for family in FAMILIES
            for door, chain in doors.items()
        )

    def update(self, table: PolicyTable, change: PolicyChange) -> IptablesPolicyChange:
        """Take in a change of the policy table; return what differs. The first update tells everything."""
        moves = self._grouping.update(table, change)
        for clause, touched in moves.moved:
            self._move(clause, touched)
        for clause in moves.clauses:
            self._fill(clause)
        for group in moves.groups:
            for key, rules in _chains(group):
                self._chain(key, rules)
        self._lead(moves)
        for group in moves.gone_groups:
            for key, _ in _chains(group):
                self._chain(key, None)
        for clause in moves.gone_clauses:
            self._empty(clause)
        found = IptablesPolicyChange(frozenset(self._chains_noted), frozenset(self._sets_noted), tuple(self._moves))
        self._chains_noted, self._sets_noted, self._moves = set(), set(), []
        return found._replace(members=tuple(m for m in found.members if m.spec.name not in found.sets))

    # -- from an address to its group ----------------------------------------------------------------------------------

    def _lead(self, moves: GroupChange) -> None:
        removed: dict[tuple[Family, Direction], list[Line]] = {key: [] for key in self._trees}
        added: dict[tuple[Family, Direction], list[Line]] = {key: [] for key in self._trees}
        for direction, address in sorted(moves.places, key=repr):
            before = self._lines.pop((direction, address), ())
            after = tuple(_line(direction, address, *claim) for claim in self._grouping.claims(direction, address))
            if after:
                self._lines[direction, address] = after
            if before != after:
                removed[address.version, direction] += before
                added[address.version, direction] += after
        for (family, direction), tree in self._trees.items():
            if removed[family, direction] or added[family, direction]:
                for name, rules in tree.change(removed[family, direction], added[family, direction]).items():
                    self._chain(ChainKey(family, "mangle", name), rules)
                self._chain(ChainKey(family, "mangle", BRANCHES[direction]), tree.top)
        for direction, address in moves.places:
            self._turn(counting_set(direction, address.version), {(int(address),): bool(self._grouping.at(direction, address))})
        for address in {address for _, address in moves.places}:
            family = address.version
            spec = self.sets[f"{ISOLATED}{family}"].spec
            self._turn(spec, {(int(address),): self._grouping.is_isolated(address)})

    # -- what is written for a clause ----------------------------------------------------------------------------------

    def _fill(self, clause: Clause) -> None:
        for family in FAMILIES:
            for spec, members in sets_of(clause, family):
                self._set(spec, members)

    def _empty(self, clause: Clause) -> None:
        for family in FAMILIES:
            for spec, _ in sets_of(clause, family):
                del self.sets[spec.name], self._members[spec.name]
                self._sets_noted.add(spec.name)

    def _move(self, clause: Clause, touched: Touched) -> None:
        if clause.everything:
            return
        for family in FAMILIES:
            for spec, present in moves_of(clause, family, touched):
                self._turn(spec, present)
            for spec, wanted in ranges_of(clause, family):
                self._set(spec, wanted)

    # -- noting --------------------------------------------------------------------------------------------------------

    def _chain(self, key: ChainKey, rules: tuple[Rule, ...] | None) -> None:
        if self.chains.get(key) == rules:
            return
        self._chains_noted.add(key)
        if rules is None:
            del self.chains[key]
        else:
            self.chains[key] = rules

    def _set(self, spec: SetSpec, members: Iterable[Member]) -> None:
        """Let a set hold exactly these."""
        wanted = set(members)
        if spec.name in self.sets:
            held = self._members[spec.name]
            self._turn(spec, {**dict.fromkeys(held - wanted, False), **dict.fromkeys(wanted - held, True)})
            return
        self._members[spec.name] = wanted
        self.sets[spec.name] = IpSet(spec, wanted)
        self._sets_noted.add(spec.name)

    def _turn(self, spec: SetSpec, present: Mapping[Member, bool]) -> None:
        """Let members be there or not."""
        held = self._members[spec.name]
        added = {member for member, is_there in present.items() if is_there and member not in held}
        removed = {member for member, is_there in present.items() if not is_there and member in held}
        if added or removed:
            held |= added
            held -= removed
            self._moves.append(MemberChange(spec, added, removed))


def counting_set(direction: Direction, family: Family) -> SetSpec:
    """Return the set whose members count denied packets."""
    return SetSpec(f"{DENIED[direction]}{family}", "hash:ip", family, counters=True)


def render_policies(table: PolicyTable, log: DeniedLog | None = None) -> IptablesPolicyProgram:
    """Render a whole policy table."""
    program = IptablesPolicyProgram(log)
    program.update(table, PolicyChange(dict.fromkeys(table.pods), dict.fromkeys(table.rules), {}))
    return program


def _entrance(family: Family, log: DeniedLog | None) -> dict[str, tuple[Rule, ...]]:
    """Return the chains that are there whatever the policies are."""
    known = [_rule(Verdict.RETURN, ConnState.of("RELATED", "ESTABLISHED"), says="replies, and errors about connections")]
    if family == 6:
        untracked = ConnState.of("UNTRACKED")
        known.append(_rule(Verdict.RETURN, untracked, protocol="ipv6-icmp", says="neighbour discovery, which is not tracked"))
    own: dict[Side, SetMatch] = {s: SetMatch(f"{ISOLATED}{family}", (s,), negated=True) for s in ("src", "dst")}
    rest = _rule(Verdict.DROP, OpensNoConnection(), protocol="tcp", says="the rest of a connection that was cut")
    leaves = _rule(Jump(BRANCHES["egress"]), says="may it leave?")
    return {
        CHAIN: (
            *known,
            _rule(Verdict.RETURN, own["src"], own["dst"], says="neither end is a pod here that is isolated"),
            rest,
            leaves,
            _rule(Jump(BRANCHES["ingress"]), says="may it come in?"),
        ),
        INPUT_CHAIN: (*known, _rule(Verdict.RETURN, own["src"], says="not from a pod here that is isolated"), rest, leaves),
        **dict.fromkeys(BRANCHES.values(), ()),
        **{DENIALS[direction]: tuple(_deny(family, direction, log)) for direction in DIRECTIONS},
    }


def _deny(family: Family, direction: Direction, log: DeniedLog | None) -> Iterator[Rule]:
    """Yield what happens to packets that are denied; a pod's own node never is."""
    if direction == "ingress":
        yield _rule(Verdict.RETURN, AddrType(src="LOCAL"), says="from this node")
    own = SetMatch(f"{DENIED[direction]}{family}", (_SIDES[direction],))
    yield Rule(None, (Comment("counts them for the pod"), own))
    if log is not None:
        yield Rule(Nflog(MARKS[direction], GROUP, LOGGED_BYTES), (Limit(log.per_second, log.burst),))
    yield Rule(Verdict.DROP)


def _line(direction: Direction, address: IPAddress, pod: Name, group: Group) -> Line:
    """Return the rule that leads a pod's packets to its group's chain, and where it stands."""
    own, is_source = Prefix.host(address), direction == "egress"
    rule = Rule(
        Jump(_chain_name(group)),
        (Comment("/".join(pod)),),
        source=own,
        destination=own,
        source_negated=not is_source,
        destination_negated=is_source,
    )
    return int(address), pod, 0, rule


# -- a group ---------------------------------------------------------------------------------------------------------------


def _chain_name(group: Group) -> str:
    return own_name(group.key.direction, group.name)


def _rest_name(group: Group) -> str:
    return f"{_chain_name(group)}-REST"


def _chains(group: Group) -> Iterator[tuple[ChainKey, tuple[Rule, ...]]]:
    """Yield a group's chains in each family: its own, and the one to which its steps pass packets on."""
    for family in FAMILIES:
        asked = [rule for step in group.steps for rule in _ask(group, step, family)]
        rest = [*(rule for step in group.rest for rule in _ask(group, step, family)), *_end(group)]
        if group.passes:
            yield ChainKey(family, "mangle", _rest_name(group)), tuple(rest)
            rest = [] if group.ends_before_rest else [Rule(Jump(_rest_name(group), goto=True))]
        yield ChainKey(family, "mangle", _chain_name(group)), (*asked, *rest)


def _denied(group: Group) -> Jump:
    return Jump(DENIALS[group.key.direction], goto=True)


def _end(group: Group) -> tuple[Rule, ...]:
    """Return how a group's chain ends for what met no rule: whoever isolates lets nothing more through."""
    return (_rule(_denied(group), says=group.who),) if group.is_closed else ()


def _ask(group: Group, step: Step, family: Family) -> Iterator[Rule]:
    """Yield the look-ups of one clause."""
    does: dict[Does, Target] = {
        "accept": Verdict.RETURN,
        "deny": _denied(group),
        "pass": Jump(_rest_name(group), goto=True),
    }
    clause, target = step.clause, does[step.does]
    if clause.everything:
        yield _rule(target, says=group.words_about_all(step))
        return
    for matches, protocol, says in look_ups(clause, family):
        yield _rule(target, *matches, protocol=protocol, says=says)


def _rule(target: Target, *matches: Match, protocol: Protocol = "", says: str) -> Rule:
    return Rule(target, (Comment(shorten(says, COMMENT)), *matches), protocol)
