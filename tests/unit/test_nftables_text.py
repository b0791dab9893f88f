"""The words of nftables: each form printed as nft lists it, and plans as transactions in an order that can be taken."""

import nft_tables
import pytest

from kernelstate.diff_nftables import LARGE, Fill, Load, diff_tables, remember
from kernelstate.linux.nft_library import refusal
from kernelstate.objects.address import Prefix
from kernelstate.objects.nftables import (
    AddressIs,
    Chain,
    Chance,
    CtState,
    CtStatus,
    DnatByMap,
    DnatTo,
    DropPacket,
    FibLocal,
    Field,
    Goto,
    GotoChain,
    Hook,
    InSet,
    InterfaceIs,
    Interval,
    JumpChain,
    MarkIs,
    MasqueradeFully,
    NamedSet,
    OrMark,
    ProtocolIs,
    Random,
    Refuse,
    Remember,
    Rule,
    SourceHash,
    Table,
    TableChange,
    TableKey,
    VerdictMap,
    XorMark,
)
from kernelstate.text import nft

KEY = TableKey(4, "nodeplane")
SADDR, DADDR, PROTO, DPORT, FRONTEND = (
    nft_tables.SADDR,
    nft_tables.DADDR,
    nft_tables.PROTO,
    nft_tables.DPORT,
    nft_tables.FRONTEND,
)
ORIGINAL = (Field("original-saddr"), Field("original-daddr"), Field("original-dport"))

MATCHES = [
    (CtState(("established", "related")), "ct state established,related"),
    (CtStatus("dnat"), "ct status dnat"),
    (InSet(FRONTEND, "a"), "ip daddr . meta l4proto . th dport @a"),
    (InSet((SADDR,), "a", negated=True), "ip saddr != @a"),
    (AddressIs("saddr", (Prefix.parse("10.0.0.0/8"),)), "ip saddr 10.0.0.0/8"),
    (
        AddressIs("daddr", (Prefix.parse("10.0.0.1"), Prefix.parse("10.1.0.0/16")), negated=True),
        "ip daddr != { 10.0.0.1, 10.1.0.0/16 }",
    ),
    (InterfaceIs("veth*"), 'iifname "veth*"'),
    (InterfaceIs("lo", negated=True), 'iifname != "lo"'),
    (FibLocal("daddr"), "fib daddr type local"),
    (ProtocolIs(("tcp",)), "meta l4proto tcp"),
    (ProtocolIs(("sctp", "tcp")), "meta l4proto { sctp, tcp }"),
    (MarkIs(0x4000), "meta mark & 0x00004000 != 0x00000000"),
    (MarkIs(1, negated=True), "meta mark & 0x00000001 == 0x00000000"),
    (Chance(3), "numgen random mod 3 0"),
]
STATEMENTS = [
    (OrMark(0x4000), "meta mark set meta mark | 0x00004000"),
    (XorMark(0x4000), "meta mark set meta mark ^ 0x00004000"),
    (JumpChain("c"), "jump c"),
    (GotoChain("c"), "goto c"),
    (VerdictMap((PROTO, DPORT), "m"), "meta l4proto . th dport vmap @m"),
    (DnatByMap((DADDR, Random(3)), "m"), "dnat ip to ip daddr . numgen random mod 3 map @m"),
    (DnatByMap((SourceHash(251, 18),), "m"), "dnat ip to jhash ip saddr mod 251 seed 0x12 map @m"),
    (DnatTo(0x0A000001, 80), "dnat ip to 10.0.0.1:80"),
    (Remember((SADDR,), "s"), "update @s { ip saddr }"),
    (
        Remember(ORIGINAL, "s", (DADDR, DPORT)),
        "update @s { ct original ip saddr . ct original ip daddr . ct original proto-dst : ip daddr . th dport }",
    ),
    (MasqueradeFully(), "masquerade fully-random"),
    (MasqueradeFully(random_fully=False), "masquerade"),
    (Refuse(), "reject"),
    (DropPacket(), "drop"),
]


@pytest.mark.parametrize(("match", "text"), MATCHES)
def test_matches(match, text):
    """Each row: a match and its words."""
    assert nft.rule_text(4, Rule((match,), ())) == text


@pytest.mark.parametrize(("statement", "text"), STATEMENTS)
def test_statements(statement, text):
    """Each row: a statement and its words."""
    assert nft.rule_text(4, Rule((), (statement,), "why")) == f'{text} comment "why"'


