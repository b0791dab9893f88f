"""Rules as text, worded as kube-proxy words them, and read back in every wording."""

from __future__ import annotations

import pytest

from kernelstate.errors import ParseError
from kernelstate.objects.address import Family, Prefix
from kernelstate.objects.netfilter import (
    AddrType,
    Anchor,
    ChainKey,
    Comment,
    ConnState,
    Dnat,
    Jump,
    Mark,
    Masquerade,
    NfAcct,
    OtherMatch,
    OtherTarget,
    Recent,
    Reject,
    Rule,
    Ruleset,
    SetXmark,
    Statistic,
    Transport,
    Verdict,
)
from kernelstate.text.iptables_parse import RuleReader, parse_save, split_words
from kernelstate.text.iptables_save import print_rule, print_ruleset

P = Prefix.parse
TCP80 = Transport("tcp", (80, 80))
MARK_MASQ = Jump("KUBE-MARK-MASQ")

ROWS: list[tuple[str, Rule]] = [
    (
        "-A C -m comment --comment ns1/svc1:p80 -s 10.180.0.1 -j KUBE-MARK-MASQ",
        Rule(MARK_MASQ, (Comment("ns1/svc1:p80"),), source=P("10.180.0.1")),
    ),
    (
        (
            '-A C -m comment --comment "block incoming localnet connections" -d 127.0.0.0/8 ! -s 127.0.0.0/8'
            " -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP"
        ),
        Rule(
            Verdict.DROP,
            (
                Comment("block incoming localnet connections"),
                ConnState(("DNAT", "ESTABLISHED", "RELATED"), negated=True),
            ),
            source=P("127.0.0.0/8"),
            source_negated=True,
            destination=P("127.0.0.0/8"),
        ),
    ),
    (
        (
            '-A C -m comment --comment "ns1/svc1:p80 cluster IP" -m tcp -p tcp -d 10.0.0.1 --dport 80 ! -s 10.1.0.0/16'
            " -j KUBE-MARK-MASQ"
        ),
        Rule(
            MARK_MASQ,
            (Comment("ns1/svc1:p80 cluster IP"), TCP80),
            "tcp",
            P("10.1.0.0/16"),
            P("10.0.0.1"),
            source_negated=True,
        ),
    ),
    (
        '-A C -m comment --comment "x y" -m tcp -p tcp -d 10.0.0.1 --dport 80 ! -i cni0 -j KUBE-MARK-MASQ',
        Rule(
            MARK_MASQ,
            (Comment("x y"), TCP80),
            "tcp",
            None,
            P("10.0.0.1"),
            in_interface="cni0",
            in_interface_negated=True,
        ),
    ),
    (
        '-A C -m comment --comment "x y" -m addrtype --dst-type LOCAL -m udp -p udp --dport 3000:3010 -j REJECT',
        Rule(Reject(), (Comment("x y"), AddrType(dst="LOCAL"), Transport("udp", (3000, 3010))), "udp"),
    ),
    (
        '-A C -m comment --comment "x y" -m addrtype --dst-type LOCAL ! -d 127.0.0.0/8 -j KUBE-NODEPORTS',
        Rule(
            Jump("KUBE-NODEPORTS"),
            (Comment("x y"), AddrType(dst="LOCAL")),
            destination=P("127.0.0.0/8"),
            destination_negated=True,
        ),
    ),
    (
        '-A C -m comment --comment "a -> b" -m statistic --mode random --probability 0.3333333333 -j KUBE-SEP-X',
        Rule(Jump("KUBE-SEP-X"), (Comment("a -> b"), Statistic.one_of(3))),
    ),
    ("-A C -m statistic --mode random --probability 0.0000250000 -j S", Rule(Jump("S"), (Statistic.one_of(40000),))),
    ("-A C -m statistic --mode random --probability 0.61803398840 -j S", Rule(Jump("S"), (Statistic(1327217884),))),
    (
        "-A C -m recent --name KUBE-SEP-X --rcheck --seconds 10800 --reap -j KUBE-SEP-X",
        Rule(Jump("KUBE-SEP-X"), (Recent("KUBE-SEP-X", set=False, seconds=10800),)),
    ),
    (
        "-A C -m comment --comment a/b -m recent --name N --set -m tcp -p tcp -j DNAT --to-destination 10.1.0.1:80",
        Rule(Dnat(4, P("10.1.0.1").network, 80), (Comment("a/b"), Recent("N", set=True), Transport("tcp")), "tcp"),
    ),
    (
        "-A C -m comment --comment a/b -m tcp -p tcp -d 127.0.0.0/8 --dport 80 -m nfacct --nfacct-name n -j E",
        Rule(Jump("E"), (Comment("a/b"), TCP80, NfAcct("n")), "tcp", None, P("127.0.0.0/8")),
    ),
    (
        "-A C -m mark ! --mark 0x00004000/0x00004000 -j RETURN",
        Rule(Verdict.RETURN, (Mark(0x4000, 0x4000, negated=True),)),
    ),
    ("-A C -m mark --mark 0x00000001 -j ACCEPT", Rule(Verdict.ACCEPT, (Mark(1),))),
    ("-A C -j MARK --or-mark 0x00004000", Rule(SetXmark(0x4000, 0x4000))),
    ("-A C -j MARK --xor-mark 0x00004000", Rule(SetXmark(0x4000, 0))),
    ("-A C -j MARK --set-xmark 0x00004000/0xffffffff", Rule(SetXmark(0x4000, 0xFFFFFFFF))),
    (
        '-A C -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully',
        Rule(Masquerade(random_fully=True), (Comment("kubernetes service traffic requiring SNAT"),)),
    ),
    ('-A C -m comment --comment "only counts"', Rule(None, (Comment("only counts"),))),
    (r'-A C -m comment --comment "a\"b\\c" -j ACCEPT', Rule(Verdict.ACCEPT, (Comment('a"b\\c'),))),
    ("-A C ! -i eth+ -o lo -g OTHER", Rule(Jump("OTHER", goto=True), (), "", None, None, False, False, "eth+", "lo", True)),
    ("-A C -p icmp -m icmp --icmp-type 8 -j ACCEPT", Rule(Verdict.ACCEPT, (OtherMatch(("icmp", "--icmp-type", "8")),), "icmp")),
    (
        '-A C -m limit --limit 3/min -j LOG --log-prefix "x y"',
        Rule(OtherTarget(("LOG", "--log-prefix", "x y")), (OtherMatch(("limit", "--limit", "3/min")),)),
    ),
    (
        "-A C -j DNAT --to-destination 10.0.0.1-10.0.0.9",
        Rule(OtherTarget(("DNAT", "--to-destination", "10.0.0.1-10.0.0.9"))),
    ),
    (
        "-A C ! -p tcp -f -s 10.0.0.0/255.0.255.0 -j DROP",
        Rule(
            Verdict.DROP,
            (OtherMatch(("!", "-p", "tcp")), OtherMatch(("-f",)), OtherMatch(("-s", "10.0.0.0/255.0.255.0"))),
        ),
    ),
]


