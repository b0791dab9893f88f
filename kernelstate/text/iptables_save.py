"""Rules as text: what ``iptables-restore`` reads, worded as kube-proxy words it.

    :KUBE-SEP-SXIVWICOYRO3J4NJ - [0:0]
    -A KUBE-SEP-SXIVWICOYRO3J4NJ -m comment --comment ns1/svc1:p80 -s 10.180.0.1 -j KUBE-MARK-MASQ
    |-------- print_rule -------||------------------- print_spec ----------------------------------|

Decides the words and their order, which people grep for; the meaning is in ``objects/netfilter.py``, reading text back in
``iptables_parse.py``, and which lines a change needs in ``diff.py``. A match prints where it stands in ``matches``, the fields
of the IP header with the transport match (``-m tcp -p tcp -d IP --dport 80 ! -s NET``) or, without one, behind the leading
comment and addrtype matches: that is where kube-proxy writes them, and to the kernel it is all one.

A first sync of a large cluster prints a hundred thousand rules, which is why some of this is longer than it could be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, assert_never

from kernelstate.objects.address import BITS, Family, Prefix, address_text
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
    NfAcct,
    Nflog,
    OpensNoConnection,
    OtherMatch,
    OtherTarget,
    Recent,
    Reject,
    Rule,
    Ruleset,
    SetMatch,
    SetXmark,
    Statistic,
    Table,
    Target,
    Transport,
    Verdict,
)
from kernelstate.text.iptables_parse import parse_save

__all__ = ["TABLES", "parse_save", "print_rule", "print_ruleset", "print_spec", "quote"]

TABLES: tuple[Table, ...] = ("raw", "mangle", "filter", "nat")
"""The order of tables in one text: filter before nat, so that a refusal is in place before the translation it guards."""

STATE_ORDER = ("INVALID", "NEW", "RELATED", "ESTABLISHED", "UNTRACKED", "SNAT", "DNAT")
"""The order in which iptables-save and kube-proxy both list connection states."""


def print_rule(chain: str, rule: Rule) -> str:
    """Print one rule as an ``-A CHAIN ...`` line without its end of line."""
    return _print_after(f"-A {chain}", rule)


def print_ruleset(ruleset: Ruleset, family: Family) -> str:
    """Print what one family shall hold as one whole ``iptables-restore --noflush`` input; empty tables are left out.

    In each table the chains that anchors jump to come first, in the order of the anchors, then the rest in the order of the
    mapping; anchors stand before the chains' rules, in the order the packet shall meet them.
    """
    lines: list[str] = []
    for table in TABLES:
        _print_table(lines, ruleset, family, table)
    lines.append("")
    return "\n".join(lines)


def _print_table(lines: list[str], ruleset: Ruleset, family: Family, table: Table) -> None:
    here = [key for key in ruleset.chains if key.table == table and key.family == family]
    anchors = [a for a in ruleset.anchors if a.chain.table == table and a.chain.family == family]
    if not here and not anchors:
        return
    present = set(here)
    doors = (ChainKey(family, table, a.rule.target.chain) for a in anchors if isinstance(a.rule.target, Jump))
    keys = list(dict.fromkeys([*(key for key in doors if key in present), *here]))
    lines.append(f"*{table}")
    lines += [f":{key.name} - [0:0]" for key in keys]
    lines += [print_rule(anchor.chain.name, anchor.rule) for anchor in anchors]
    for key in keys:
        lines += chain_lines(key.name, ruleset.chains[key])
    lines.append("COMMIT")


def chain_lines(name: str, rules: Iterable[Rule]) -> list[str]:
    """Print the rules of one chain as ``-A`` lines."""
    head = f"-A {name}"
    return [_print_after(head, rule) for rule in rules]


def print_spec(rule: Rule) -> str:
    """Print what follows ``-A CHAIN``, with its leading space; the same words identify the rule behind ``-D CHAIN``."""
    return _print_after("", rule)


def _print_after(text: str, rule: Rule) -> str:
    """Print a rule behind ``text``."""
    pending = True  # the IP header's fields are still to be printed
    for match in rule.matches:
        kind = type(match)
        if kind is Transport:
            text += _transport(rule, match)  # type: ignore[arg-type]  # compared by identity for speed
            pending = False
        elif kind is Comment:
            text += f" -m comment --comment {quote(match.text)}"  # type: ignore[union-attr]
        else:
            if pending and kind is not AddrType and not (rule.protocol and _has_transport(rule)):
                text += _header(rule)
                pending = False
            text += _MATCHES[kind](match)
    if pending:
        text += _header(rule)
    target = rule.target
    if type(target) is Jump and not target.goto:
        return f"{text} -j {target.chain}"
    if type(target) is Dnat and target.family == 4 and target.port:  # with jumps, nearly all there are
        return f"{text} -j DNAT --to-destination {address_text(4, target.address)}:{target.port}"
    return text + _target(target) if target is not None else text


def _has_transport(rule: Rule) -> bool:
    """Whether the header will be printed with a transport match; only asked where the rule names a protocol."""
    return any(type(match) is Transport for match in rule.matches)


def _header(rule: Rule) -> str:
    destination, source = rule.destination, rule.source
    text = f" -p {rule.protocol}" if rule.protocol else ""
    if destination is not None:
        text += f"{' !' if rule.destination_negated else ''} -d {prefix_text(destination)}"
    if source is not None:
        text += f"{' !' if rule.source_negated else ''} -s {prefix_text(source)}"
    if rule.in_interface or rule.out_interface:
        text += _interfaces(rule)
    return text


def _transport(rule: Rule, match: Transport) -> str:
    protocol = match.protocol
    text = f" -m {protocol} -p {protocol}"
    destination, source, dport = rule.destination, rule.source, match.dport
    if destination is not None:
        text += f"{' !' if rule.destination_negated else ''} -d {prefix_text(destination)}"
    if match.sport is not None:
        text += f" --sport {_ports(match.sport)}"
    if dport is not None:
        text += f" --dport {dport[0]}" if dport[0] == dport[1] else f" --dport {_ports(dport)}"
    if source is not None:
        text += f"{' !' if rule.source_negated else ''} -s {prefix_text(source)}"
    if rule.in_interface or rule.out_interface:
        text += _interfaces(rule)
    return text


def _interfaces(rule: Rule) -> str:
    incoming = f"{' !' if rule.in_interface_negated else ''} -i {rule.in_interface}" if rule.in_interface else ""
    outgoing = f"{' !' if rule.out_interface_negated else ''} -o {rule.out_interface}" if rule.out_interface else ""
    return incoming + outgoing


def prefix_text(prefix: Prefix) -> str:
    """Print a prefix; one address goes without its length."""
    if prefix.length == BITS[prefix.family]:
        return address_text(prefix.family, prefix.network)
    return _network_text(prefix)


_network_text = lru_cache(256)(str)
"""The same few networks are in a rule of every Service."""


def _ports(ports: tuple[int, int]) -> str:
    first, last = ports
    return str(first) if first == last else f"{first}:{last}"


def quote(word: str) -> str:
    """Quote a word as iptables-restore reads it: in double quotes when it is empty or holds a space, quote or backslash."""
    if word and word.isprintable() and '"' not in word and "\\" not in word:
        return f'"{word}"' if " " in word else word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _words(words: Iterable[str]) -> str:
    return "".join(f" {quote(word)}" for word in words)


@lru_cache(maxsize=4096)
def _statistic(match: Statistic) -> str:
    """Print ten decimals of 1/k when that is what the kernel's fraction came from, else enough decimals to restore it."""
    probability = match.probability
    k = round(PROBABILITY_ONE / probability) if probability else 0
    text = f"{1 / k:.10f}" if k and Statistic.one_of(k) == match else f"{probability / PROBABILITY_ONE:.11f}"
    return f" -m statistic --mode random --probability {text}"