def test_ipv6_has_its_own_words():
    """In a table of IPv6 addresses are ip6's, and an address with a port stands in brackets."""
    rule = Rule((InSet((Field("original-daddr"), DADDR), "a"),), (DnatTo(1, 80),))
    assert nft.rule_text(6, rule) == "ct original ip6 daddr . ip6 daddr @a dnat ip6 to [::1]:80"


DECLARATIONS = [
    (NamedSet("s", (DADDR,)), "add set ip nodeplane s { type ipv4_addr; }"),
    (
        NamedSet("s", FRONTEND, "verdict", comment="why"),
        'add map ip nodeplane s { type ipv4_addr . inet_proto . inet_service : verdict; comment "why"; }',
    ),
    (
        NamedSet("s", (DADDR, Random(2)), "endpoint"),
        "add map ip nodeplane s { typeof ip daddr . numgen random mod 2 : ip daddr . th dport; }",
    ),
    (
        NamedSet("s", (ORIGINAL[1], SourceHash(251, 1)), "verdict"),
        "add map ip nodeplane s { typeof ip daddr . numgen random mod 251 : verdict; }",
    ),
    (
        NamedSet("s", (SADDR,), dynamic=True, timeout=30, size=10),
        "add set ip nodeplane s { type ipv4_addr; size 10; flags dynamic,timeout; timeout 30s; }",
    ),
    (
        NamedSet("s", ORIGINAL, "endpoint", intervals=True),
        "add map ip nodeplane s { type ipv4_addr . ipv4_addr . inet_service : ipv4_addr . inet_service; flags interval; }",
    ),
]


@pytest.mark.parametrize(("named", "text"), DECLARATIONS)
def test_declarations(named, text):
    """Each row: a set and the command that makes it."""
    assert nft.add_set(KEY, named) == text


def test_a_table_whole():
    """A table is printed with sets before chains, both by name, and elements in order."""
    table = Table(
        {"b": Chain((Rule((), (Refuse(),)),)), "a": Chain((), Hook("nat", "output", -100))},
        {"s": NamedSet("s", (DADDR,), intervals=True), "m": NamedSet("m", (PROTO, DPORT), "verdict")},
        {"s": {(Interval(2, 3),): None, (1,): None}, "m": {("udp", 2): "drop", ("tcp", 1): Goto("b")}},
    )
    assert nft.print_table(KEY, table) == (
        "table ip nodeplane {\n"
        "\tmap m {\n"
        "\t\ttype inet_proto . inet_service : verdict\n"
        "\t\telements = { tcp . 1 : goto b,\n"
        "\t\t\tudp . 2 : drop }\n"
        "\t}\n"
        "\n"
        "\tset s {\n"
        "\t\ttype ipv4_addr\n"
        "\t\tflags interval\n"
        "\t\telements = { 0.0.0.1,\n"
        "\t\t\t0.0.0.2-0.0.0.3 }\n"
        "\t}\n"
        "\n"
        "\tchain a {\n"
        "\t\ttype nat hook output priority -100; policy accept;\n"
        "\t}\n"
        "\n"
        "\tchain b {\n"
        "\t\treject\n"
        "\t}\n"
        "}\n"
    )


# -- plans -----------------------------------------------------------------------------------------------------------


def small_table():
    return Table(
        {
            "old": Chain((Rule((), (Refuse(),)),)),
            "in": Chain((Rule((), (VerdictMap((DADDR,), "m"),)),), Hook("nat", "output", 0)),
        },
        {"m": NamedSet("m", (DADDR,), "verdict"), "r": NamedSet("r", (SADDR,), intervals=True)},
        {"m": {(1,): Goto("old"), (2,): "drop"}, "r": {(Interval(1, 5),): None}},
    )


def copy_of(table):
    return Table(dict(table.chains), dict(table.sets), {name: dict(found) for name, found in table.elements.items()})


def test_a_change_in_order():
    """New before what leads to it, elements that change together, intervals that go before those that come, the old last."""
    desired = small_table()
    desired.chains["new"] = Chain((Rule((), (DropPacket(),)),))
    del desired.chains["old"], desired.elements["m"][2,]
    desired.elements["m"][1,] = Goto("new")
    desired.elements["m"][3,] = Goto("new")
    desired.elements["r"] = {(Interval(1, 6),): None}
    plan = diff_tables(KEY, small_table(), desired, None)
    expected = (
        "add chain ip nodeplane new\n"
        "add rule ip nodeplane new drop\n"
        "delete element ip nodeplane r { 0.0.0.1-0.0.0.5 }\n"
        "add element ip nodeplane r { 0.0.0.1-0.0.0.6 }\n"
        "delete element ip nodeplane m { 0.0.0.1 }\n"
        "add element ip nodeplane m { 0.0.0.1 : goto new }\n"
        "add element ip nodeplane m { 0.0.0.3 : goto new }\n"
        "delete element ip nodeplane m { 0.0.0.2 }\n"
        "flush chain ip nodeplane old\n"
        "delete chain ip nodeplane old\n"
    )
    assert list(plan.steps()) == [expected]
    assert remember(small_table(), plan) == desired


