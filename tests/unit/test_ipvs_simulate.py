"""IPVS in the packet's walk: where it stands among the hooks, and what it then does."""

from ipaddress import ip_address

import pytest

from kernelstate.objects.address import Prefix
from kernelstate.objects.ipvs import RealServer, ServerKey, VirtualServer
from kernelstate.objects.sets import IpSet, SetSpec
from kernelstate.simulate import Packet, Simulator
from kernelstate.simulate_ipvs import IpvsSimulator
from kernelstate.text.iptables_save import parse_save

NODE, VIP, POD, CLIENT = map(ip_address, ("192.168.1.1", "10.96.0.10", "10.244.1.7", "198.51.100.7"))
KEY = ServerKey(4, "tcp", int(VIP), 80)
ONE = {KEY: VirtualServer("rr", (RealServer(int(POD), 8080),))}


def paths(rules, servers, packet):
    """Walk a packet on a node that holds the virtual address."""
    return IpvsSimulator(parse_save(rules, 4), {}, servers, [Prefix.host(VIP)], [NODE]).walk(packet)


def sent(*, by_node=False, source=CLIENT):
    """Return a packet to the virtual address."""
    return Packet("tcp", source, VIP, 80, from_local=by_node)


@pytest.mark.parametrize("by_node", [False, True])
@pytest.mark.parametrize(
    ("place", "to_server", "dropped"),
    [
        ("raw PREROUTING", False, {"client"}),
        ("mangle INPUT", False, {"client"}),
        ("filter INPUT", False, {"client"}),
        ("nat INPUT", False, set()),
        ("filter FORWARD", False, set()),
        ("mangle OUTPUT", False, {"node"}),
        ("filter OUTPUT", False, set()),
        ("mangle OUTPUT", True, {"client", "node"}),
        ("filter OUTPUT", True, {"client", "node"}),
        ("mangle POSTROUTING", True, {"client", "node"}),
        ("mangle POSTROUTING", False, set()),
    ],
)
def test_which_rules_see_the_packet(place, to_server, dropped, by_node) -> None:
    """Each row: a rule for the virtual address, or the real server's, at one place, and whose packets it drops."""
    table, chain = place.split()
    target = POD if to_server else VIP
    found = paths(f"*{table}\n-A {chain} -d {target} -j DROP\nCOMMIT\n", ONE, sent(by_node=by_node))
    assert [p.verdict for p in found] == ["drop" if ("node" if by_node else "client") in dropped else "accept"]


def test_nat_output_is_passed_by_once_ipvs_has_translated() -> None:
    """The destination was settled before: a DNAT rule for the real server in OUTPUT is not met again."""
    rules = f"*nat\n-A OUTPUT -d {POD} -p tcp -j DNAT --to-destination 10.0.0.9:1\nCOMMIT\n"
    for by_node in (False, True):
        assert [p.dnat for p in paths(rules, ONE, sent(by_node=by_node))] == [(POD, 8080)]


def test_a_mark_from_before_masquerades_behind() -> None:
    """What PREROUTING marks, POSTROUTING still sees: IPVS leaves the choice of the source to it."""
    rules = "*nat\n-A PREROUTING -j MARK --or-mark 0x4000\n-A POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE\nCOMMIT\n"
    (path,) = paths(rules, ONE, sent())
    assert (path.dnat, path.masquerade) == ((POD, 8080), True)


def test_nobody_there_is_port_unreachable() -> None:
    """A server without real servers, or with quiet ones only, rejects."""
    for reals in ((), (RealServer(int(POD), 8080, 0),)):
        (path,) = paths("", {KEY: VirtualServer("rr", reals)}, sent())
        assert path.verdict == "reject"
        assert str(path.steps[-1]) == "ipvs -A -t 10.96.0.10:80 -s rr => nobody is there: port unreachable"