def _conn_state(match: ConnState) -> str:
    states = ",".join(sorted(match.states, key=STATE_ORDER.index))
    return f" -m conntrack{' !' if match.negated else ''} --ctstate {states}"


def _mark(match: Mark) -> str:
    mask = "" if match.mask == 0xFFFFFFFF else f"/0x{match.mask:08x}"
    return f" -m mark{' !' if match.negated else ''} --mark 0x{match.value:08x}{mask}"


def _addr_type(match: AddrType) -> str:
    src = f"{' !' if match.src_negated else ''} --src-type {match.src}" if match.src else ""
    dst = f"{' !' if match.dst_negated else ''} --dst-type {match.dst}" if match.dst else ""
    return f" -m addrtype{src}{dst}"


def _recent(match: Recent) -> str:
    what = "--set" if match.set else f"--rcheck --seconds {match.seconds} --reap"
    return f" -m recent --name {match.name} {what}"


def _set_match(match: SetMatch) -> str:
    return f" -m set{' !' if match.negated else ''} --match-set {match.name} {','.join(match.dimensions)}"


def _other_match(match: OtherMatch) -> str:
    """Print its words; those that start with an option are words of the IP header rather than a match's."""
    return ("" if match.words[0][0] in "-!" else " -m") + _words(match.words)


_MATCHES: dict[type, Callable[[Any], str]] = {
    Statistic: _statistic,
    ConnState: _conn_state,
    Mark: _mark,
    AddrType: _addr_type,
    Recent: _recent,
    Limit: lambda match: f" -m limit --limit {match.per_second}/sec --limit-burst {match.burst}",
    NfAcct: lambda match: f" -m nfacct --nfacct-name {match.name}",
    SetMatch: _set_match,
    FromBridgePort: lambda match: f" -m physdev{' !' if match.negated else ''} --physdev-is-in",
    OpensNoConnection: lambda match: " -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN",  # noqa: ARG005
    OtherMatch: _other_match,
}


def _target(target: Target) -> str:
    match target:
        case Jump(chain, goto):
            return f" -{'g' if goto else 'j'} {chain}"
        case Dnat(family, address, port):
            return f" -j DNAT --to-destination {_endpoint(family, address, port)}"
        case Verdict():
            return f" -j {target.value}"
        case Reject(reject_with):
            return f" -j REJECT --reject-with {reject_with}" if reject_with else " -j REJECT"
        case Masquerade(random_fully):
            return " -j MASQUERADE --random-fully" if random_fully else " -j MASQUERADE"
        case SetXmark(value, mask):
            return f" -j MARK {_xmark(value, mask)}"
        case Nflog(prefix, group, size):
            return f" -j NFLOG --nflog-prefix {prefix} --nflog-group {group} --nflog-size {size}"
        case OtherTarget(words):
            return " -j" + _words(words)
        case _:
            assert_never(target)


def _endpoint(family: Family, address: int, port: int) -> str:
    text = address_text(family, address)
    if not port:
        return text
    return f"{text}:{port}" if family == 4 else f"[{text}]:{port}"


def _xmark(value: int, mask: int) -> str:
    """Print the shorthand kube-proxy uses where one says the same."""
    if value == mask:
        return f"--or-mark 0x{value:08x}"
    return f"--xor-mark 0x{value:08x}" if mask == 0 else f"--set-xmark 0x{value:08x}/0x{mask:08x}"
