"""Consistent hashing through a real kernel: the endpoint it takes is the one the simulated table says, client by client."""

from __future__ import annotations

import socket
import subprocess
from ipaddress import ip_address

import pytest

from kernelstate.linux.conntrack import Conntrack
from kernelstate.objects.nftables import TableKey
from kernelstate.simulate import Packet
from kernelstate.simulate_nftables import NftablesSimulator
from kernelstate.text.nft import print_table
from proxy.render.nftables import TABLE
from proxy.render.nftables_program import render_nftables
from proxy.settings import NodeFacts, ProxySettings
from proxy.table import Backend, Frontend, Kind, PortName, ServiceEntry, ServiceTable

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("in_netns")]

CLIENTS = 200
IPV6_FREEBIND = 78
"""linux/in6.h; not in Python's socket module."""
NETWORKS = {4: ("10.50.0.0/16", "10.244.0.0/16"), 6: ("fd50::/64", "fd44::/64")}


def addresses(family, network, count):
    first = int(ip_address(NETWORKS[family][network].partition("/")[0]))
    return [ip_address(first + 1 + n) for n in range(count)]


def run(*words):
    subprocess.run(words, check=True, timeout=120)


@pytest.mark.parametrize("family", [4, 6])
def test_the_kernel_hashes_as_we_do(family):
    """Two hundred clients of a hashed Service of five endpoints each meet the endpoint that the simulator computes."""
    word = "-4" if family == 4 else "-6"
    clients, pods = NETWORKS[family]
    run("ip", word, "route", "add", "local", clients, "dev", "lo")  # any address in it may be bound
    run("ip", "link", "add", "pods", "up", "type", "veth", "peer", "name", "far")  # IPv6 takes a route over lo for a refusal
    run("ip", "link", "set", "far", "up")
    for reached in (pods, "10.96.0.1/32" if family == 4 else "fd96::1/128"):
        run("ip", word, "route", "add", reached, "dev", "pods")
    vip = ip_address("10.96.0.1" if family == 4 else "fd96::1")
    pool = tuple(Backend(f"pod-{n}", a, 8080) for n, a in enumerate(addresses(family, 1, 5)))
    entry = ServiceEntry(
        PortName("ns", "web", "", "UDP"),
        family,
        (Frontend(Kind.CLUSTER_IP, vip, 80),),
        cluster=pool,
        has_any=True,
        consistent=True,
    )
    tables = render_nftables(ServiceTable({("ns", "web"): (entry,)}), ProxySettings(), NodeFacts("n1"), (family,))
    text = print_table(TableKey(family, TABLE), tables[family])
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True, timeout=120)
    simulator = NftablesSimulator(tables, addresses(family, 0, CLIENTS))
    expected = {}
    for client in addresses(family, 0, CLIENTS):
        with socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as sender:
            if family == 6:
                sender.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)  # a local route alone is not enough here
            sender.bind((str(client), 0))
            sender.sendto(b"?", (str(vip), 80))
        (path,) = simulator.walk(Packet("udp", client, vip, 80, from_local=True))
        assert path.dnat is not None
        expected[int(client)] = int(path.dnat[0])
    met = {e.source: e.reply_source for e in Conntrack().entries(family, "udp") if e.destination == int(vip)}
    assert met == expected
    assert set(expected.values()) == {int(b.address) for b in pool}
