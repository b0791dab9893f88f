"""What rules do to the first packet of a connection."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from kernelstate.objects.address import Prefix
from kernelstate.objects.netfilter import ChainKey, Rule, Ruleset
from kernelstate.simulate import Packet, Path, Simulator
from kernelstate.text.iptables_save import parse_save

NODE = [ip_address("192.168.1.1"), ip_address("fd01::1")]
POD, CLIENT = "10.1.0.9", "192.168.1.77"

RULES = """\
*filter
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -j KUBE-FIREWALL
-A OUTPUT -j KUBE-FIREWALL
-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-SERVICES
-A FORWARD -j KUBE-FORWARD
-A FORWARD -j DROP
-A KUBE-FIREWALL -d 127.0.0.0/8 ! -s 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -s 10.1.0.0/16 -j ACCEPT
-A KUBE-SERVICES -m comment --comment "empty has no endpoints" -m tcp -p tcp -d 10.96.0.2 --dport 80 -j REJECT
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-SVC-A - [0:0]
:KUBE-SEP-1 - [0:0]
:KUBE-SEP-2 - [0:0]
:KUBE-SEP-3 - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-SERVICES -m tcp -p tcp -d 10.96.0.1 --dport 80 -j KUBE-SVC-A
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -m tcp -p tcp --dport 30080 -j KUBE-MARK-MASQ
-A KUBE-NODEPORTS -m tcp -p tcp --dport 30080 -j KUBE-SVC-A
-A KUBE-SVC-A -m tcp -p tcp -d 10.96.0.1 --dport 80 ! -s 10.1.0.0/16 -j KUBE-MARK-MASQ
-A KUBE-SVC-A -m recent --name KUBE-SEP-3 --rcheck --seconds 60 --reap -j KUBE-SEP-3
-A KUBE-SVC-A -m statistic --mode random --probability 0.3333333333 -j KUBE-SEP-1
-A KUBE-SVC-A -m statistic --mode random --probability 0.5000000000 -j KUBE-SEP-2
-A KUBE-SVC-A -j KUBE-SEP-3
-A KUBE-SEP-1 -s 10.1.0.1 -j KUBE-MARK-MASQ
-A KUBE-SEP-1 -m tcp -p tcp -j DNAT --to-destination 10.1.0.1:8080
-A KUBE-SEP-2 -s 10.1.0.2 -j KUBE-MARK-MASQ
-A KUBE-SEP-2 -m tcp -p tcp -j DNAT --to-destination 10.1.0.2:8080
-A KUBE-SEP-3 -s 10.1.0.3 -j KUBE-MARK-MASQ
-A KUBE-SEP-3 -m recent --name KUBE-SEP-3 --set -m tcp -p tcp -j DNAT --to-destination 10.1.0.3:8080
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
COMMIT
"""
SIMULATOR = Simulator(parse_save(RULES, 4), NODE)
ONE_TWO_THREE = {"10.1.0.1:8080": 1 / 3, "10.1.0.2:8080": 1 / 3, "10.1.0.3:8080": 1 / 3}


def packet(source: str, destination: str, port: int = 80, **rest: object) -> Packet:
    return Packet("tcp", ip_address(source), ip_address(destination), port, **rest)  # type: ignore[arg-type]


def outcomes(paths: tuple[Path, ...]) -> dict[tuple[str, str, bool], float]:
    """Sum the probabilities of each (verdict, translated destination, masquerade)."""
    total: dict[tuple[str, str, bool], float] = {}
    for path in paths:
        where = f"{path.dnat[0]}:{path.dnat[1]}" if path.dnat else ""
        key = (path.verdict, where, path.masquerade)
        total[key] = total.get(key, 0) + path.probability
    return total


@pytest.mark.parametrize(
    ("packet", "expected"),
    [
        pytest.param(
            packet(POD, "10.96.0.1"), {("accept", where, False): p for where, p in ONE_TWO_THREE.items()}, id="pod to service"
        ),
        pytest.param(
            packet(CLIENT, "10.96.0.1"),
            {("accept", where, True): p for where, p in ONE_TWO_THREE.items()},
            id="from off-cluster",
        ),
        pytest.param(
            packet("192.168.1.1", "10.96.0.1", from_local=True),
            {("accept", where, True): p for where, p in ONE_TWO_THREE.items()},
            id="from the node",
        ),
        pytest.param(
            packet("10.1.0.2", "10.96.0.1"),
            {("accept", where, where == "10.1.0.2:8080"): p for where, p in ONE_TWO_THREE.items()},
            id="hairpin is masqueraded",
        ),
        pytest.param(
            packet(POD, "10.96.0.1", remembered=frozenset({"KUBE-SEP-3"})),
            {("accept", "10.1.0.3:8080", False): 1.0},
            id="affinity remembers",
        ),
        pytest.param(
            packet(CLIENT, "192.168.1.1", 30080),
            {("accept", where, True): p for where, p in ONE_TWO_THREE.items()},
            id="node port",
        ),
        pytest.param(packet(CLIENT, "192.168.1.2", 30080), {("drop", "", False): 1.0}, id="node port of another node"),
        pytest.param(packet(POD, "10.96.0.2"), {("reject", "", False): 1.0}, id="no endpoints"),
        pytest.param(
            packet("192.168.1.1", "10.96.0.2", from_local=True), {("reject", "", False): 1.0}, id="no endpoints, node"
        ),
        pytest.param(packet(POD, "10.96.0.1", 81), {("accept", "", False): 1.0}, id="another port passes"),
        pytest.param(packet(CLIENT, "127.0.0.1", 22), {("drop", "", False): 1.0}, id="localnet from outside"),
        pytest.param(
            packet("127.0.0.1", "127.0.0.1", 30080, from_local=True),
            {("accept", where, True): p for where, p in ONE_TWO_THREE.items()},
            id="node port on loopback",
        ),
        pytest.param(packet("127.0.0.1", "127.0.0.1", 22, from_local=True), {("accept", "", False): 1.0}, id="loopback"),
        pytest.param(packet(POD, "1.1.1.1", state="INVALID"), {("drop", "", False): 1.0}, id="invalid is dropped"),
        pytest.param(packet(POD, "10.96.0.1", state="ESTABLISHED"), {("accept", "", False): 1.0}, id="nat is for new flows"),
    ],
)
def test_outcomes(packet: Packet, expected: dict[tuple[str, str, bool], float]) -> None:
    """Each row: a packet, and with which probability it ends how."""
    assert outcomes(SIMULATOR.walk(packet)) == pytest.approx(expected)


def walk(rules: str, sent: Packet) -> tuple[Path, ...]:
    return Simulator(parse_save(rules, 4), NODE).walk(sent)


def test_goto_returns_to_the_callers_caller() -> None:
    """Coming back from a goto skips the rest of the chain that went; from a jump it does not."""
    rules = "*filter\n:A - [0:0]\n:B - [0:0]\n-A FORWARD -j A\n-A FORWARD -j REJECT\n-A A {} B\n-A A -j DROP\n-A B -j RETURN\nCOMMIT\n"
    assert [path.verdict for path in walk(rules.format("-g"), packet(POD, CLIENT))] == ["reject"]
    assert [path.verdict for path in walk(rules.format("-j"), packet(POD, CLIENT))] == ["drop"]


def test_branches_that_return_go_on_separately() -> None:
    """A lot drawn inside a chain that returns multiplies with the lots drawn behind it."""
    rules = (
        "*filter\n:A - [0:0]\n-A FORWARD -j A\n-A FORWARD -m mark --mark 0x1 -j DROP\n-A FORWARD -m statistic --mode random"
        " --probability 0.5 -j REJECT\n-A A -m statistic --mode random --probability 0.25 -j MARK --or-mark 0x1\nCOMMIT\n"
    )
    total = outcomes(walk(rules, packet(POD, CLIENT)))
    assert total == pytest.approx({("drop", "", False): 0.25, ("reject", "", False): 0.375, ("accept", "", False): 0.375})


@pytest.mark.parametrize(
    ("rule", "where", "matches"),
    [
        ("-A PREROUTING -i eth0 -j DROP", {"in_interface": "eth0"}, True),
        ("-A PREROUTING -i eth+ -j DROP", {"in_interface": "eth0"}, True),
        ("-A PREROUTING ! -i eth+ -j DROP", {"in_interface": "eth0"}, False),
        ("-A FORWARD -i eth0 -o cni0 -j DROP", {"in_interface": "eth0", "out_interface": "cni0"}, True),
        ("-A OUTPUT ! -i cni0 -j DROP", {"from_local": True}, True),
        ("-A POSTROUTING -o eth1 -j DROP", {"out_interface": "eth1"}, True),
        ("-A PREROUTING -m limit --limit 1/s -j DROP", {}, False),
        ("-A PREROUTING -m addrtype --src-type LOCAL -j DROP", {}, False),
        ("-A PREROUTING -m addrtype --dst-type BROADCAST -j DROP", {}, False),
        ("-A PREROUTING -p udp -j DROP", {}, False),
        ("-A PREROUTING -p tcp -m tcp --sport 49152 --dport 70:90 -j DROP", {}, True),
    ],
)
def test_single_matches(rule: str, where: dict[str, object], matches: bool) -> None:
    """Each row: one rule in the mangle table, and whether it takes the packet."""
    (path,) = walk(f"*mangle\n{rule}\nCOMMIT\n", packet(POD, CLIENT, **where))
    assert path.verdict == ("drop" if matches else "accept")


def test_steps_tell_the_story() -> None:
    """Each rule that matched is told in order, with what it did."""
    (path,) = SIMULATOR.walk(packet(POD, "10.96.0.2"))
    assert [str(step) for step in path.steps] == [
        "nat -A PREROUTING -j KUBE-SERVICES => goes to KUBE-SERVICES",
        "filter -A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES => goes to KUBE-SERVICES",
        (
            'filter -A KUBE-SERVICES -m comment --comment "empty has no endpoints" -m tcp -p tcp -d 10.96.0.2 --dport 80 -j REJECT'
            " => rejected"
        ),
    ]
    words = walk("*nat\n-A PREROUTING -j REDIRECT --to-ports 1\nCOMMIT\n", packet(POD, CLIENT))[0].steps
    assert [step.happened for step in words] == ["REDIRECT is not simulated"]


def test_ipv6_is_the_same_walk() -> None:
    """The same rules in the other family give the same answers there."""
    rules = "*nat\n-A PREROUTING -d fd00::1 -m tcp -p tcp --dport 80 -j DNAT --to-destination [fd01::5]:8080\nCOMMIT\n"
    (path,) = Simulator(parse_save(rules, 6), NODE).walk(packet("fd02::1", "fd00::1"))
    assert path.dnat == (ip_address("fd01::5"), 8080)
    (other,) = Simulator(parse_save(rules, 6), NODE).walk(packet(POD, "10.96.0.1"))
    assert other.dnat is None


def test_a_long_chain_keeps_first_match() -> None:
    """Indexed or not, the first rule that matches wins, whatever kind of rule stands before and behind it."""
    service = "-A C -m tcp -p tcp -d 10.96.{}.{} --dport 80 -j DNAT --to-destination 10.1.0.1:{}"
    lines = [service.format(n // 200, n % 200, n + 1) for n in range(1000)]
    for position, special in [
        (100, "-A C -s 10.1.0.9 -d 10.96.0.150 -j RETURN"),
        (700, "-A C -p tcp -m tcp --dport 80 -j DROP"),
    ]:
        lines.insert(position, special)
    ruleset = parse_save("*nat\n:C - [0:0]\n-A PREROUTING -j C\n" + "\n".join(lines) + "\nCOMMIT\n", 4)
    long = Simulator(ruleset)
    assert [p.dnat for p in long.walk(packet(CLIENT, "10.96.0.150"))] == [(ip_address("10.1.0.1"), 151)]
    assert [(p.verdict, p.dnat) for p in long.walk(packet(POD, "10.96.0.150"))] == [("accept", None)]
    assert [p.verdict for p in long.walk(packet(CLIENT, "10.96.4.1"))] == ["drop"]
    key = ChainKey(4, "nat", "C")
    for rule in ruleset.chains[key][::37]:
        destination = rule.destination or Prefix.parse("10.96.3.3")
        sent = packet(CLIENT, destination.address_text)
        assert [p.dnat for p in long.walk(sent)] == [p.dnat for p in linear(ruleset).walk(sent)]


def linear(ruleset: Ruleset) -> Simulator:
    """Return a simulator whose long chain is cut into chains short enough not to be indexed."""
    key = ChainKey(4, "nat", "C")
    rules = ruleset.chains[key]
    cut: dict[ChainKey, tuple[Rule, ...]] = {}
    heads = []
    for start in range(0, len(rules), 16):
        name = f"C{start}"
        cut[ChainKey(4, "nat", name)] = rules[start : start + 16]
        heads.append(f"-A PREROUTING -j {name}")
    text = "*nat\n" + "".join(f":C{start} - [0:0]\n" for start in range(0, len(rules), 16)) + "\n".join(heads) + "\nCOMMIT\n"
    return Simulator(Ruleset(cut, parse_save(text, 4).anchors))