def test_only_what_a_change_names_is_compared():
    """What a change does not name is left as it is, however it differs; of a new set every element is added."""
    kernel, desired = small_table(), copy_of(small_table())
    desired.chains["old"] = Chain(())
    desired.sets["new"] = NamedSet("new", (DADDR,))
    desired.elements["new"] = {(7,): None}
    desired.elements["m"] = {(8,): "drop", (9,): "drop"}
    change = TableChange(frozenset(), frozenset({"new"}), {"m": frozenset({(9,), (10,)})})
    plan = diff_tables(KEY, kernel, desired, change)
    assert plan.text() == (
        "add set ip nodeplane new { type ipv4_addr; }\n"
        "add element ip nodeplane new { 0.0.0.7 }\n"
        "add element ip nodeplane m { 0.0.0.9 : drop }\n"
    )
    assert not diff_tables(KEY, kernel, desired, TableChange())


def test_a_large_plan_is_written_in_steps():
    """Many new elements are loaded in bulk: those that lead nowhere first, frontends after them, base chains last."""
    desired = nft_tables.table(4, services=LARGE)
    steps = list(diff_tables(KEY, None, desired, None).steps())
    assert [step.named.name for step in steps if isinstance(step, Load)] == [
        "cidrs", "cluster-ips", "endpoints", "hairpin", "node-port-endpoints", "slots", "source-ranges", "node-ports", "services",
    ]  # fmt: skip
    assert "hook" not in str(steps[0])
    assert str(steps[-1]).count("add chain") == 4
    assert sum(len(step.elements) for step in steps if isinstance(step, Load)) == sum(map(len, desired.elements.values()))


def test_another_declaration_replaces_the_table():
    """A set or hook that would have to be altered makes the whole table new, in one transaction."""
    for alter in (
        lambda t: t.sets.update(r=NamedSet("r", (DADDR,))),
        lambda t: t.chains.update({"in": Chain((), Hook("nat", "output", 1))}),
    ):
        kernel = small_table()
        alter(kernel)
        plan = diff_tables(KEY, kernel, small_table(), None)
        (text,) = plan.steps()
        assert isinstance(text, str)
        assert text.startswith("add table ip nodeplane\ndelete table ip nodeplane\nadd table ip nodeplane\n")
        assert remember(kernel, plan) == small_table()


def test_chains_that_ask_by_number_are_filled_apart():
    """Where the table is there already they are declared, filled by themselves, and then led to."""
    desired = small_table()
    desired.sets["e"] = NamedSet("e", (DADDR, Random(2)), "endpoint")
    desired.elements["e"] = {(1, 0): (2, 80)}
    kernel = copy_of(desired)
    desired.chains["two"] = Chain((Rule((), (DnatByMap((DADDR, Random(2)), "e"),)),))
    desired.elements["m"][1,] = Goto("two")
    plan = diff_tables(KEY, kernel, desired, None)
    assert list(plan.steps()) == [
        "add chain ip nodeplane two\n",
        Fill(desired.sets, {"two": desired.chains["two"]}),
        "delete element ip nodeplane m { 0.0.0.1 }\nadd element ip nodeplane m { 0.0.0.1 : goto two }\n",
    ]
    assert len(list(diff_tables(KEY, None, desired, None).steps())) == 1


@pytest.mark.parametrize(
    ("complaint", "line", "reason"),
    [
        ("Error: Could not process rule: File exists\nadd b\n    ^\n", 2, "Could not process rule: File exists"),
        (
            "internal:0:0-0: Error: conflicting protocols specified: ip vs. th\n",
            0,
            "conflicting protocols specified: ip vs. th",
        ),
        (
            "Error: No such file or directory; did you mean chain c?\nadd x\n",
            0,
            "No such file or directory; did you mean chain c?",
        ),
        ("", 0, "refused without a word"),
    ],
)
def test_complaints(complaint, line, reason):
    """Each row: what libnftables says, and the line and the words that are told."""
    error = refusal("add a\nadd b\n", complaint)
    assert (error.line, error.reason) == (line, reason)
    assert error.obj == ("add b" if line else "transaction")
