"""What the packet filter does to the first packet of a connection: a walk over typed rules, in memory.

      from elsewhere                                                   from this node
           |                                                                 |
      PREROUTING raw mangle nat                                       OUTPUT raw mangle nat filter
           |                                                                 |
       is the destination ours?                                    POSTROUTING mangle nat
        yes |           | no                                                 |
      INPUT mangle      FORWARD mangle filter                      is the destination ours?
        filter nat      |                                           yes |          | no
            |           POSTROUTING mangle nat               INPUT mangle filter   |
         accepted       |                                               |          leaves
                        leaves                                       accepted

Decides the outcome exactly as xtables would: first match, jumps and returns, connection states, marks. Where rules draw lots
(statistic) it follows every branch with its probability, so the answer is a set of paths. Routing is reduced to one question
(is it ours?), builtin policies are ACCEPT, and chains named as anchors hold just those. Matches and targets of others that
are only carried as words cannot be judged: such a match does not match, such a target passes, and the steps say so. Packets are
routed, never bridged.

Long chains are indexed by protocol, destination and port, so that ten thousand Services cost a packet no more than ten.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from ipaddress import ip_address
from typing import Literal, TypeAlias, assert_never

import msgspec

from kernelstate.objects.address import Family, IPAddress, Prefix, address_text
from kernelstate.objects.netfilter import (
    PROBABILITY_ONE,
    AddrType,
    ChainKey,
    Comment,
    ConnState,
    Dnat,
    FromBridgePort,
    Jump,
    Limit,
    Mark,
    Masquerade,
    Match,
    NfAcct,
    Nflog,
    OpensNoConnection,
    OtherMatch,
    OtherTarget,
    Protocol,
    Recent,
    Reject,
    Rule,
    Ruleset,
    SetMatch,
    SetXmark,
    Statistic,
    Table,
    Transport,
    Verdict,
)
from kernelstate.objects.sets import IpSets
from kernelstate.simulate_sets import SetReader
from kernelstate.text.iptables_save import print_rule

Answer: TypeAlias = Literal["accept", "reject", "drop"]

HOOKS: dict[str, tuple[Table, ...]] = {
    "PREROUTING": ("raw", "mangle", "nat"),
    "INPUT": ("mangle", "filter", "nat"),
    "FORWARD": ("mangle", "filter"),
    "OUTPUT": ("raw", "mangle", "nat", "filter"),
    "POSTROUTING": ("mangle", "nat"),
}
"""Which tables a packet meets at each hook, in the order of their priorities."""

INDEXED = 16
"""Chains longer than this are indexed at first use."""


class Packet(msgspec.Struct, frozen=True):
    """The first packet of a flow. Interface names may be empty where no rule looks at them.

    ``remembered`` names the ``recent`` lists in which its source stands from an earlier connection. ``by_socket``: a process of
    this node or of its pods asked for it, by connect or sendmsg.
    """

    protocol: Protocol
    source: IPAddress
    destination: IPAddress
    destination_port: int = 0
    source_port: int = 49152
    in_interface: str = ""
    out_interface: str = ""
    from_local: bool = False
    state: str = "NEW"
    mark: int = 0
    remembered: frozenset[str] = frozenset()
    by_socket: bool = False


class Step(msgspec.Struct, frozen=True):
    """One rule that matched, and what then happened."""

    table: Table
    chain: str
    rule: Rule
    happened: str

    def __str__(self) -> str:
        """Print as ``nat -A KUBE-SERVICES ... -j KUBE-SVC-X => goes to KUBE-SVC-X``."""
        return f"{self.table} {print_rule(self.chain, self.rule)} => {self.happened}"


class OtherStep(msgspec.Struct, frozen=True):
    """Something other than a rule that took the packet: what it was, as its own tool words it, and what then happened."""

    what: str
    happened: str

    def __str__(self) -> str:
        """Print as ``ipvs -A -t 10.96.0.1:80 -s rr => ...``."""
        return f"{self.what} => {self.happened}"


class Path(msgspec.Struct, frozen=True):
    """One thing that may happen: with which probability, and the way there. ``dnat`` is (address, port) after translation."""

    probability: float
    verdict: Answer
    dnat: tuple[IPAddress, int] | None
    masquerade: bool
    mark: int
    steps: tuple[Step | OtherStep, ...]


class State(msgspec.Struct, frozen=True, gc=False):
    """The packet on its way; ``source`` and ``destination`` are numbers, ``dnat`` says whether the latter was translated."""

    family: Family
    protocol: str
    source: int
    source_port: int
    destination: int
    destination_port: int
    in_interface: str
    out_interface: str
    conn_states: frozenset[str]
    mark: int
    remembered: frozenset[str]
    probability: float = 1.0
    dnat: bool = False
    masquerade: bool = False
    steps: tuple[Step | OtherStep, ...] = ()


_End: TypeAlias = Answer | Literal["return"]
_replace = msgspec.structs.replace


class Simulator:
    """Walks packets over one ruleset, which must not change meanwhile; chains are indexed as packets meet them."""

    def __init__(self, ruleset: Ruleset, local_addresses: Collection[IPAddress] = (), sets: IpSets | None = None) -> None:
        self._chains: dict[ChainKey, tuple[Rule, ...]] = ruleset.chains
        self._doors: dict[ChainKey, tuple[Rule, ...]] = defaultdict(tuple)
        for anchor in ruleset.anchors:
            if anchor.chain not in ruleset.chains:
                self._doors[anchor.chain] += (anchor.rule,)
        self._local = {(address.version, int(address)) for address in local_addresses}
        self._indexes: dict[ChainKey, _Index] = {}
        self._sets = SetReader(sets or {})

    def walk(self, packet: Packet) -> tuple[Path, ...]:
        """Return everything that may happen to the packet; the probabilities sum to 1."""
        return tuple(
            Path(
                state.probability,
                verdict,
                (ip_address(address_text(state.family, state.destination)), state.destination_port) if state.dnat else None,
                state.masquerade,
                state.mark,
                state.steps,
            )
            for verdict, state in self.way(packet)
        )

    def is_local(self, family: Family, address: int) -> bool:
        """Whether the node itself answers to the address: its own, or loopback."""
        loopback = address >> 24 == 127 if family == 4 else address == 1
        return loopback or (family, address) in self._local

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def way(self, packet: Packet) -> Iterator[tuple[Answer, State]]:
        """Lead a packet from hook to hook; whoever adds hooks of its own to the kernel's overrides this."""
        ended: list[tuple[Answer, State]] = []
        for state in self.hook("OUTPUT" if packet.from_local else "PREROUTING", packet, [state_of(packet)], ended):
            local = self.is_local(state.family, state.destination)
            if packet.from_local:
                hooks = ("POSTROUTING", "INPUT") if local else ("POSTROUTING",)
            else:
                hooks = ("INPUT",) if local else ("FORWARD", "POSTROUTING")
            states = [state]
            for hook in hooks:
                states = self.hook(hook, packet, states, ended)
            yield from (("accept", final) for final in states)
        yield from ended

    def hook(
        self,
        hook: str,
        packet: Packet,
        states: list[State],
        ended: list[tuple[Answer, State]],
        tables: tuple[Table, ...] = (),
    ) -> list[State]:
        """Walk the tables of one hook (or only those named); returns the states that came through, adds others to ``ended``."""
        for table in tables or HOOKS[hook]:
            key = ChainKey(packet.source.version, table, hook)
            if key not in self._doors or (table == "nat" and packet.state != "NEW"):
                continue
            through: list[State] = []
            for state in states:
                for end, after in self._walk(key, self._on_links(hook, packet, state), 0):
                    if end == "reject" or end == "drop":  # noqa: PLR1714  mypy narrows this, not a set
                        ended.append((end, after))
                    else:  # returned to the builtin chain, whose policy is ACCEPT
                        through.append(after)
            states = through
        return states

    def _on_links(self, hook: str, packet: Packet, state: State) -> State:
        """Return the state with the links that rules see at a hook: none to leave by before routing, none to come by after."""
        loopback = packet.from_local and self.is_local(state.family, state.destination)
        incoming = ("lo" if loopback else packet.in_interface) if hook in {"PREROUTING", "INPUT", "FORWARD"} else ""
        outgoing = ("lo" if loopback else packet.out_interface) if hook in {"FORWARD", "OUTPUT", "POSTROUTING"} else ""
        if (incoming, outgoing) == (state.in_interface, state.out_interface):
            return state
        return _replace(state, in_interface=incoming, out_interface=outgoing)

    # -- chains --------------------------------------------------------------------------------------------------------

    def _walk(self, key: ChainKey, state: State, start: int) -> Iterator[tuple[_End, State]]:
        """Walk one chain from a rule on; yields how and in which state each branch leaves it."""
        rules = self._doors.get(key) or self._chains.get(key, ())
        for position in self._candidates(key, rules, state, start):
            rule = rules[position]
            chance = self._chance(rule, state)
            if not chance:
                continue
            hit = state if chance == 1 else _replace(state, probability=state.probability * chance)
            rest = None if chance == 1 else _replace(state, probability=state.probability * (1 - chance))
            passed: list[State] = []  # branches that go on behind this rule
            for end, after in self._target(key, rule, hit):
                if end == "pass":
                    passed.append(after)
                else:
                    yield end, after
            if rest is not None:
                passed.append(rest)
            if not passed:
                return
            for other in passed[:-1]:
                yield from self._walk(key, other, position + 1)
            state = passed[-1]
        yield "return", state

    def _candidates(self, key: ChainKey, rules: tuple[Rule, ...], state: State, start: int) -> Iterable[int]:
        """Return the positions of rules that may match, in order; those left out cannot."""
        if len(rules) <= INDEXED:
            return range(start, len(rules))
        index = self._indexes.get(key)
        if index is None:
            index = self._indexes[key] = _Index(rules)
        return [position for position in index.positions(state) if position >= start]

    def _target(self, key: ChainKey, rule: Rule, state: State) -> Iterator[tuple[_End | Literal["pass"], State]]:
        """Do what a rule that matched says; "pass" goes on behind it."""
        target = rule.target

        def after(happened: str, **changes: object) -> State:
            step = Step(key.table, key.name, rule, happened)
            return _replace(state, steps=(*state.steps, step), **changes)

        match target:
            case None:
                yield "pass", after("counted")
            case Jump(chain, goto):
                yield from self._jump(ChainKey(key.family, key.table, chain), after(f"goes to {chain}"), goto)
            case Verdict.ACCEPT:
                yield "accept", after("accepted here")
            case Verdict.DROP:
                yield "drop", after("dropped")
            case Verdict.RETURN:
                yield "return", after("returns")
            case Reject():
                yield "reject", after("rejected")
            case Dnat(_, address, port):
                port = port or state.destination_port
                states = state.conn_states | {"DNAT"}
                text = f"destination becomes {address_text(key.family, address)} port {port}"
                yield "accept", after(text, destination=address, destination_port=port, dnat=True, conn_states=states)
            case Masquerade():
                yield "accept", after("source becomes this node's address", masquerade=True)
            case SetXmark(value, mask):
                mark = (state.mark & ~mask & 0xFFFFFFFF) ^ value
                yield "pass", after(f"mark becomes 0x{mark:x}", mark=mark)
            case Nflog(group=group):
                yield "pass", after(f"logged to group {group}")
            case OtherTarget(words):
                yield "pass", after(f"{words[0]} is not simulated")
            case _:
                assert_never(target)

    def _jump(self, key: ChainKey, state: State, goto: bool) -> Iterator[tuple[_End | Literal["pass"], State]]:
        for end, after in self._walk(key, state, 0):
            if end == "return":
                yield "return" if goto else "pass", after
            else:
                yield end, after

    # -- matches -------------------------------------------------------------------------------------------------------

    def _chance(self, rule: Rule, state: State) -> float:
        """Return the probability with which a rule matches."""
        if rule.protocol and rule.protocol not in {state.protocol, "all"}:
            return 0
        if rule.source is not None and _in(rule.source, state.source) == rule.source_negated:
            return 0
        if rule.destination is not None and _in(rule.destination, state.destination) == rule.destination_negated:
            return 0
        if rule.in_interface and _is_link(rule.in_interface, state.in_interface) == rule.in_interface_negated:
            return 0
        if rule.out_interface and _is_link(rule.out_interface, state.out_interface) == rule.out_interface_negated:
            return 0
        chance = 1.0
        for match in rule.matches:
            if type(match) is Statistic:
                chance *= match.probability / PROBABILITY_ONE
            elif not self._matches(match, state):
                return 0
        return chance

    def _matches(self, match: Match, state: State) -> bool:
        match match:
            case Comment() | NfAcct():
                return True
            case Transport(protocol, dport, sport):
                return (
                    protocol == state.protocol
                    and (dport is None or dport[0] <= state.destination_port <= dport[1])
                    and (sport is None or sport[0] <= state.source_port <= sport[1])
                )
            case ConnState(states, negated):
                return state.conn_states.isdisjoint(states) == negated
            case Mark(value, mask, negated):
                return (state.mark & mask == value) != negated
            case AddrType(src, dst, not_src, not_dst):
                return self._is_type(src, not_src, state.family, state.source) and self._is_type(
                    dst, not_dst, state.family, state.destination
                )
            case Recent(name, is_set, _):
                return is_set or name in state.remembered
            case SetMatch():
                source, destination = (state.source, state.source_port), (state.destination, state.destination_port)
                held = self._sets.holds(match, state.family, state.protocol, source, destination)
                return held != match.negated
            case FromBridgePort(negated):
                return negated
            case OpensNoConnection():
                return False  # a packet here is the first of its flow
            case Statistic() | Limit() | OtherMatch():  # chances, not conditions; the last cannot be judged
                return False
            case _:
                assert_never(match)

    def _is_type(self, kind: str, negated: bool, family: Family, address: int) -> bool:
        """Whether an address is LOCAL, or is not; any other type than that is one we do not judge."""
        return not kind or (kind == "LOCAL" and self.is_local(family, address) != negated)


