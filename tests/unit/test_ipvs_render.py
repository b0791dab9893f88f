"""What the IPVS renderer makes of single Services: servers, sets, addresses, and the rules around them."""

from ipaddress import ip_address, ip_network

import msgspec
import pytest
from entries import entry_of

from kernelstate.objects.address import Prefix
from kernelstate.objects.ipvs import RealServer, ServerKey, VirtualServer
from kernelstate.objects.netfilter import ChainKey
from kernelstate.simulate import Packet
from kernelstate.simulate_ipvs import IpvsSimulator
from kernelstate.text.ipset_save import print_sets
from kernelstate.text.iptables_save import print_rule
from kernelstate.text.ipvsadm import print_servers
from proxy.render.ipvs import SET_TYPES, set_name
from proxy.render.ipvs_program import IpvsProgram
from proxy.settings import NodeFacts, ProxySettings
from proxy.table import Frontend, Kind

NODE = NodeFacts(
    "n1", addresses=(ip_address("192.168.1.1"),), local_addresses=(Prefix.parse("192.168.1.1/32"), Prefix.parse("10.9.0.1/32"))
)
CLIENT, OWN, VIP, POD = map(ip_address, ("198.51.100.7", "192.168.1.1", "10.96.0.10", "10.244.0.1"))
LB = ip_address("10.98.0.1")


def number(text):
    """Return an address as a number."""
    return int(ip_address(text))


def program_of(*entries, **config):
    """Render entries of different Services."""
    program = IpvsProgram(ProxySettings(**config), NODE, (4,))
    program.update({(e.name.namespace, e.name.service): (e,) for e in entries}, None)
    return program


def walk(program, source, destination, port, **rest):
    """Return the paths of a TCP packet."""
    simulator = IpvsSimulator(program.ruleset, program.sets, program.servers, program.addresses, [OWN, ip_address("10.9.0.1")])
    return simulator.walk(Packet("tcp", source, destination, port, **rest))


def with_frontends(entry, *frontends, **fields):
    """Return the entry with other frontends and fields."""
    return msgspec.structs.replace(entry, frontends=frontends, **fields)


def test_a_cluster_ip() -> None:
    """A ClusterIP is one virtual server, held by kube-ipvs0, in the sets KUBE-CLUSTER-IP and KUBE-IPVS-IPS."""
    program = program_of(entry_of("a", endpoints=2))
    assert print_servers(program.servers) == (
        "-A -t 10.96.0.10:80 -s rr\n"
        "-a -t 10.96.0.10:80 -r 10.244.0.1:80 -m -w 1\n"
        "-a -t 10.96.0.10:80 -r 10.244.0.2:80 -m -w 1\n"
    )
    assert print_sets(program.sets) == (
        "create KUBE-CLUSTER-IP hash:ip,port family inet hashsize 1024 maxelem 65536\n"
        "add KUBE-CLUSTER-IP 10.96.0.10,tcp:80\n"
        "create KUBE-IPVS-IPS hash:ip family inet hashsize 1024 maxelem 65536\n"
        "add KUBE-IPVS-IPS 10.96.0.10\n"
    )
    assert program.addresses == {Prefix.parse("10.96.0.10/32")}


def test_a_node_port_is_a_server_on_every_own_address() -> None:
    """A NodePort answers on each address of the node, never on loopback, and needs no address on kube-ipvs0."""
    program = program_of(with_frontends(entry_of("a"), Frontend(Kind.NODE_PORT, None, 30080)))
    assert {(key.address, key.port) for key in program.servers} == {
        (number("192.168.1.1"), 30080),
        (number("10.9.0.1"), 30080),
    }
    assert program.sets.keys() == {"KUBE-NODE-PORT-TCP"}
    assert program.addresses == frozenset()


