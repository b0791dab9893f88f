"""What nftables does to the first packet of a connection: a walk over the typed rules and sets of one table a family.

      from elsewhere                                            from this node
           |                                                          |
      prerouting: base chains, lowest priority first            output: the same
           |                                                          |
      input, or forward and postrouting                         postrouting, and input if it is for the node

The way from hook to hook is the packet filter's (``simulate.py``); what is met at a hook are the table's base chains. A nat chain
is asked by first packets only, and an accepting rule ends its base chain, not the hook. A rule whose look-up finds nothing is
left, and the next one tried. Where rules draw lots (``numgen``) every branch is followed; ``jhash`` is computed, so that the
answer is the one endpoint the kernel would take. Elements of dynamic sets are the kernel's: ``Packet.remembered`` names the sets
in which the packet's source stands.

Source: nft(8); kernel net/netfilter/nf_tables_core.c (nft_do_chain).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Literal, TypeAlias, assert_never

import msgspec

from kernelstate.jhash import jhash_mod
from kernelstate.objects.address import BITS, Family, IPAddress, Prefix, address_text
from kernelstate.objects.netfilter import Ruleset
from kernelstate.objects.netfilter import Table as FilterTable
from kernelstate.objects.nftables import (
    AcceptPacket,
    AddressIs,
    Chain,
    Chance,
    CtState,
    CtStatus,
    Data,
    DnatByMap,
    DnatTo,
    DropPacket,
    ElementKey,
    FibLocal,
    Field,
    Goto,
    GotoChain,
    InSet,
    InterfaceIs,
    Interval,
    JumpChain,
    JumpTo,
    Key,
    KeyPart,
    LogSome,
    MarkIs,
    MasqueradeFully,
    Match,
    NeighbourDiscovery,
    OpensNoConnection,
    OrMark,
    ProtocolIs,
    Random,
    Refuse,
    Remember,
    ReturnToCaller,
    Rule,
    SourceHash,
    Statement,
    Table,
    VerdictMap,
    XorMark,
)
from kernelstate.simulate import Answer, OtherStep, Packet, Simulator, State
from kernelstate.text.nft import rule_text

_End: TypeAlias = Answer | Literal["return", "pass", "next"]
"""How a statement ends: with a verdict; back to the calling chain; on to the next statement; or on to the next rule."""

_Branches: TypeAlias = Iterator[tuple[_End, State]]
_replace = msgspec.structs.replace


class NftablesSimulator(Simulator):
    """Walks packets over one table a family; they must not change meanwhile."""

    def __init__(self, tables: Mapping[Family, Table], local_addresses: Collection[IPAddress] = ()) -> None:
        super().__init__(Ruleset({}), local_addresses)
        self._tables = tables
        self._hooks = {family: _by_hook(table) for family, table in tables.items()}
        self._intervals: dict[tuple[Family, str], dict[ElementKey, list[Interval]]] = {}

    def hook(
        self,
        hook: str,
        packet: Packet,
        states: list[State],
        ended: list[tuple[Answer, State]],
        tables: tuple[FilterTable, ...] = (),
    ) -> list[State]:
        """Walk the base chains of one hook; returns the states that came through, adds the others to ``ended``.

        ``tables`` are words of the packet filter, and mean nothing here.
        """
        for name in self._hooks.get(packet.source.version, {}).get(hook.lower(), ()):
            chain = self._tables[packet.source.version].chains[name]
            if chain.hook is not None and chain.hook.type == "nat" and packet.state != "NEW":
                continue
            through: list[State] = []
            for state in states:
                for end, after in self._chain(name, packet, self._on_links(hook, packet, state), 0):
                    if end == "reject" or end == "drop":  # noqa: PLR1714  mypy narrows this, not a set
                        ended.append((end, after))
                    else:
                        through.append(after)
            states = through
        return states

    # -- chains and rules ----------------------------------------------------------------------------------------------

    def _chain(self, name: str, packet: Packet, state: State, start: int) -> _Branches:
        """Walk one chain from a rule on; yields how and in which state each branch leaves it: a verdict, or "return"."""
        rules = self._tables[state.family].chains.get(name, Chain(())).rules
        for position in range(start, len(rules)):
            rule = rules[position]
            chance = self._odds(rule, packet, state)
            if not chance:
                continue
            left = [_replace(state, probability=state.probability * (1 - chance))] if chance < 1 else []
            for end, after in self._rule(name, rule, packet, _replace(state, probability=state.probability * chance)):
                if end == "next":
                    left.append(after)
                else:
                    yield end, after
            if not left:
                return
            for other in left[:-1]:
                yield from self._chain(name, packet, other, position + 1)
            state = left[-1]
        yield "return", state

    def _odds(self, rule: Rule, packet: Packet, state: State) -> float:
        """Return the probability with which every match of a rule holds."""
        chance = 1.0
        for match in rule.matches:
            if isinstance(match, Chance):
                chance /= match.modulus
            elif not self._holds(match, packet, state):
                return 0
        return chance

    def _rule(self, chain: str, rule: Rule, packet: Packet, state: State) -> _Branches:
        """Do a rule's statements in order; "next" where the rule is left for the one behind it."""
        what = f"nft {chain}: {rule_text(state.family, rule)}"
        states = [state]
        for statement in rule.statements:
            passed: list[State] = []
            for one in states:
                for end, after in self._statement(what, statement, packet, one):
                    if end == "pass":
                        passed.append(after)
                    else:
                        yield end, after
            states = passed
        yield from (("next", one) for one in states)

    def _statement(self, what: str, statement: Statement, packet: Packet, state: State) -> _Branches:
        match statement:
            case OrMark(mask):
                yield "pass", _marked(what, state, state.mark | mask)
            case XorMark(mask):
                yield "pass", _marked(what, state, state.mark ^ mask)
            case JumpChain(chain):
                for end, after in self._chain(chain, packet, _told(what, state, f"goes to {chain}"), 0):
                    yield "pass" if end == "return" else end, after
            case GotoChain(chain):
                yield from self._chain(chain, packet, _told(what, state, f"goes to {chain}"), 0)
            case VerdictMap(key, name):
                for data, branch in self._look_up(key, name, packet, state):
                    yield from self._verdict(what, data, packet, branch)
            case DnatByMap(key, name):
                for data, branch in self._look_up(key, name, packet, state):
                    if isinstance(data, tuple) and not isinstance(data, Goto | JumpTo):
                        yield "accept", _translated(what, branch, *data)
                    else:
                        yield "next", branch
            case DnatTo(address, port):
                yield "accept", _translated(what, state, address, port)
            case Remember(_, name):
                yield "pass", _told(what, state, f"remembered in {name}")
            case LogSome(group=group):
                yield "pass", _told(what, state, f"logged to group {group}, now and then")
            case MasqueradeFully():
                yield "accept", _replace(_told(what, state, "source becomes this node's address"), masquerade=True)
            case Refuse():
                yield "reject", _told(what, state, "rejected")
            case DropPacket():
                yield "drop", _told(what, state, "dropped")
            case AcceptPacket():
                yield "accept", _told(what, state, "accepted here")
            case ReturnToCaller():
                yield "return", _told(what, state, "no further here")
            case _:
                assert_never(statement)

    def _verdict(self, what: str, data: Data | _Nothing, packet: Packet, state: State) -> _Branches:
        match data:
            case Goto(chain):
                yield from self._chain(chain, packet, _told(what, state, f"goes to {chain}"), 0)
            case JumpTo(chain):
                for end, after in self._chain(chain, packet, _told(what, state, f"goes to {chain}"), 0):
                    yield "next" if end == "return" else end, after
            case "drop":
                yield "drop", _told(what, state, "dropped")
            case "accept":
                yield "accept", _told(what, state, "accepted here")
            case _:
                yield "next", state

    # -- look-ups ------------------------------------------------------------------------------------------------------

    def _look_up(self, key: Key, name: str, packet: Packet, state: State) -> Iterator[tuple[Data | _Nothing, State]]:
        """Return what a map holds under a key; where the key draws a number, for each number there is."""
        held = self._tables[state.family].elements.get(name, {})
        keys = list(_keys(key, packet, state))
        for one in keys:
            branch = state if len(keys) == 1 else _replace(state, probability=state.probability / len(keys))
            yield held.get(one, _NOTHING), branch

    def _in_set(self, match: InSet, packet: Packet, state: State) -> bool:
        table = self._tables[state.family]
        named = table.sets.get(match.set)
        if named is not None and named.dynamic:
            return match.set in state.remembered
        (key,) = _keys(match.key, packet, state)
        if named is None or not named.intervals:
            return key in table.elements.get(match.set, {})
        if any(isinstance(part, Interval) for one in table.elements.get(match.set, {}) for part in one[:-1]):
            return any(_fits(one, key) for one in table.elements[match.set])
        last = key[-1]
        assert isinstance(last, int)
        return any(i.first <= last <= i.last for i in self._ranges(state.family, match.set).get(key[:-1], ()))

    def _ranges(self, family: Family, name: str) -> dict[ElementKey, list[Interval]]:
        """Return an interval set, of which only the last part is a range, by the parts before it."""
        found = self._intervals.get((family, name))
        if found is None:
            found = self._intervals[family, name] = defaultdict(list)
            for key in self._tables[family].elements.get(name, {}):
                if isinstance(key[-1], Interval):
                    found[key[:-1]].append(key[-1])
        return found

    def _holds(self, match: Match, packet: Packet, state: State) -> bool:
        match match:
            case CtState(states):
                return packet.state.lower() in states
            case CtStatus(status):
                return status == "dnat" and state.dnat
            case InSet():
                return self._in_set(match, packet, state) != match.negated
            case AddressIs(side, prefixes, negated):
                address = state.source if side == "saddr" else state.destination
                return any(_inside(address, p) for p in prefixes) != negated
            case InterfaceIs(name, negated):
                link = state.in_interface
                return (link.startswith(name[:-1]) if name.endswith("*") else link == name) != negated
            case FibLocal(side):
                return self.is_local(state.family, state.source if side == "saddr" else state.destination)
            case ProtocolIs(protocols):
                return state.protocol in protocols
            case MarkIs(mask, negated):
                return bool(state.mark & mask) != negated
            case OpensNoConnection():
                return state.protocol == "tcp" and packet.state != "NEW"
            case NeighbourDiscovery():
                return False  # packets here are of protocols that have ports
            case Chance():  # a chance, not a condition
                return False
            case _:
                assert_never(match)


