"""The real agent with its leases in a real etcd: what the kernel holds, while peers come and go and etcd does as well."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from etcd_node import EtcdNode
from etcd_server import PREFIX, EtcdServer, etcd_server, wait_for
from leases import flannel_value
from patience import Patience

from kernelstate.linux import netns as namespaces
from kernelstate.linux.netns import inside
from kernelstate.objects.address import Prefix
from kernelstate.objects.links import FdbEntry, LinkObject, Neigh, Route
from nodeplane.etcd_client import EtcdClient
from nodeplane.lease_store import load

pytestmark = pytest.mark.kernel

NETWORK = {"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}


@pytest.fixture
def server(netns: str) -> Iterator[EtcdServer]:
    """Return a running etcd in the node's namespace."""
    with etcd_server(netns) as running:
        yield running


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[ExitStack]:
    """Return what kills agents at the end."""
    with ExitStack() as undo:
        yield undo


def make_node(nodes: ExitStack, space: str, directory: Path, server: EtcdServer, **overlay: object) -> EtcdNode:
    """Make a node and start its agent."""
    node = EtcdNode(space, directory, server, **overlay)
    nodes.callback(node.kill)
    node.start()
    return node


class Peers:
    """Other nodes, as they are in etcd by what was done to them: subnet to address and MAC."""

    def __init__(self, server: EtcdServer, seed: int) -> None:
        self.server, self.random = server, random.Random(seed)
        self.held: dict[int, tuple[int, str]] = {}
        self._addresses = 0

    def change(self, count: int, subnets: range) -> None:
        """Let so many nodes join, leave, move to another address, or get another MAC."""
        with inside(self.server.space):
            etcd = EtcdClient(self.server.here)
            for subnet in self.random.choices(subnets, k=count):
                key, before = f"{PREFIX}/subnets/10.5.{subnet}.0-24", self.held.pop(subnet, None)
                what = self.random.randrange(4)
                if before is not None and what == 0:
                    etcd.delete(key)
                    continue
                address, mac = before or (0, "")
                if not mac or what == 1:
                    mac = f"02:{self.random.randbytes(5).hex(':')}"
                if not address or what > 1:
                    self._addresses += 1
                    address = self._addresses
                self.held[subnet] = (address, mac)
                etcd.put(key, flannel_value(ip_of(address), mac))

    def fill(self, subnets: range) -> None:
        """Let nodes join until each of these subnets has one."""
        while missing := [one for one in subnets if one not in self.held]:
            self.change(1, range(missing[0], missing[0] + 1))

    def expected(self) -> set[LinkObject]:
        """Return what each peer is in the kernel."""
        return {
            one for subnet, (address, mac) in self.held.items() for one in in_kernel(f"10.5.{subnet}.0", ip_of(address), mac)
        }


def in_kernel(gateway: str, address: str, mac: str) -> set[LinkObject]:
    """Return what a peer is in the kernel, said slowly: neighbour, forwarding entry and route."""
    end = ip_address(gateway)
    return {
        Neigh("flannel.1", end, mac),
        FdbEntry("flannel.1", mac, ip_address(address)),
        Route(Prefix.of(ip_network(f"{gateway}/24")), end, "flannel.1", onlink=True),
    }


def remembered(node: EtcdNode) -> set[LinkObject]:
    """Return what the peers that an agent kept for its successor are in the kernel."""
    found: set[LinkObject] = set()
    for key, entry in load(PREFIX, node.directory / "lib" / "overlay.json").entries.items():
        lease = json.loads(entry.value)
        if lease["PublicIP"] != "192.168.1.1":
            found |= in_kernel(key.removesuffix("-24"), lease["PublicIP"], lease["BackendData"]["VtepMAC"])
    return found


def ip_of(number: int) -> str:
    """Return the address of a node, behind a router from here."""
    return str(ip_address("172.16.0.0") + number)


def held(node: EtcdNode) -> set[LinkObject]:
    """Return neighbours, forwarding entries and routes of ours in the kernel."""
    state = node.state("flannel.1")
    return {*state.neighbours, *state.fdb, *state.routes}


def settle(node: EtcdNode, peers: Peers, what: str, seconds: float = 10.0) -> None:
    """Wait until the kernel holds exactly what the oracle says."""
    limit = Patience(seconds)
    while (found := held(node)) != (wanted := peers.expected()):
        missing, extra = sorted(map(str, wanted - found))[:5], sorted(map(str, found - wanted))[:5]
        assert not limit.over, f"{what}: missing {missing}, too much {extra}\n{node.log[-3000:]}"
        time.sleep(0.05)


# -- 200 peers -----------------------------------------------------------------------------------------------------------

DAMAGE = (
    "ip route flush proto 157",
    "ip neigh flush dev flannel.1 nud permanent",
    "ip link set flannel.1 address 02:00:00:00:00:99",
    "ip link del flannel.1",
)