def test_names_fit_the_kernel() -> None:
    """A set's name in IPv6 starts with KUBE-6- and has at most 31 characters."""
    assert set_name("KUBE-CLUSTER-IP", 6) == "KUBE-6-CLUSTER-IP"
    assert set_name("KUBE-LOAD-BALANCER-SOURCE-CIDR", 6) == "KUBE-6-LOAD-BALANCER-SOURCE-CID"
    names = [set_name(name, family) for name in SET_TYPES for family in (4, 6)]
    assert max(map(len, names)) == 31
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("config", "fields", "server"),
    [
        ({"scheduler": "wlc"}, {}, VirtualServer("wlc", (RealServer(int(POD), 80),))),
        ({}, {"affinity_seconds": 600}, VirtualServer("rr", (RealServer(int(POD), 80),), 600)),
        ({"scheduler": "mh", "scheduler_by_port": True}, {}, VirtualServer("mh", (RealServer(int(POD), 80),), by_port=True)),
        ({"scheduler": "rr", "scheduler_by_port": True}, {}, VirtualServer("rr", (RealServer(int(POD), 80),))),
        ({"scheduler": "lc"}, {"consistent": True}, VirtualServer("mh", (RealServer(int(POD), 80),))),
    ],
)
def test_how_one_is_chosen(config, fields, server) -> None:
    """Each row: settings and Service decide scheduler, persistence and whether the source port counts."""
    program = program_of(msgspec.structs.replace(entry_of("a"), **fields), **config)
    assert program.servers == {ServerKey(4, "tcp", int(VIP), 80): server}


def test_rules_ask_no_set_without_members() -> None:
    """Without a Service no rule asks a set; the chains are there, and what is marked by others is still masqueraded."""
    program = program_of()
    text = [print_rule(key.name, rule) for key, rules in program.chains.items() for rule in rules]
    assert not [line for line in text if "match-set" in line]
    assert len(program.chains[ChainKey(4, "nat", "KUBE-POSTROUTING")]) == 3


def test_order_of_nat_rules() -> None:
    """KUBE-SERVICES: what comes from loopback, marks by kind of address, ACCEPT for Services' own, NodePorts last."""
    entry = with_frontends(
        entry_of("a"),
        Frontend(Kind.CLUSTER_IP, VIP, 80),
        Frontend(Kind.EXTERNAL_IP, ip_address("10.97.0.1"), 80),
        Frontend(Kind.LOAD_BALANCER, LB, 80),
        Frontend(Kind.NODE_PORT, None, 30080),
    )
    program = program_of(entry, cluster_cidrs=(Prefix.parse("10.244.0.0/16"),))
    rules = program.chains[ChainKey(4, "nat", "KUBE-SERVICES")]
    shown = [print_rule("X", msgspec.structs.replace(r, matches=r.matches[bool(r.comment) :])) for r in rules]
    assert shown == [
        "-A X -s 127.0.0.0/8 -j RETURN",
        "-A X -m set --match-set KUBE-LOAD-BALANCER dst,dst -j KUBE-LOAD-BALANCER",
        "-A X ! -s 10.244.0.0/16 -m set --match-set KUBE-CLUSTER-IP dst,dst -j KUBE-MARK-MASQ",
        "-A X -m set --match-set KUBE-EXTERNAL-IP dst,dst -j KUBE-MARK-MASQ",
        (
            "-A X -m set --match-set KUBE-EXTERNAL-IP dst,dst -m physdev ! --physdev-is-in"
            " -m addrtype ! --src-type LOCAL -j ACCEPT"
        ),
        "-A X -m set --match-set KUBE-EXTERNAL-IP dst,dst -m addrtype --dst-type LOCAL -j ACCEPT",
        "-A X -m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT",
        "-A X -m set --match-set KUBE-LOAD-BALANCER dst,dst -j ACCEPT",
        "-A X -m addrtype --dst-type LOCAL -j KUBE-NODE-PORT",
    ]


def test_a_service_port_that_is_a_node_port_number_keeps_its_source() -> None:
    """A pod that asks a ClusterIP's port 30080 keeps its source, though 30080 is somebody's NodePort."""
    one = with_frontends(entry_of("a"), Frontend(Kind.CLUSTER_IP, VIP, 30080))
    program = program_of(one, with_frontends(entry_of("b", endpoints=2), Frontend(Kind.NODE_PORT, None, 30080)))
    (path,) = walk(program, ip_address("10.244.7.7"), VIP, 30080)
    assert (path.dnat, path.masquerade) == ((POD, 80), False)
    assert {path.masquerade for path in walk(program, CLIENT, OWN, 30080)} == {True}