def test_weights_are_chances() -> None:
    """Real servers are chosen in proportion to their weights; one of weight 0 never."""
    reals = (RealServer(1, 1, 3), RealServer(2, 2, 1), RealServer(3, 3, 0))
    found = paths("", {KEY: VirtualServer("wrr", reals)}, sent())
    assert {p.dnat[1]: p.probability for p in found} == {1: 0.75, 2: 0.25}


def test_a_real_server_on_the_node_is_an_ordinary_local_destination() -> None:
    """It is delivered behind IPVS: nat INPUT sees it with its new destination, OUTPUT does not see it at all."""
    servers = {KEY: VirtualServer("rr", (RealServer(int(NODE), 8080),))}
    dropped = paths(f"*filter\n-A OUTPUT -d {NODE} -j DROP\nCOMMIT\n", servers, sent())
    assert [(p.verdict, p.dnat) for p in dropped] == [("accept", (NODE, 8080))]
    again = paths(f"*filter\n-A INPUT -d {NODE} -p tcp -m tcp --dport 8080 -j DROP\nCOMMIT\n", servers, sent(by_node=True))
    assert [p.verdict for p in again] == ["drop"]


def test_established_flows_are_not_scheduled() -> None:
    """Only the first packet of a connection is given a real server here."""
    (path,) = paths("", ONE, Packet("tcp", CLIENT, VIP, 80, state="ESTABLISHED"))
    assert path.dnat is None


A, N = int(CLIENT), (int(ip_address("198.51.100.0")), 24)
SETS = [
    IpSet(SetSpec("ip", "hash:ip"), frozenset({(int(VIP),)})),
    IpSet(SetSpec("net", "hash:net"), frozenset({(N,)})),
    IpSet(SetSpec("ipport", "hash:ip,port"), frozenset({(int(VIP), "tcp", 80)})),
    IpSet(SetSpec("ipportip", "hash:ip,port,ip"), frozenset({(int(VIP), "tcp", 80, A)})),
    IpSet(SetSpec("ipportnet", "hash:ip,port,net"), frozenset({(int(VIP), "tcp", 80, N)})),
    IpSet(SetSpec("port", "bitmap:port"), frozenset({(80,)})),
    IpSet(SetSpec("six", "hash:ip", 6), frozenset({(int(VIP),)})),
]


@pytest.mark.parametrize(
    ("asked", "matches"),
    [
        ("ip dst", True),
        ("ip src", False),
        ("net src", True),
        ("net dst", False),
        ("ipport dst,dst", True),
        ("ipport src,dst", False),
        ("ipport dst,src", False),
        ("ipportip dst,dst,src", True),
        ("ipportip dst,dst,dst", False),
        ("ipportnet dst,dst,src", True),
        ("ipportnet dst,dst,dst", False),
        ("port dst", True),
        ("port src", False),
        ("six dst", False),
        ("absent dst", False),
    ],
)
def test_sets(asked, matches) -> None:
    """Each row: what a rule asks of which set, and whether the packet is in it; negation is the opposite."""
    sets = {one.spec.name: one for one in SETS}
    for negation, dropped in (("", matches), ("! ", not matches)):
        rules = parse_save(f"*mangle\n-A PREROUTING -m set {negation}--match-set {asked} -j DROP\nCOMMIT\n", 4)
        (path,) = Simulator(rules, [NODE], sets).walk(sent())
        assert path.verdict == ("drop" if dropped else "accept")


@pytest.mark.parametrize("asked", ["ipport dst,dst", "ipportip dst,dst,src", "ipportnet dst,dst,src"])
def test_a_port_of_a_hash_set_is_asked_with_its_protocol(asked) -> None:
    """What is a member as TCP is none as UDP."""
    rules = parse_save(f"*mangle\n-A PREROUTING -m set --match-set {asked} -j DROP\nCOMMIT\n", 4)
    simulator = Simulator(rules, [NODE], {one.spec.name: one for one in SETS})
    found = [simulator.walk(Packet(p, CLIENT, VIP, 80))[0].verdict for p in ("tcp", "udp")]
    assert found == ["drop", "accept"]