def test_churn(nodes: ExitStack, netns: str, server: EtcdServer, tmp_path: Path) -> None:
    """Two hundred peers join, change and leave while etcd, the agent and the kernel's state are lost and found: all settles."""
    peers, subnets = Peers(server, 1), range(20, 220)
    server.put("subnets/10.5.1.0-24", '{"PublicIP":"192.168.1.1"}')
    peers.fill(range(20, 120))
    node = make_node(nodes, netns, tmp_path, server, **NETWORK)
    settle(node, peers, "a hundred at once")
    (link,) = node.state("flannel.1").links
    for round_ in range(4):
        peers.change(30, subnets)
        server.stop()
        server.start()
        peers.change(30, subnets)
        server.stop()
        wait_for(lambda: node.status().lease.lost_since, "the loss")
        server.start(port=12379)  # where the agent does not look
        peers.change(40, subnets)
        server.ctl("compact", str(server.revision()))
        run(netns, DAMAGE[round_])
        server.stop()
        if round_ % 2:
            node.kill()
            node.start()
        # How much of the last changes it saw before the end is chance; that it stands by them is not.
        wait_for(lambda: held(node) == remembered(node) != set(), f"repaired without etcd: {DAMAGE[round_]}")
        server.start()
        peers.change(10, subnets)
    peers.fill(subnets)
    settle(node, peers, "in the end")
    assert node.state("flannel.1").links == (link,)
    told = {f"10.5.{subnet}.0/24": ip_of(address) for subnet, (address, _) in peers.held.items()}
    wait_for(lambda: {p.pod_cidrs[0]: p.public_ip for p in node.status().peers} == told, "the peers in the status")
    wait_for(lambda: node.status().synced and not node.status().lease.lost_since, "in sync")
    status = node.status()
    assert (status.lease.subnets, status.lease.until) == (("10.5.1.0/24",), 0)
    assert status.problems == ()


def run(space: str, words: str) -> None:
    """Run a command in a namespace."""
    namespaces.run(space, words.split())


# -- repair --------------------------------------------------------------------------------------------------------------


def test_uplink_made_anew(nodes: ExitStack, netns: str, server: EtcdServer, tmp_path: Path) -> None:
    """When the uplink is taken away and made anew, link, neighbours, entries and routes are back as they were."""
    peers = Peers(server, 4)
    peers.fill(range(20, 25))
    node = make_node(nodes, netns, tmp_path, server, **NETWORK)
    settle(node, peers, "five peers")
    (link,) = node.state("flannel.1").links
    run(netns, "ip link del eth0")
    wait_for(lambda: not node.state("flannel.1").links, "the kernel takes the tunnel along")
    peers.change(5, range(20, 30))
    wait_for(lambda: any("no link eth0" in p for p in node.status().problems), "the problem")
    node.make_uplink()
    settle(node, peers, "the new uplink", 5.0)
    assert node.state("flannel.1").links == (link,)
    wait_for(lambda: node.status().synced, "in sync")


def test_one_bad_peer_delays_nobody(nodes: ExitStack, netns: str, server: EtcdServer, tmp_path: Path) -> None:
    """A peer whose route the kernel refuses is told, and the others come and go as fast as without it."""
    with inside(netns):
        etcd = EtcdClient(server.options)
        etcd.put(f"{PREFIX}/subnets/10.5.66.0-24", host_gw("192.168.1.255"))
        node = make_node(nodes, netns, tmp_path, server, Network="10.5.0.0/16", Backend={"Type": "host-gw"})
        wait_for(lambda: any("10.5.66.0/24" in error for error in node.status().errors), "the refusal")
        for i in range(20, 40):
            started = time.monotonic()
            etcd.put(f"{PREFIX}/subnets/10.5.{i}.0-24", host_gw(f"192.168.1.{i}"))
            route = f"10.5.{i}.0/24 via 192.168.1.{i} dev eth0 proto 157"
            wait_for(lambda route=route: route in map(str, node.state().routes), route)
            assert time.monotonic() - started < 1
        etcd.delete(f"{PREFIX}/subnets/10.5.66.0-24")
        wait_for(lambda: node.status().synced, "in sync")


def host_gw(ip: str) -> str:
    """Return what flanneld writes with the backend host-gw."""
    return f'{{"PublicIP":"{ip}","PublicIPv6":null,"BackendType":"host-gw"}}'