class _Index:
    """The rules of one chain by what they demand of protocol, destination address and destination port, if anything."""

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self._positions: dict[tuple[str, int, int], list[int]] = defaultdict(list)
        for position, rule in enumerate(rules):
            destination, port = -1, -1
            if rule.destination is not None and rule.destination.is_host and not rule.destination_negated:
                destination = rule.destination.network
            for match in rule.matches:
                if type(match) is Transport and match.dport is not None and match.dport[0] == match.dport[1]:
                    port = match.dport[0]
            self._positions[rule.protocol, destination, port].append(position)

    def positions(self, state: State) -> list[int]:
        """Return the positions of rules whose demands the packet meets."""
        found: list[int] = []
        for protocol in (state.protocol, ""):
            for destination in (state.destination, -1):
                for port in (state.destination_port, -1):
                    found += self._positions.get((protocol, destination, port), ())
        return sorted(found)


def state_of(packet: Packet) -> State:
    """Return a packet as it sets out."""
    return State(
        packet.source.version,
        packet.protocol,
        int(packet.source),
        packet.source_port,
        int(packet.destination),
        packet.destination_port,
        packet.in_interface,
        packet.out_interface,
        frozenset({packet.state}),
        packet.mark,
        packet.remembered,
    )


def _in(prefix: Prefix, address: int) -> bool:
    shift = (32 if prefix.family == 4 else 128) - prefix.length
    return address >> shift == prefix.network >> shift


def _is_link(pattern: str, name: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("+") else name == pattern
