"""Whatever rules there are, their text reads back as the same rules."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kernelstate.objects.address import BITS, Family, Prefix
from kernelstate.objects.netfilter import (
    PROBABILITY_ONE,
    AddrType,
    Anchor,
    ChainKey,
    Comment,
    ConnState,
    Dnat,
    Jump,
    Limit,
    Mark,
    Masquerade,
    NfAcct,
    Nflog,
    Recent,
    Reject,
    Rule,
    Ruleset,
    SetXmark,
    Statistic,
    Table,
    Transport,
    Verdict,
)
from kernelstate.text.iptables_save import STATE_ORDER, parse_save, print_ruleset

u32 = st.integers(0, 0xFFFFFFFF)
names = st.from_regex(r"KUBE-[A-Z]{1,3}-[A-Z2-7]{1,16}", fullmatch=True)
ports = st.tuples(st.integers(0, 65535), st.integers(0, 65535)).map(lambda pair: (min(pair), max(pair)))
interfaces = st.sampled_from(["", "lo", "eth0", "cali+"])
comments = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=40).map(Comment)
matches = st.one_of(
    comments,
    st.sets(st.sampled_from(STATE_ORDER), min_size=1)
    .map(sorted)
    .flatmap(lambda states: st.builds(ConnState, st.just(tuple(states)), st.booleans())),
    st.builds(Mark, u32, u32, st.booleans()),
    st.builds(AddrType, st.sampled_from(["", "LOCAL"]), st.just("LOCAL")),
    st.one_of(st.integers(1, 100_000).map(Statistic.one_of), st.integers(0, PROBABILITY_ONE).map(Statistic)),
    st.one_of(
        names.map(lambda name: Recent(name, set=True)), st.builds(Recent, names, st.just(value=False), st.integers(1, 86400))
    ),
    names.map(NfAcct),
    st.builds(Limit, st.integers(1, 100), st.integers(1, 200)),
)


@st.composite
def rules(draw: st.DrawFn, family: Family, chains: tuple[str, ...]) -> Rule:
    def prefix() -> Prefix | None:
        length = draw(st.integers(0, BITS[family]))
        if length == 0:  # the kernel does not tell "any" from nothing
            return None
        shift = BITS[family] - length
        return Prefix(family, draw(st.integers(0, (1 << BITS[family]) - 1)) >> shift << shift, length)

    listed = draw(st.lists(matches, max_size=3))
    protocol = draw(st.sampled_from(["", "tcp", "udp", "sctp"]))
    if protocol and draw(st.booleans()):
        at = draw(st.integers(0, len(listed)))
        listed.insert(at, Transport(protocol, draw(st.none() | ports), draw(st.none() | ports)))
    source, destination = prefix(), prefix()
    incoming, outgoing = draw(interfaces), draw(interfaces)
    target = draw(
        st.one_of(
            st.none(),
            st.sampled_from(Verdict),
            st.builds(Jump, st.sampled_from(chains), st.booleans()),
            st.builds(Nflog, st.just("prefix"), st.integers(0, 65535), st.integers(1, 256)),
            st.sampled_from([Reject(), Reject("tcp-reset")]),
            st.builds(Dnat, st.just(family), st.integers(0, (1 << BITS[family]) - 1), st.integers(0, 65535)),
            st.builds(Masquerade, st.booleans()),
            st.builds(SetXmark, u32, u32),
        )
    )
    return Rule(
        target,
        tuple(listed),
        protocol,
        source,
        destination,
        source is not None and draw(st.booleans()),
        destination is not None and draw(st.booleans()),
        incoming,
        outgoing,
        bool(incoming) and draw(st.booleans()),
        bool(outgoing) and draw(st.booleans()),
    )


@st.composite
def rulesets(draw: st.DrawFn) -> tuple[Family, Ruleset]:
    family: Family = draw(st.sampled_from([4, 6]))
    chains = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    body = st.lists(rules(family, tuple(chains)), max_size=3).map(tuple)
    tables: tuple[Table, ...] = ("filter", "nat")
    filled = {ChainKey(family, table, name): draw(body) for table in tables for name in chains}
    doors = [ChainKey(family, "filter", "FORWARD"), ChainKey(family, "nat", "OUTPUT")]
    anchors = [Anchor(key, rule) for key in doors for rule in draw(body)]
    return family, Ruleset(filled, tuple(anchors))


@given(rulesets())
def test_parse_of_print_is_the_ruleset(case: tuple[Family, Ruleset]) -> None:
    """parse(print(x)) = x for every ruleset of one family, and printing that gives the same bytes."""
    family, ruleset = case
    text = print_ruleset(ruleset, family)
    again = parse_save(text, family)
    assert again == ruleset
    assert print_ruleset(again, family) == print_ruleset(Ruleset(again.chains, ruleset.anchors), family)