def _fits(element: ElementKey, key: ElementKey) -> bool:
    """Whether each part of an element is, or holds, what is looked up."""
    return all(
        part.first <= value <= part.last if isinstance(part, Interval) else part == value  # type: ignore[operator]
        for part, value in zip(element, key, strict=True)
    )


class _Nothing:
    """What a map holds under a key that is not in it."""


_NOTHING = _Nothing()


def _by_hook(table: Table) -> dict[str, tuple[str, ...]]:
    """Return the base chains of each hook in the order in which they are called."""
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name, chain in table.chains.items():
        if chain.hook is not None:
            found[chain.hook.hook].append((chain.hook.priority, name))
    return {hook: tuple(name for _, name in sorted(chains)) for hook, chains in found.items()}


def _keys(key: Key, packet: Packet, state: State) -> Iterable[ElementKey]:
    """Return the key of a look-up; if a number is drawn, each that may come up, all equally likely."""
    keys: list[ElementKey] = [()]
    for part in key:
        keys = [(*one, value) for one in keys for value in _values(part, packet, state)]
    return keys


def _values(part: KeyPart, packet: Packet, state: State) -> Iterable[int | str]:
    match part:
        case Field(name):
            return (_field(name, packet, state),)
        case Random(modulus):
            return range(modulus)
        case SourceHash(modulus, seed):
            return (jhash_mod(state.source.to_bytes(BITS[state.family] // 8, "big"), modulus, seed),)
    assert_never(part)


def _field(name: str, packet: Packet, state: State) -> int | str:
    fields: dict[str, int | str] = {
        "saddr": state.source,
        "daddr": state.destination,
        "l4proto": state.protocol,
        "dport": state.destination_port,
        "original-saddr": int(packet.source),
        "original-daddr": int(packet.destination),
        "original-dport": packet.destination_port,
    }
    return fields[name]


def _told(what: str, state: State, happened: str) -> State:
    """Add to the story; what one rule does is one step."""
    steps = state.steps
    if steps and isinstance(steps[-1], OtherStep) and steps[-1].what == what:
        steps, happened = steps[:-1], f"{steps[-1].happened}, {happened}"
    return _replace(state, steps=(*steps, OtherStep(what, happened)))


def _marked(what: str, state: State, mark: int) -> State:
    return _replace(_told(what, state, f"mark becomes 0x{mark:x}"), mark=mark)


def _translated(what: str, state: State, address: int, port: int) -> State:
    told = _told(what, state, f"destination becomes {address_text(state.family, address)} port {port}")
    return _replace(told, destination=address, destination_port=port, dnat=True)


def _inside(address: int, prefix: Prefix) -> bool:
    shift = BITS[prefix.family] - prefix.length
    return address >> shift == prefix.network >> shift
