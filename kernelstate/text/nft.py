"""nftables as ``nft -f`` reads it: a table whole, for people and for a first load, and the commands that change one.

    table ip nodeplane {                                   add set ip nodeplane cluster-ips { type ipv4_addr; }
        set cluster-ips {                                  add chain ip nodeplane services
            type ipv4_addr                                 add rule ip nodeplane services ip daddr ...
            elements = { 10.96.0.1 }                       add element ip nodeplane cluster-ips { 10.96.0.1 }
        ...                                                delete element ip nodeplane cluster-ips { 10.96.0.1 }

Decides the wording only; which commands, and in which order, is ``diff_nftables.py``'s business. A map that is looked up by a
number needs ``typeof`` in its declaration, for ``type`` has no word for numbers. That of a hash loads as well, but nft 1.0.6
crashes when it lists it: the number is declared as one of ``numgen`` whichever way it is found.

Source: nft(8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import assert_never, cast

from kernelstate.objects.address import Family, address_text
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
    Hook,
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
    NamedSet,
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
    TableKey,
    VerdictMap,
    XorMark,
)

LOGGED_BYTES = 128
"""Of a packet that is logged: both headers and options."""
BATCH = 500
"""Elements in one command: what libnftables reads needs memory for each until the command is done."""

WORD: dict[int, str] = {4: "ip", 6: "ip6"}
_ADDRESS_TYPE: dict[int, str] = {4: "ipv4_addr", 6: "ipv6_addr"}


# -- a table whole ---------------------------------------------------------------------------------------------------


def print_table(key: TableKey, table: Table) -> str:
    """Print a table with its elements, sets before chains, by name; ``nft -f`` makes it where there is none of that name."""
    blocks = [_set_block(key.family, table.sets[name], table.elements.get(name, {})) for name in sorted(table.sets)]
    blocks += [_chain_block(key.family, name, table.chains[name]) for name in sorted(table.chains)]
    return f"table {WORD[key.family]} {key.name} {{\n" + "\n".join(blocks) + "}\n"


def _set_block(family: Family, named: NamedSet, elements: Mapping[ElementKey, Data]) -> str:
    lines = [f"\t\t{line}\n" for line in _declaration(family, named)]
    if elements:
        rows = element_texts(
            family, named, dict(sorted(elements.items(), key=_by_key) if named.intervals else sorted(elements.items()))
        )
        lines.append("\t\telements = { " + ",\n\t\t\t".join(rows) + " }\n")
    return f"\t{_kind(named)} {named.name} {{\n{''.join(lines)}\t}}\n"


def _by_key(item: tuple[ElementKey, Data]) -> tuple[object, ...]:
    """Order keys in which a part may be one address or an interval."""
    return tuple((part.first, part.last) if isinstance(part, Interval) else (part, part) for part in item[0])


def _chain_block(family: Family, name: str, chain: Chain) -> str:
    lines = [f"\t\t{_hook(chain.hook)}\n"] if chain.hook else []
    lines += [f"\t\t{rule_text(family, rule)}\n" for rule in chain.rules]
    return f"\tchain {name} {{\n{''.join(lines)}\t}}\n"


# -- commands --------------------------------------------------------------------------------------------------------


def add_table(key: TableKey) -> str:
    """Print the command that makes an empty table; where it exists nothing happens."""
    return f"add table {_table(key)}"


def delete_table(key: TableKey) -> str:
    """Print the command that deletes a table with everything in it."""
    return f"delete table {_table(key)}"


def add_set(key: TableKey, named: NamedSet) -> str:
    """Print the command that makes a set or map without elements."""
    return f"add {_kind(named)} {_table(key)} {named.name} {{ {'; '.join(_declaration(key.family, named))}; }}"


def delete_set(key: TableKey, named: NamedSet) -> str:
    """Print the command that deletes a set or map which no rule asks."""
    return f"delete {_kind(named)} {_table(key)} {named.name}"


def add_chain(key: TableKey, name: str, hook: Hook | None) -> str:
    """Print the command that makes an empty chain."""
    return f"add chain {_table(key)} {name}" + (f" {{ {_hook(hook)} }}" if hook else "")


def flush_chain(key: TableKey, name: str) -> str:
    """Print the command that empties a chain."""
    return f"flush chain {_table(key)} {name}"


def delete_chain(key: TableKey, name: str) -> str:
    """Print the command that deletes a chain which is empty and not led to."""
    return f"delete chain {_table(key)} {name}"


def add_rules(key: TableKey, name: str, rules: Iterable[Rule]) -> list[str]:
    """Print one command for each rule, which appends it."""
    start = f"add rule {_table(key)} {name} "
    return [start + rule_text(key.family, rule) for rule in rules]


def add_elements(key: TableKey, named: NamedSet, elements: Mapping[ElementKey, Data]) -> list[str]:
    """Print the commands that add elements, ``BATCH`` to a command."""
    return _element_commands("add", key, named, element_texts(key.family, named, elements))


def delete_elements(key: TableKey, named: NamedSet, keys: Iterable[ElementKey]) -> list[str]:
    """Print the commands that delete elements, ``BATCH`` to a command; each must be there."""
    return _element_commands("delete", key, named, key_texts(key.family, named.key, list(keys)))


def _element_commands(verb: str, key: TableKey, named: NamedSet, texts: Sequence[str]) -> list[str]:
    start = f"{verb} element {_table(key)} {named.name} {{ "
    rows = iter(texts)
    return [start + ", ".join(islice(rows, BATCH)) + " }" for _ in range(0, len(texts), BATCH)]


def _table(key: TableKey) -> str:
    return f"{WORD[key.family]} {key.name}"


# -- sets and elements -----------------------------------------------------------------------------------------------


def element_texts(family: Family, named: NamedSet, elements: Mapping[ElementKey, Data]) -> list[str]:
    """Print elements in their order, ``10.96.0.1 . tcp . 80 : goto cluster-ip-3``."""
    keys = key_texts(family, named.key, list(elements))
    if named.data == "":
        return keys
    if named.data == "verdict":
        verdicts = {data: _verdict_text(data) for data in set(elements.values())}
        return [f"{key} : {verdicts[data]}" for key, data in zip(keys, elements.values(), strict=True)]
    endpoints = cast("Mapping[ElementKey, tuple[int, int]]", elements).values()
    text = _address_texts(family, [address for address, _ in endpoints])
    return [f"{key} : {text[address]} . {port}" for key, (address, port) in zip(keys, endpoints, strict=True)]


def _verdict_text(data: Data) -> str:
    match data:
        case Goto(chain):
            return f"goto {chain}"
        case JumpTo(chain):
            return f"jump {chain}"
        case _:
            return str(data)


def key_texts(family: Family, key: Key, keys: Sequence[ElementKey]) -> list[str]:
    """Print keys of elements, column by column: that is four times as fast as one by one."""
    columns = [_column(family, part, [values[at] for values in keys]) for at, part in enumerate(key)]
    return list(map(" . ".join, zip(*columns, strict=True)))


def _column(family: Family, part: KeyPart, values: list[int | str | Interval]) -> Iterable[str]:
    if not isinstance(part, Field) or not part.name.endswith("addr"):
        return (_range(value, str) if isinstance(value, Interval) else str(value) for value in values)
    return map(_address_texts(family, values).__getitem__, values)


def _address_texts(family: Family, values: Iterable[int | str | Interval]) -> dict[int | str | Interval, str]:
    def text(number: int) -> str:
        return address_text(family, number)

    # A part that is an address is a number or an interval.
    return {value: _range(value, text) if isinstance(value, Interval) else text(value) for value in set(values)}  # type: ignore[arg-type]


def _range(value: Interval, text: Callable[[int], str]) -> str:
    return text(value.first) if value.first == value.last else f"{text(value.first)}-{text(value.last)}"


def _kind(named: NamedSet) -> str:
    return "map" if named.data else "set"


def _declaration(family: Family, named: NamedSet) -> list[str]:
    """Return what stands between the braces of a set, but for elements."""
    has_number = any(not isinstance(part, Field) for part in named.key)
    word = "typeof" if has_number else "type"
    form: Callable[[Family, KeyPart], str] = _typeof if has_number else _type
    types = " . ".join(form(family, part) for part in named.key)
    if named.data == "verdict":
        types += " : verdict"
    elif named.data == "endpoint":
        types += f" : {WORD[family]} daddr . th dport" if has_number else f" : {_ADDRESS_TYPE[family]} . inet_service"
    lines = [f"{word} {types}"]
    if named.size:
        lines.append(f"size {named.size}")
    flags = [flag for flag, on in (("interval", named.intervals), ("dynamic", named.dynamic), ("timeout", named.timeout)) if on]
    if flags:
        lines.append(f"flags {','.join(flags)}")
    if named.timeout:
        lines.append(f"timeout {named.timeout}s")
    if named.counter:
        lines.append("counter")
    if named.comment:
        lines.append(f'comment "{named.comment}"')
    return lines


def _type(family: Family, part: KeyPart) -> str:
    assert isinstance(part, Field)
    if part.name.endswith("addr"):
        return _ADDRESS_TYPE[family]
    return "inet_proto" if part.name == "l4proto" else "inet_service"


def _typeof(family: Family, part: KeyPart) -> str:
    match part:
        case Field():
            return part_text(family, Field(part.name.removeprefix("original-")))  # type: ignore[arg-type]  # of the same type
        case Random(modulus) | SourceHash(modulus):
            return f"numgen random mod {modulus}"
    assert_never(part)


ND_TYPES = ("nd-router-solicit", "nd-router-advert", "nd-neighbor-solicit", "nd-neighbor-advert", "nd-redirect")

# -- rules -----------------------------------------------------------------------------------------------------------


def rule_text(family: Family, rule: Rule) -> str:
    """Print a rule as a line of ``nft list chain``."""
    words = [_match(family, match) for match in rule.matches]
    words += [_statement(family, statement) for statement in rule.statements]
    if rule.comment:
        words.append(f'comment "{rule.comment}"')
    return " ".join(words)


def key_text(family: Family, key: Key) -> str:
    """Print what a rule looks up: ``ip daddr . meta l4proto . th dport``."""
    return " . ".join(part_text(family, part) for part in key)


def part_text(family: Family, part: KeyPart) -> str:
    """Print one value taken from the packet."""
    word = WORD[family]
    match part:
        case Field("saddr" | "daddr" as name):
            return f"{word} {name}"
        case Field("l4proto"):
            return "meta l4proto"
        case Field("dport"):
            return "th dport"
        case Field("original-dport"):
            return "ct original proto-dst"
        case Field(name):
            return f"ct original {word} {name.removeprefix('original-')}"
        case Random(modulus):
            return f"numgen random mod {modulus}"
        case SourceHash(modulus, seed):
            return f"jhash {word} saddr mod {modulus} seed 0x{seed:x}"
    assert_never(part)


def _hook(hook: Hook) -> str:
    return f"type {hook.type} hook {hook.hook} priority {hook.priority}; policy accept;"


def _not(negated: bool) -> str:
    return "!= " if negated else ""


def _one_or_more(values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else f"{{ {', '.join(values)} }}"


def _match(family: Family, match_: Match) -> str:
    match match_:
        case CtState(states):
            return f"ct state {','.join(states)}"
        case CtStatus(status):
            return f"ct status {status}"
        case InSet(key, name, negated):
            return f"{key_text(family, key)} {_not(negated)}@{name}"
        case AddressIs(side, prefixes, negated):
            values = [prefix.address_text if prefix.is_host else str(prefix) for prefix in prefixes]
            return f"{WORD[family]} {side} {_not(negated)}{_one_or_more(values)}"
        case InterfaceIs(name, negated):
            return f'iifname {_not(negated)}"{name}"'
        case FibLocal(side):
            return f"fib {side} type local"
        case ProtocolIs(protocols):
            return f"meta l4proto {_one_or_more(protocols)}"
        case MarkIs(mask, negated):
            return f"meta mark & 0x{mask:08x} {'==' if negated else '!='} 0x00000000"
        case Chance(modulus):
            return f"numgen random mod {modulus} 0"
        case OpensNoConnection():
            return "tcp flags & (fin | syn | rst | ack) != syn"
        case NeighbourDiscovery():
            return f"icmpv6 type {_one_or_more(ND_TYPES)}"
    assert_never(match_)


def _statement(family: Family, statement: Statement) -> str:
    word = WORD[family]
    match statement:
        case OrMark(mask):
            return f"meta mark set meta mark | 0x{mask:08x}"
        case XorMark(mask):
            return f"meta mark set meta mark ^ 0x{mask:08x}"
        case JumpChain(chain):
            return f"jump {chain}"
        case GotoChain(chain):
            return f"goto {chain}"
        case VerdictMap(key, name):
            return f"{key_text(family, key)} vmap @{name}"
        case DnatByMap(key, name):
            return f"dnat {word} to {key_text(family, key)} map @{name}"
        case DnatTo(address, port):
            text = address_text(family, address)
            return f"dnat {word} to {text if family == 4 else f'[{text}]'}:{port}"
        case Remember(key, name, data):
            value = f" : {key_text(family, data)}" if data else ""
            return f"update @{name} {{ {key_text(family, key)}{value} }}"
        case LogSome(per_second, burst, prefix, group):
            return f'limit rate {per_second}/second burst {burst} packets log prefix "{prefix}" group {group} snaplen {LOGGED_BYTES}'
        case MasqueradeFully(random_fully):
            return "masquerade fully-random" if random_fully else "masquerade"
        case Refuse():
            return "reject"
        case DropPacket():
            return "drop"
        case AcceptPacket():
            return "accept"
        case ReturnToCaller():
            return "return"
    assert_never(statement)