@pytest.mark.parametrize(("text", "rule"), ROWS, ids=lambda value: value[5:60] if isinstance(value, str) else "")
def test_print_and_parse_a_rule(text: str, rule: Rule) -> None:
    """Each rule prints in kube-proxy's words and those words read back as the same rule."""
    assert print_rule("C", rule) == text
    assert RuleReader(4).rule(split_words(text), 2) == rule


@pytest.mark.parametrize(
    ("saved", "ours", "family"),
    [
        ("-s 10.0.0.1/32 -j RETURN", "-s 10.0.0.1 -j RETURN", 4),
        ("-d fd00::1/128 -j RETURN", "-d fd00:0::1 -j RETURN", 6),
        ("-s 0.0.0.0/0 -j RETURN", "-j RETURN", 4),
        ("-j REJECT --reject-with icmp-port-unreachable", "-j REJECT", 4),
        ("-j REJECT --reject-with icmp6-port-unreachable", "-j REJECT", 6),
        ("-j MARK --set-xmark 0x4000/0x4000", "-j MARK --or-mark 0x00004000", 4),
        ("-j MARK --set-xmark 0x4000/0x0", "-j MARK --xor-mark 0x4000", 4),
        ("-j MARK --set-mark 0x1/0x2", "-j MARK --set-xmark 0x1/0x3", 4),
        ("-j MARK --and-mark 0xff", "-j MARK --set-xmark 0x0/0xffffff00", 4),
        ("-m mark --mark 0x4000", "-m mark --mark 16384/0xffffffff", 4),
        ("-m statistic --mode random --probability 0.33333333349", "-m statistic --mode random --probability 0.3333333333", 4),
        ("-m recent --set --name A --mask 255.255.255.255 --rsource", "-m recent --name A --set", 4),
        (
            "-m recent --rcheck --seconds 60 --reap --name A --mask ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff --rsource",
            "-m recent --name A --rcheck --seconds 60 --reap",
            6,
        ),
        (
            '-d 10.0.0.1/32 -p tcp -m comment --comment "a b" -m tcp --dport 80 -j X',
            '-m comment --comment "a b" -m tcp -p tcp -d 10.0.0.1 --dport 80 -j X',
            4,
        ),
        ("-p tcp --dport 80 -j X", "-p tcp -m tcp --dport 80 -j X", 4),
        ("-p sctp -m sctp -j DNAT --to-destination [fd00::2]:80", "-m sctp -p sctp -j DNAT --to-destination [fd00:0::2]:80", 6),
        ("-j DNAT --to-destination fd00::2", "-j DNAT --to-destination [fd00::2]", 6),
        ("--source 10.0.0.1 --jump ACCEPT -c 1 60", "-s 10.0.0.1 -j ACCEPT", 4),
        ("-m conntrack --ctstate ESTABLISHED,RELATED", "-m conntrack --ctstate RELATED,ESTABLISHED", 4),
        (r'-m comment --comment "it\'s"', "-m comment --comment it's", 4),
    ],
)
def test_two_wordings_of_one_rule_are_equal(saved: str, ours: str, family: Family) -> None:
    """What iptables-save prints and what we write are the same rule."""
    reader = RuleReader(family)
    assert reader.rule(split_words(saved)) == reader.rule(split_words(ours))