def test_both_families(nodes: ExitStack, netns: str, server: EtcdServer, tmp_path: Path) -> None:
    """With IPv6 a node has a subnet of each family in one key, and a peer of flannel's is one in both."""
    mac = {4: "02:00:00:00:00:04", 6: "02:00:00:00:00:06"}
    server.put(
        "subnets/10.5.9.0-24&fc00:0:0:9::-64",
        '{"PublicIP":"192.168.1.9","PublicIPv6":"fd00:1::9","BackendType":"vxlan",'
        f'"BackendData":{{"VNI":1,"VtepMAC":"{mac[4]}"}},"BackendV6Data":{{"VNI":1,"VtepMAC":"{mac[6]}"}}}}',
    )
    dual = {**NETWORK, "EnableIPv6": True, "IPv6Network": "fc00::/48"}
    node = make_node(nodes, netns, tmp_path, server, **dual)
    run(netns, "ip addr add fd00:1::1/64 dev eth0 nodad")
    wait_for(lambda: len(node.state().routes) == 2, f"two routes: {node.log}")
    state = node.state("flannel.1", "flannel-v6.1")
    assert [str(route).split()[0] for route in state.routes] == ["10.5.9.0/24", "fc00:0:0:9::/64"]
    assert {(one.link, one.mac, str(one.destination)) for one in state.fdb} == {
        ("flannel.1", mac[4], "192.168.1.9"),
        ("flannel-v6.1", mac[6], "fd00:1::9"),
    }
    v4, v6 = wait_for(lambda: node.status().lease.subnets, "the lease in the status")
    (key,) = [name for name in server.entries() if "&fc00:0:0:9::" not in name]
    assert key == f"subnets/{v4}&{v6}".replace("/24", "-24").replace("/64", "-64")
    assert f"FLANNEL_IPV6_SUBNET={v6.replace('::/', '::1/')}\n" in node.subnet_file.read_text()


# -- a node that boots ---------------------------------------------------------------------------------------------------


def test_boot_without_etcd(nodes: ExitStack, netns: str, server: EtcdServer, tmp_path: Path) -> None:
    """After a reboot while etcd is away, subnet.env, link, routes and masquerading are there as they were, and status says so."""
    peers = Peers(server, 2)
    peers.fill(range(20, 30))
    node = make_node(nodes, netns, tmp_path, server, **NETWORK, ipMasq=True, publicIP="203.0.113.1")
    settle(node, peers, "ten peers")
    wait_for(lambda: node.status().synced, "in sync")
    before, text, (subnet,) = node.state("flannel.1"), node.subnet_file.read_text(), node.status().lease.subnets
    assert server.entries()[f"subnets/{subnet.replace('/', '-')}"].startswith('{"PublicIP":"203.0.113.1",')
    masquerade = rules(netns)
    assert f"FLANNEL_SUBNET={subnet.replace('.0/', '.1/')}\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n" in text
    node.kill()
    server.stop()
    for words in ("ip link del flannel.1", "iptables-legacy -F", "iptables-legacy -t nat -F"):
        run(netns, words)
    node.subnet_file.unlink()
    started = time.monotonic()
    node.start()
    wait_for(lambda: node.state("flannel.1") == before, f"routes: {node.log}", 5.0)
    wait_for(lambda: rules(netns) == masquerade, "masquerading", 5.0)
    assert (node.subnet_file.read_text(), time.monotonic() - started < 5) == (text, True)
    wait_for(lambda: "Connection refused" in node.text(), "why etcd is lost")
    assert f"lease     {subnet}, until 20" in node.text()
    assert "etcd      LOST" in node.text()
    server.start()
    wait_for(lambda: f"etcd      answers at {server.url}" in node.text(), "etcd")
    assert node.state("flannel.1") == before


def rules(space: str) -> list[str]:
    """Return flannel's rules in the kernel."""
    return [line for line in namespaces.run(space, ["iptables-legacy", "-t", "nat", "-S"]).splitlines() if "flanneld" in line]


def test_network_found_later(nodes: ExitStack, netns: str, server: EtcdServer, tmp_path: Path) -> None:
    """An agent that knows no network waits for etcd to say it, starts anew in the same process, and has it ever after."""
    peers = Peers(server, 3)
    peers.fill(range(20, 23))
    server.stop()
    node = make_node(nodes, netns, tmp_path, server)
    assert node.status().pending == ("lease",)
    server.start()
    wait_for(lambda: node.status().problems and not node.status().lease.lost_since, "the problem")
    assert f"etcd {PREFIX}/config: is not there, and the configuration file says no Network" in node.text()
    assert not node.status().synced
    pid = node.status().pid
    server.put("config", '{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}')
    settle(node, peers, "three peers")
    assert node.status().pid == pid
    assert "etcd says a network: starting anew" in node.log
    wait_for(lambda: node.status().synced and node.status().overlay == "vxlan", "in sync")
    server.put("config", '{"Network":"10.6.0.0/16"}')
    words = "Network differ from what runs here; Network there is 10.6.0.0/16: restart the agent to take it"
    wait_for(lambda: words in node.text(), "the difference")
    assert held(node) == peers.expected()
