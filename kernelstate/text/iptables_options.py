"""The meaning of the words behind one ``-m NAME`` or ``-j NAME``: typed when it is one of ours, else carried as words.

Decides when a match or target is exactly what a type of ``objects/netfilter.py`` says; one option more (``--hitcount``, a port
range behind DNAT, a negated port) and it stays ``OtherMatch`` or ``OtherTarget``. Splitting lines and the IP header are
``iptables_parse.py``'s.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Literal, cast

from kernelstate.objects.address import Family, Prefix
from kernelstate.objects.netfilter import (
    PROBABILITY_ONE,
    AddrType,
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
    Recent,
    Reject,
    SetMatch,
    SetXmark,
    Statistic,
    Target,
    Transport,
    Verdict,
)

Words = tuple[str, ...]

# fmt: off
EXTENSION_TARGETS = frozenset({
    "AUDIT", "CHECKSUM", "CLASSIFY", "CLUSTERIP", "CONNMARK", "CONNSECMARK", "CT", "DNPT", "DSCP", "ECN", "HL", "HMARK",
    "IDLETIMER", "LED", "LOG", "NETMAP", "NFLOG", "NFQUEUE", "NOTRACK", "QUEUE", "RATEEST", "REDIRECT", "SECMARK", "SET",
    "SNAT", "SNPT", "SYNPROXY", "TCPMSS", "TCPOPTSTRIP", "TEE", "TOS", "TPROXY", "TRACE", "TTL", "ULOG",
})
# fmt: on
"""Targets we only carry; any other bare name behind ``-j`` is a chain."""

DEFAULT_BURST = 5
"""Of -m limit, which iptables-save does not print."""
_VERDICTS: dict[str, Verdict] = {verdict.value: verdict for verdict in Verdict}
_DEFAULT_REJECT = {4: "icmp-port-unreachable", 6: "icmp6-port-unreachable"}
_FULL_MASK = {4: "255.255.255.255", 6: "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"}


def read_match(name: str, options: Words, family: Family) -> Match:
    """Read the words behind ``-m NAME``; a negation is the word ``!`` before its option."""
    try:
        known = _read_match(name, options, family)
    except (ValueError, KeyError):  # words that do not have the form we know
        known = None
    return known or OtherMatch((name, *options))


def _read_match(name: str, options: Words, family: Family) -> Match | None:
    match name:
        case "comment":
            return Comment(_pairs(options)["--comment"])
        case "tcp" | "udp" | "sctp":
            return _transport(name, options)
        case "conntrack":
            return _conntrack(options)
        case "mark":
            return _mark(options)
        case "addrtype":
            return _addrtype(options)
        case "statistic":
            return _statistic(options)
        case "recent":
            return _recent(options, family)
        case "nfacct":
            return _nfacct(options)
        case "limit":
            return _limit(options)
        case "set":
            return _set(options)
        case "physdev":
            return _physdev(options)
        case _:
            return None


def prefix_of(text: str) -> Prefix:
    """Read ``10.0.0.1``, ``10.0.0.1/32`` or ``fd00::/64``. Raises ValueError."""
    address, _, length = text.partition("/")
    octets = address.split(".")
    if len(octets) == 4 and ":" not in text and (not length or length.isdigit()):
        a, b, c, d = map(int, octets)
        bits = int(length) if length else 32
        if max(a, b, c, d) < 256 and 0 <= bits <= 32:
            shift = 32 - bits
            return Prefix(4, (a << 24 | b << 16 | c << 8 | d) >> shift << shift, bits)
    if "," in text or (length and not length.isdigit()):
        raise ValueError(text)
    return Prefix.parse(text)


def _ports(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    return int(first), int(last or first)


def _pairs(options: Words) -> dict[str, str]:
    """Read ``--name value`` pairs. Raises ValueError for anything else, negation included."""
    if len(options) % 2 or any(not name.startswith("--") for name in options[::2]):
        raise ValueError(options)
    return dict(zip(options[::2], options[1::2], strict=True))


def _positive(options: Words) -> Words:
    """Return the options without the words ``!`` before them."""
    return tuple(option for option in options if option != "!")


def _is_negated(options: Words, option: str) -> bool:
    return option in options[1:] and options[options.index(option) - 1] == "!"


def _transport(name: str, options: Words) -> Match | None:
    if name == "tcp" and options == ("!", "--tcp-flags", "FIN,SYN,RST,ACK", "SYN"):
        return OpensNoConnection()
    pairs = _pairs(options)
    dport, sport = pairs.pop("--dport", None), pairs.pop("--sport", None)
    if pairs:
        return None
    protocol = cast("Literal['tcp', 'udp', 'sctp']", name)
    return Transport(protocol, _ports(dport) if dport else None, _ports(sport) if sport else None)


def _negatable(options: Words, option: str) -> tuple[str, bool]:
    """Read ``[!] option value``. Raises ValueError for anything else."""
    negated = options[:1] == ("!",)
    name, value = options[1:] if negated else options
    if name != option:
        raise ValueError(name)
    return value, negated


def _conntrack(options: Words) -> Match:
    states, negated = _negatable(options, "--ctstate")
    return ConnState(tuple(sorted(states.split(","))), negated)


def _mark(options: Words) -> Match:
    text, negated = _negatable(options, "--mark")
    value, _, mask = text.partition("/")
    return Mark(int(value, 0), int(mask, 0) if mask else 0xFFFFFFFF, negated)


def _addrtype(options: Words) -> Match | None:
    pairs = _pairs(_positive(options))
    match = AddrType(
        pairs.pop("--src-type", ""),
        pairs.pop("--dst-type", ""),
        _is_negated(options, "--src-type"),
        _is_negated(options, "--dst-type"),
    )
    return None if pairs else match


def _statistic(options: Words) -> Match | None:
    pairs = _pairs(options)
    if pairs.keys() != {"--mode", "--probability"} or pairs["--mode"] != "random":
        return None
    return Statistic(round(float(pairs["--probability"]) * PROBABILITY_ONE))


def _recent(options: Words, family: Family) -> Match | None:
    flags = {option for option in options if option in {"--set", "--rcheck", "--reap", "--rsource"}}
    pairs = _pairs(tuple(option for option in options if option not in flags))
    flags.discard("--rsource")
    list_name = pairs.pop("--name")
    if pairs.pop("--mask", _FULL_MASK[family]) != _FULL_MASK[family]:
        return None
    if flags == {"--set"} and not pairs:
        return Recent(list_name, set=True)
    if flags == {"--rcheck", "--reap"} and pairs.keys() == {"--seconds"}:
        return Recent(list_name, set=False, seconds=int(pairs["--seconds"]))
    return None


def _set(options: Words) -> Match | None:
    """Read a set by name; options that read or change counters make it one we only carry."""
    words = _positive(options)
    if len(words) != 3 or words[0] != "--match-set":
        return None
    dimensions = words[2].split(",")
    if not {"src", "dst"}.issuperset(dimensions):
        return None
    return SetMatch(words[1], cast("tuple[Literal['src', 'dst'], ...]", tuple(dimensions)), options[0] == "!")


def _physdev(options: Words) -> Match | None:
    return FromBridgePort(options[0] == "!") if _positive(options) == ("--physdev-is-in",) else None


def _nfacct(options: Words) -> Match | None:
    pairs = _pairs(options)
    return NfAcct(pairs["--nfacct-name"]) if len(pairs) == 1 else None


def _limit(options: Words) -> Match | None:
    pairs = _pairs(options)
    number, _, unit = pairs.pop("--limit").partition("/")
    burst = int(pairs.pop("--limit-burst", str(DEFAULT_BURST)))
    return None if pairs or unit != "sec" else Limit(int(number), burst)


def read_target(words: Words, family: Family) -> Target:
    """Read the words behind ``-j``, the name first."""
    name, options = words[0], words[1:]
    target: Target | None = None
    try:
        if name in _VERDICTS and not options:
            target = _VERDICTS[name]
        elif name == "DNAT":
            target = _dnat(options, family)
        elif name == "MASQUERADE" and options in {(), ("--random-fully",)}:
            target = Masquerade(bool(options))
        elif name == "REJECT":
            kind = _pairs(options).get("--reject-with", "")
            target = Reject("" if kind == _DEFAULT_REJECT[family] else kind)
        elif name == "MARK":
            target = _set_xmark(options)
        elif name == "NFLOG":
            target = _nflog(options)
        elif not options and name not in EXTENSION_TARGETS:
            target = Jump(name)
    except ValueError:
        target = None
    return target or OtherTarget(words)


def _dnat(options: Words, family: Family) -> Dnat | None:
    pairs = _pairs(options)
    text = pairs.pop("--to-destination", "")
    host, port = text, ""
    if family == 4 and ":" in text:
        host, _, port = text.partition(":")
    elif text.startswith("["):
        host, _, port = text[1:].partition("]")
        port = port.lstrip(":")
    if pairs or "-" in text:  # a range of addresses or ports
        return None
    address = ip_address(host)
    return Dnat(family, int(address), int(port or 0)) if address.version == family else None


def _nflog(options: Words) -> Nflog | None:
    pairs = _pairs(options)
    if pairs.keys() != {"--nflog-prefix", "--nflog-group", "--nflog-size"}:
        return None
    return Nflog(pairs["--nflog-prefix"], int(pairs["--nflog-group"]), int(pairs["--nflog-size"]))


def _set_xmark(options: Words) -> SetXmark | None:
    """Read any of MARK's shorthands into mark = (mark & ~mask) ^ value."""
    ((option, text),) = _pairs(options).items()
    first, _, second = text.partition("/")
    value, mask = int(first, 0), int(second, 0) if second else 0xFFFFFFFF
    match option:
        case "--set-xmark":
            return SetXmark(value, mask)
        case "--set-mark":
            return SetXmark(value, mask | value)
        case "--or-mark":
            return SetXmark(value, value)
        case "--xor-mark":
            return SetXmark(value, 0)
        case "--and-mark":
            return SetXmark(0, ~value & 0xFFFFFFFF)
        case _:
            return None