@pytest.mark.parametrize(
    "words",
    [
        "-m recent --rcheck --seconds 60 --hitcount 4 --name A --mask 255.255.255.255 --rsource",
        "-m recent --update --seconds 60 --name A --rsource",
        "-m statistic --mode nth --every 3 --packet 0",
        "-p tcp -m tcp ! --dport 80",
        "-p tcp -m tcp --tcp-flags SYN,ACK SYN",
        "-m mark --mark nonsense",
    ],
)
def test_one_option_more_is_another_match(words: str) -> None:
    """A match of ours with an option we do not model is carried as words, not read as ours."""
    rule = RuleReader(4).rule(split_words(words))
    assert isinstance(rule.matches[-1], OtherMatch)
    assert RuleReader(4).rule(split_words(print_rule("C", rule)), 2) == rule


RULESET = Ruleset(
    {
        ChainKey(4, "nat", "KUBE-MARK-MASQ"): (Rule(SetXmark(0x4000, 0x4000)),),
        ChainKey(4, "nat", "KUBE-SERVICES"): (),
        ChainKey(4, "filter", "KUBE-FORWARD"): (Rule(Verdict.DROP, (ConnState(("INVALID",)),)),),
        ChainKey(6, "nat", "KUBE-SERVICES"): (),
    },
    (
        Anchor(ChainKey(4, "filter", "FORWARD"), Rule(Jump("KUBE-FORWARD"))),
        Anchor(ChainKey(4, "nat", "PREROUTING"), Rule(Jump("KUBE-SERVICES"))),
    ),
)


def test_print_ruleset() -> None:
    """One family prints table by table, filter before nat, chains that anchors jump to first."""
    assert print_ruleset(RULESET, 4) == (
        "*filter\n:KUBE-FORWARD - [0:0]\n-A FORWARD -j KUBE-FORWARD\n-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\nCOMMIT\n"
        "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n-A PREROUTING -j KUBE-SERVICES\n"
        "-A KUBE-MARK-MASQ -j MARK --or-mark 0x00004000\nCOMMIT\n"
    )
    assert print_ruleset(Ruleset({}), 4) == ""


def test_parse_save_with_counters_policies_and_strange_tables() -> None:
    """Counters, comments, policies and the security table pass; builtin chains' rules come as anchors in order."""
    text = (
        "# Generated by iptables-save\n*security\n:INPUT ACCEPT [0:0]\n-A INPUT -j SECMARK --selctx x\nCOMMIT\n"
        "*filter\n:INPUT DROP [0:0]\n:MINE - [3:4]\n[1:60] -A INPUT -j MINE\n[0:0] -A MINE -j ACCEPT\n-A INPUT -j DROP\nCOMMIT\n"
    )
    door = ChainKey(4, "filter", "INPUT")
    assert parse_save(text, 4) == Ruleset(
        {ChainKey(4, "filter", "MINE"): (Rule(Verdict.ACCEPT),)},
        (Anchor(door, Rule(Jump("MINE"))), Anchor(door, Rule(Verdict.DROP))),
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("*nat\n-A NOWHERE -j ACCEPT\n", "chain NOWHERE is not declared in table nat"),
        ("*nat\n:C - [0:0]\n-A C -m\n", "an option lacks its value"),
        ('*nat\n:C - [0:0]\n-A C -m comment --comment "a\\"b\n', "a quote is not closed"),
        ("hello\n", "not a line of iptables-save"),
        ("*nat\n-X C\n", "expected -A CHAIN"),
    ],
)
def test_text_that_is_no_save(text: str, reason: str) -> None:
    """Text that is not a save is refused with the line and the reason."""
    with pytest.raises(ParseError, match=reason):
        parse_save(text, 4)


@pytest.mark.parametrize("text", ["!", "-j", "-m", "--dport", "-s"])
def test_a_comment_may_look_like_an_option(text):
    """What follows --comment or --log-prefix is text, whatever it looks like."""
    key = ChainKey(4, "filter", "KUBE-A")
    rule = Rule(Jump("KUBE-A"), (Comment(text), Comment("next")))
    lines = print_ruleset(Ruleset({key: (rule,)}), 4)
    assert parse_save(lines, 4).chains[key] == (rule,)
    saved = lines.replace("-j KUBE-A", f'-j LOG --log-prefix "{text}" --log-level 7')
    (read,) = parse_save(saved, 4).chains[key]
    assert read.target == OtherTarget(("LOG", "--log-prefix", text, "--log-level", "7"))
