"""Text to rules: reads what ``iptables-save`` prints, in either variant, and what kube-proxy feeds ``iptables-restore``.

    [1:60] -A KUBE-SVC-X ! -s 10.1.0.0/16 -d 10.0.0.1/32 -p tcp -m comment --comment "x cluster IP" -m tcp --dport 80 -j Y
    |cnt-| |- command -| |------------ IP header ------------| |------ match ------------------| |- match ----| target

Decides which words mean the same to the kernel, so that equal rules compare equal: a host's ``/32`` goes, ``--or-mark M`` is
``--set-xmark M/M``, the family's default ``--reject-with`` is empty, a full mask is no mask, counters are dropped. What is not
understood is carried as ``OtherMatch`` or ``OtherTarget`` in its own words and never an error: rules of others pass through
here. Order among matches is the kernel's and is kept; order among IP header fields has no meaning and is lost.

Source of the words: iptables-extensions(8) and the ``save`` callbacks of iptables 1.8's extensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from kernelstate.errors import ParseError
from kernelstate.objects.address import Family, Prefix
from kernelstate.objects.netfilter import (
    Anchor,
    ChainKey,
    Comment,
    Jump,
    Match,
    OtherMatch,
    Protocol,
    Rule,
    Ruleset,
    Table,
    Target,
)
from kernelstate.text.iptables_options import Words, prefix_of, read_match, read_target

BUILTIN: dict[str, tuple[str, ...]] = {
    "raw": ("PREROUTING", "OUTPUT"),
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
}
"""The chains the kernel itself has in each table; no other chain has a policy."""

_TAKES_ANY_TEXT = frozenset({"--comment", "--log-prefix", "--nflog-prefix", "--string", "--hex-string"})
"""Options whose value may look like an option, or like a negation."""

_ALIASES = {
    "--source": "-s",
    "--src": "-s",
    "--destination": "-d",
    "--dst": "-d",
    "--protocol": "-p",
    "--proto": "-p",
    "--in-interface": "-i",
    "--out-interface": "-o",
    "--jump": "-j",
    "--goto": "-g",
    "--match": "-m",
    "--fragment": "-f",
    "--set-counters": "-c",
}
_PROTOCOLS = frozenset({"tcp", "udp", "sctp", "icmp", "ipv6-icmp"})


def parse_save(text: str, family: Family, known: Mapping[ChainKey, Sequence[Rule]] | None = None) -> Ruleset:
    """Read a whole save or restore text. Raises ParseError for lines that are no such text.

    A rule that equals the one at its place in ``known`` is handed out as that very object: looking at a large ruleset that is
    as remembered costs no second copy of it.

    Chains with a name of their own come in ``chains``, in the order they are declared; rules of builtin chains come as
    ``anchors`` in the packet's order. Tables other than raw, mangle, nat and filter are passed over.
    """
    reader = RuleReader(family)
    rules: dict[ChainKey, list[Rule]] = {}
    anchors: list[Anchor] = []
    table = ""
    known = known or {}
    for line in _lines(text):
        first = line[:1]
        if first in {"-", "["}:
            words = split_words(line)
            if first == "[":
                del words[0]
            if len(words) < 2 or words[0] != "-A":
                raise ParseError(line, "expected -A CHAIN")
            if table in BUILTIN:
                key = ChainKey(family, cast("Table", table), words[1])
                rule = reader.rule(words, 2)
                chain = rules.get(key)
                if chain is not None:
                    alike, place = known.get(key, ()), len(chain)
                    chain.append(alike[place] if place < len(alike) and alike[place] == rule else rule)
                elif key.name in BUILTIN[table]:
                    anchors.append(Anchor(key, rule))
                else:
                    raise ParseError(line, f"chain {key.name} is not declared in table {table}")
        elif first == ":":
            name = line[1:].split(" ", 1)[0]
            if table in BUILTIN and name not in BUILTIN[table]:
                rules[ChainKey(family, cast("Table", table), name)] = []
        elif first == "*":
            table = line[1:].strip()
        elif line and first != "#" and line != "COMMIT":
            raise ParseError(line, "not a line of iptables-save")
    return Ruleset({key: tuple(chain) for key, chain in rules.items()}, tuple(anchors))


def _lines(text: str) -> Iterator[str]:
    """Yield the lines of a text one by one: a list of a hundred thousand would double what the text takes."""
    start = 0
    while (end := text.find("\n", start)) >= 0:
        yield text[start:end]
        start = end + 1
    yield text[start:]


def split_words(line: str) -> list[str]:
    """Split a line into words as iptables-restore does: double quotes hold spaces, a backslash inside them escapes."""
    if '"' not in line:
        return line.split()
    if "\\" not in line:
        words: list[str] = []
        for index, part in enumerate(line.split('"')):
            if index % 2:
                words.append(part)
            else:
                words.extend(part.split())
        return words
    return _split_escaped(line)


def _split_escaped(line: str) -> list[str]:
    words: list[str] = []
    word: list[str] | None = None
    quoted = escaped = False
    for char in line:
        if quoted and not escaped and char == "\\":
            escaped = True
        elif char == '"' and not escaped:
            quoted = not quoted
            word = word if word is not None else []
        elif char in " \t\n" and not quoted:
            if word is not None:
                words.append("".join(word))
            word = None
        else:
            word = word if word is not None else []
            word.append(char)
            escaped = False
    if quoted:
        raise ParseError(line, "a quote is not closed")
    if word is not None:
        words.append("".join(word))
    return words


class RuleReader:
    """Reads the rules of one text; equal addresses, matches and targets become one shared value, which saves memory."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._prefixes: dict[str, Prefix] = {}
        self._matches: dict[tuple[str, Words], Match] = {}
        self._targets: dict[Words, Target] = {}

    def rule(self, words: list[str], start: int = 0) -> Rule:
        """Read a rule from its words behind ``-A CHAIN``; ``start`` is the index of the first. Raises ParseError."""
        try:
            return self._rule(words, start)
        except IndexError as error:
            raise ParseError(" ".join(words), "an option lacks its value") from error

    def _rule(self, words: list[str], start: int) -> Rule:  # noqa: PLR0915  one loop over the words, kept in one place for speed
        source = destination = None
        protocol = incoming = outgoing = ""
        not_source = not_destination = not_incoming = not_outgoing = False
        odd: list[Match] = []
        matches: list[tuple[str, list[str]]] = []
        target: list[str] = []
        goto = negated = False
        index, end = start, len(words)
        while index < end:
            word = words[index]
            index += 2
            if word == "-m":
                matches.append((words[index - 1], []))
            elif word == "-j":
                target.append(words[index - 1])
            elif word == "-s":
                source, not_source = self._prefix(words[index - 1], odd, "-s", negated), negated
            elif word == "-d":
                destination, not_destination = self._prefix(words[index - 1], odd, "-d", negated), negated
            elif word == "-p":
                protocol = self._protocol(words[index - 1], odd, negated)
            elif word == "-i":
                incoming, not_incoming = words[index - 1], negated
            elif word == "-o":
                outgoing, not_outgoing = words[index - 1], negated
            elif word == "-g":
                target, goto = [words[index - 1]], True
            elif word == "-c":
                index += 1
            elif word == "-f":
                odd.append(OtherMatch(("!", "-f") if negated else ("-f",)))
                index -= 1
            elif word == "!":
                negated = True
                index -= 1
                continue
            elif word in _ALIASES:
                words[index - 2] = _ALIASES[word]
                index -= 2
                continue
            else:
                index -= 1
                if target:
                    options = target
                else:
                    if not matches:  # "-p tcp --dport 80" means "-p tcp -m tcp --dport 80"
                        matches.append((protocol, []))
                    options = matches[-1][1]
                if negated:
                    options.append("!")
                options.append(word)
                if word in _TAKES_ANY_TEXT:
                    options.append(words[index])
                    index += 1
            negated = False
        return Rule(
            target=self._target(tuple(target), goto) if target else None,
            matches=(*odd, *(self._match(name, options) for name, options in matches)),
            protocol=cast("Protocol", protocol),
            source=source,
            destination=destination,
            source_negated=not_source and source is not None,
            destination_negated=not_destination and destination is not None,
            in_interface=incoming,
            out_interface=outgoing,
            in_interface_negated=not_incoming,
            out_interface_negated=not_outgoing,
        )

    def _prefix(self, text: str, odd: list[Match], option: str, negated: bool) -> Prefix | None:
        """Read an address; a list, an odd mask, or the negation of everything is carried as words."""
        prefix = self._prefixes.get(text)
        if prefix is None:
            try:
                prefix = prefix_of(text)
            except ValueError:
                odd.append(OtherMatch(("!", option, text) if negated else (option, text)))
                return None
            self._prefixes[text] = prefix
        if prefix.length:
            return prefix
        if negated:
            odd.append(OtherMatch(("!", option, text)))
        return None  # "-s 0.0.0.0/0" is what the kernel holds for no -s at all

    def _protocol(self, text: str, odd: list[Match], negated: bool) -> str:
        text = {"all": "", "0": "", "icmpv6": "ipv6-icmp"}.get(text, text)
        if negated or (text and text not in _PROTOCOLS):
            odd.append(OtherMatch(("!", "-p", text) if negated else ("-p", text)))
            return ""
        return text

    def _match(self, name: str, options: list[str]) -> Match:
        if name == "comment" and len(options) == 2:
            return Comment(options[1])
        key = (name, tuple(options))
        match = self._matches.get(key)
        if match is None:
            match = self._matches[key] = read_match(name, key[1], self.family)
        return match

    def _target(self, words: Words, goto: bool) -> Target:
        if goto:
            return Jump(words[0], goto=True)
        target = self._targets.get(words)
        if target is None:
            target = self._targets[words] = read_target(words, self.family)
        return target