def test_an_own_address_hides_a_node_port_until_it_goes() -> None:
    """A Service's external IP that is the node's own has its port alone; when it goes, the NodePort answers there again."""
    outside = with_frontends(entry_of("a", endpoints=0), Frontend(Kind.EXTERNAL_IP, OWN, 30080), has_any=False)
    port = with_frontends(entry_of("b", endpoints=2), Frontend(Kind.NODE_PORT, None, 30080))
    program = program_of(outside, port)
    key = ServerKey(4, "tcp", int(OWN), 30080)
    assert program.servers[key].real_servers == ()
    assert [p.verdict for p in walk(program, CLIENT, OWN, 30080)] == ["reject"]
    change = program.update({("default", "b"): (port,)}, [("default", "a")])
    assert change.servers == {key}
    assert change.sets.keys() == {"KUBE-EXTERNAL-IP"}
    assert len(program.servers[key].real_servers) == 2


def test_an_address_listed_twice_keeps_its_guard() -> None:
    """An address listed as external IP and as guarded load balancer answers as the first, to allowed sources only."""
    entry = with_frontends(
        entry_of("a"),
        Frontend(Kind.EXTERNAL_IP, LB, 80),
        Frontend(Kind.LOAD_BALANCER, LB, 80),
        source_ranges=(ip_network("203.0.113.0/24"),),
    )
    program = program_of(entry)
    assert [p.verdict for p in walk(program, CLIENT, LB, 80)] == ["drop"]
    assert [p.dnat for p in walk(program, ip_address("203.0.113.9"), LB, 80)] == [(POD, 80)]


def test_excluded_addresses_are_left_to_others() -> None:
    """A Service address inside excludeCIDRs becomes nothing, and a line says so."""
    program = program_of(entry_of("a"), exclude_cidrs=(Prefix.parse("10.96.0.0/16"),))
    assert (program.servers, program.sets, program.addresses) == ({}, {}, frozenset())
    assert program.problems == (
        "Service default/a: 10.96.0.10 lies in ipvs.excludeCIDRs: its virtual server is left to others",
    )


def test_a_held_address_answers_ping() -> None:
    """An echo request to a ClusterIP reaches the node; a TCP port that no Service has there is refused, for the node too."""
    program = program_of(entry_of("a"))
    simulator = IpvsSimulator(program.ruleset, program.sets, program.servers, program.addresses, [OWN])
    assert [p.verdict for p in simulator.walk(Packet("icmp", CLIENT, VIP))] == ["accept"]
    assert [p.verdict for p in walk(program, CLIENT, VIP, 81)] == ["reject"]
    assert [p.verdict for p in walk(program, VIP, VIP, 81, from_local=True)] == ["reject"]


def test_an_address_of_two_services_is_held_until_the_last_goes() -> None:
    """Two Services may share an address on different ports: it stays on kube-ipvs0 as long as one of them has it."""
    a, b = (with_frontends(entry_of(n), Frontend(Kind.LOAD_BALANCER, LB, p)) for n, p in (("a", 80), ("b", 81)))
    program = program_of(a, b)
    change = program.update({("default", "b"): (b,)}, [("default", "a")])
    assert (change.removed_addresses, program.addresses) == (frozenset(), {Prefix.host(LB)})
    change = program.update({}, [("default", "b")])
    assert (change.removed_addresses, program.addresses) == ({Prefix.host(LB)}, frozenset())
    assert program.sets == {}


def test_sysctls() -> None:
    """Flows are tracked through IPVS; strictARP keeps other links from answering for the held addresses."""
    assert IpvsProgram(ProxySettings(), NODE, (4,)).sysctls == (
        ("net/ipv4/vs/conntrack", "1"),
        ("net/ipv4/vs/expire_nodest_conn", "1"),
        ("net/ipv4/vs/expire_quiescent_template", "1"),
    )
    assert IpvsProgram(ProxySettings(strict_arp=True), NODE, (4,)).sysctls[3:] == (
        ("net/ipv4/conf/all/arp_ignore", "1"),
        ("net/ipv4/conf/all/arp_announce", "2"),
    )
