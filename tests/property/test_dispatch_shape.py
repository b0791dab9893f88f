"""A chain as a tree means what the chain means, and its shape tells nothing of how it came about."""

import itertools
import os
from ipaddress import ip_address

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from service_worlds import LOCAL_ADDRESSES, NODE, flows, snapshots
from service_worlds import settings as proxy_settings

from kernelstate.objects.address import BITS, Prefix, address_text
from kernelstate.objects.netfilter import Anchor, ChainKey, Comment, Jump, Reject, Rule, Ruleset, Transport, Verdict
from kernelstate.simulate import Packet, Simulator
from nodeplane.explain import outcome_of, packet_of
from proxy.compile import compile_table
from proxy.oracle import Oracle
from proxy.render.iptables_program import render_iptables
from proxy.render.iptables_shared import SharedChain

EXAMPLES = 400 if os.environ.get("EXPLORE") else 80
CHAIN = "KUBE-EXTERNAL-SERVICES"
NETWORKS = {4: (0x0A600000, 0xCB007100, 0), 6: (0xFD00 << 112, 0x20010DB8 << 96, 0)}
TARGETS = (Verdict.DROP, Verdict.ACCEPT, Reject())


def keys(family):
    """Return a strategy of addresses: dense runs, far neighbours, and some that differ from others in one bit anywhere."""
    bit = st.integers(0, BITS[family] - 1).map(lambda n: 1 << n)
    near = st.one_of(st.integers(0, 40), st.integers(0, 0xFFFF), bit)
    return st.builds(lambda network, offset: network ^ offset, st.sampled_from(NETWORKS[family]), near)


@st.composite
def rules(draw, family):
    """Draw a rule for an address and port, or for a port alone, with a comment nobody else has."""
    protocol = draw(st.sampled_from(["tcp", "udp", "sctp"]))
    port = draw(st.one_of(st.integers(30000, 30040), st.sampled_from([80, 81]), st.integers(1, 65535)))
    address = draw(st.one_of(keys(family), keys(family), st.none()))
    return Rule(
        draw(st.sampled_from(TARGETS)),
        (Transport(protocol, (port, port)),),
        protocol,
        destination=None if address is None else Prefix(family, address, BITS[family]),
    )


@st.composite
def services(draw, family):
    """Draw what up to 40 Services write into one chain."""
    size = draw(st.sampled_from([2, 10, 40]))
    found = draw(st.lists(st.lists(rules(family), min_size=1, max_size=4), min_size=size // 2, max_size=size))
    marked = itertools.count()
    return {
        ("ns", f"s{i:02}"): tuple(msgspec.structs.replace(r, matches=(Comment(str(next(marked))), *r.matches)) for r in some)
        for i, some in enumerate(found)
    }


def program(family, written, above):
    """Return the chain and those below it, as one settlement makes them."""
    chain = SharedChain(ChainKey(family, "filter", CHAIN), above)
    for name, some in written.items():
        chain.put(name, some)
    own, below = chain.settle()
    return {chain.key: own, **below}


def interesting(family, written):
    """Return destinations that rules are about, with their neighbours, each with the protocols and ports in use."""
    every = [rule for some in written.values() for rule in some]
    last = (1 << BITS[family]) - 1
    addresses = {r.destination.network for r in every if r.destination is not None} or {1}
    near = sorted({min(max(a + step, 0), last) for a in addresses for step in (-1, 0, 1)})
    ports = sorted({(r.protocol, r.matches[-1].dport[0] + step) for r in every for step in (0, 1)})
    about = [(r.destination.network, r.protocol, r.matches[-1].dport[0]) for r in every if r.destination is not None]
    spread = [(near[i % len(near)], protocol, min(port, 65535)) for i, (protocol, port) in enumerate(ports)]
    return about + spread + [(address, "tcp", 80) for address in near]


def meets(simulator, family, destination):
    """Return the verdict for a packet and the rule that gave it, jumps left out."""
    address, protocol, port = destination
    source = ip_address("198.51.100.7" if family == 4 else "2001:db8::7")
    to = ip_address(address_text(family, address))
    (path,) = simulator.walk(Packet(protocol, source, to, port, in_interface="eth0", out_interface="eth1"))
    return path.verdict, [step.rule for step in path.steps if not isinstance(step.rule.target, Jump)]


def walker(family, chains):
    """Return a simulator in which FORWARD goes to the chain."""
    door = Anchor(ChainKey(family, "filter", "FORWARD"), Rule(Jump(CHAIN)))
    return Simulator(Ruleset(chains, (door,)))


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.sampled_from([4, 6]).flatmap(lambda f: st.tuples(st.just(f), services(f))), st.sampled_from([1, 3, 20]))
def test_tree_means_what_the_list_means(drawn, above):
    """Each packet to a rule's address and port, or close by, meets the same rule in the tree as in the list."""
    family, written = drawn
    flat, tree = program(family, written, 0), program(family, written, above)
    assert len(flat) == 1
    by_list, by_tree = walker(family, flat), walker(family, tree)
    for destination in interesting(family, written):
        assert meets(by_tree, family, destination) == meets(by_list, family, destination), destination


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.sampled_from([4, 6]).flatmap(lambda f: st.tuples(services(f), services(f), st.just(f))), st.data())
def test_shape_forgets_its_history(drawn, data):
    """Services that come, change and go one by one or several at a time leave the chains that one settlement makes."""
    before, after, family = drawn
    above = data.draw(st.sampled_from([1, 3, 20]))
    chain = SharedChain(ChainKey(family, "filter", CHAIN), above)
    chains = {}
    steps = [*before.items(), *((name, None) for name in before if name not in after), *after.items()]
    steps[len(before) :] = data.draw(st.permutations(steps[len(before) :]))
    while steps:
        together = data.draw(st.sampled_from([1, 1, 1, 30]))
        for name, some in steps[:together]:
            chain.put(name, some)
        del steps[:together]
        own, below = chain.settle()
        assert all(key in chains for key, some in below.items() if some is None)
        chains |= {chain.key: own, **below}
        chains = {key: some for key, some in chains.items() if some is not None}
    assert chains == program(family, after, above)


@settings(max_examples=200, deadline=None)
@given(snapshots(families=(4, 6)), proxy_settings(), st.lists(flows(), min_size=5, max_size=12))
def test_guarded_node_ports_meet_oracle(snapshot, config, asked):
    """Where source ranges guard NodePorts too, rules let in and drop whom the oracle does."""
    config = msgspec.structs.replace(config, guard_node_ports=True)
    table = compile_table(snapshot, NODE)
    oracle = Oracle(table, config, NODE, LOCAL_ADDRESSES)
    simulator = Simulator(render_iptables(table, config, NODE), LOCAL_ADDRESSES)
    for flow in asked:
        assert {outcome_of(p) for p in simulator.walk(packet_of(flow))} == oracle.judge(flow).outcomes, flow
