"""Connection tracking, addresses and sysctls of a real kernel."""

from __future__ import annotations

import socket
import subprocess
from ipaddress import ip_address

import pytest

from kernelstate.errors import KernelRefusedError, MissingFeatureError
from kernelstate.linux import sysctl
from kernelstate.linux.addresses import Addresses
from kernelstate.linux.conntrack import Conntrack
from kernelstate.linux.iptables import IptablesPort
from kernelstate.objects.address import Family, Prefix
from kernelstate.ports import ConntrackEntry

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("in_netns")]


def number(text: str) -> int:
    return int(ip_address(text))


@pytest.mark.parametrize(("family", "service", "backend"), [(4, "127.0.0.53", "127.0.0.1"), (6, "fd00::53", "::1")])
def test_dump_and_delete_exact_flows(family: Family, service: str, backend: str) -> None:
    """A UDP flow shows what was sent and who answers after DNAT; deleting it deletes that one and counts only what was there."""
    if family == 6:
        subprocess.run(["ip", "-6", "route", "add", "local", "fd00::53/128", "dev", "lo"], check=True, timeout=120)
    target = f"{backend}:5353" if family == 4 else f"[{backend}]:5353"
    IptablesPort("legacy").apply(
        family, f"*nat\n-A OUTPUT -p udp -m udp --dport 53 -j DNAT --to-destination {target}\nCOMMIT\n"
    )
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    ports = []
    with (
        socket.socket(kind, socket.SOCK_DGRAM) as server,
        socket.socket(kind, socket.SOCK_DGRAM) as one,
        socket.socket(kind, socket.SOCK_DGRAM) as two,
    ):
        server.bind((backend, 5353))
        for client in (one, two):
            client.connect((service, 53))
            client.send(b"?")
            ports.append(client.getsockname()[1])
        source = one.getsockname()[0]
    table = Conntrack()
    flows = {entry.source_port: entry for entry in table.entries(family, "udp") if entry.source_port in ports}
    assert flows[ports[0]] == ConntrackEntry(
        family, "udp", number(source), number(service), ports[0], 53, number(backend), 5353
    )
    assert table.entries(family, "tcp") == []
    first = flows[ports[0]]
    assert table.delete([first, first]) == 1
    assert [entry.source_port for entry in table.entries(family, "udp") if entry.source_port in ports] == [ports[1]]
    assert table.delete([first]) == 0
    assert table.delete([]) == 0


def test_many_flows_are_deleted_in_batches() -> None:
    """More flows than fit one batch are dumped and deleted, every one."""
    IptablesPort("legacy").apply(
        4, "*nat\n-A OUTPUT -p udp -m udp --dport 53 -j DNAT --to-destination 127.0.0.1:5353\nCOMMIT\n"
    )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for host in range(1, 201):
            client.sendto(b"?", (f"127.0.1.{host}", 53))
    table = Conntrack()
    flows = [entry for entry in table.entries(4, "udp") if entry.destination_port == 53]
    assert len(flows) == 200
    assert table.delete(flows) == 200
    assert [entry for entry in table.entries(4, "udp") if entry.destination_port == 53] == []


def test_local_addresses_are_those_of_links_that_are_up() -> None:
    """Addresses of links that are up are listed as host prefixes, those of a link that is down are not."""
    for command in (
        "ip link add np0 type veth peer name np1",
        "ip addr add 10.9.0.1/24 dev np0",
        "ip addr add 10.9.1.1 peer 10.9.1.2/32 dev np0",
        "ip addr add fd09::1/64 dev np0 nodad",
        "ip link set np0 addrgenmode none up",
        "ip addr add 10.9.2.1/24 dev np1",
    ):
        subprocess.run(command.split(), check=True, timeout=120)
    assert Addresses().local_addresses() == [
        ("lo", Prefix.parse("127.0.0.1")),
        ("lo", Prefix.parse("::1")),
        ("np0", Prefix.parse("10.9.0.1")),
        ("np0", Prefix.parse("10.9.1.1")),
        ("np0", Prefix.parse("fd09::1")),
    ]


def test_sysctls_of_this_namespace() -> None:
    """Writing says whether it changed something; what is missing or refused says so by name."""
    assert sysctl.write("net.ipv4.ip_forward", 1)
    assert not sysctl.write("net/ipv4/ip_forward", 1)
    assert sysctl.read("net.ipv4.ip_forward") == "1"
    with pytest.raises(MissingFeatureError, match=r"sysctl net\.ipv4\.nonsense is not available here"):
        sysctl.read("net.ipv4.nonsense")
    with pytest.raises(KernelRefusedError, match=r"write sysctl net\.ipv4\.ip_default_ttl = 70000: Invalid argument"):
        sysctl.write("net.ipv4.ip_default_ttl", 70000)
    with pytest.raises(ValueError, match="not a sysctl name"):
        sysctl.read("../etc/passwd")
