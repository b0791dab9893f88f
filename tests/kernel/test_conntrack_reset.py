"""Ending a connection of which only the tracking table is known: both ends are told, in a real kernel with real sockets."""

from __future__ import annotations

import socket
from contextlib import suppress
from ipaddress import ip_address

import pytest
from scapy.layers.sctp import (
    SCTP,
    SCTPChunkAbort,
    SCTPChunkCookieAck,
    SCTPChunkCookieEcho,
    SCTPChunkHeartbeatReq,
    SCTPChunkInit,
    SCTPChunkInitAck,
    SCTPChunkParamStateCookie,
)
from service_node import NODE_IPS, ServiceNode, end_of, eventually, pod_ip

from kernelstate.linux import netns
from kernelstate.linux.conntrack import Conntrack

pytestmark = pytest.mark.kernel

VIP = {4: "10.96.0.10", 6: "fd00:96::10"}
TOOL = {4: "iptables-nft", 6: "ip6tables-nft"}


@pytest.fixture
def rig(make_netns):
    """Yield a node with two pods."""
    made = ServiceNode(make_netns, pods=2)
    for tool in TOOL.values():  # also what keeps the kernel tracking once the last rule that translates is gone
        netns.run(made.node, [tool, "-A", "FORWARD", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP"])
    yield made
    made.close()


def translate(rig, address, target, *, protocol="tcp", masquerade=False):
    """Send port 80 of an address to port 8080 of a pod, by rules of nobody's; these are the only ones then."""
    family = ip_address(address).version
    to = f"{target}:8080" if family == 4 else f"[{target}]:8080"
    flush(rig, family)
    for chain in ("PREROUTING", "OUTPUT"):
        rule = ["-d", address, "-p", protocol, "--dport", "80", "-j", "DNAT", "--to-destination", to]
        netns.run(rig.node, [TOOL[family], "-t", "nat", "-A", chain, *rule])
    if masquerade:
        netns.run(rig.node, [TOOL[family], "-t", "nat", "-A", "POSTROUTING", "-d", target, "-j", "MASQUERADE"])


def flush(rig, family):
    netns.run(rig.node, [TOOL[family], "-t", "nat", "-F"])


def flows(rig, family, protocol="tcp"):
    """Return the tracked flows to port 80."""
    with netns.inside(rig.node):
        return [e for e in Conntrack().entries(family, protocol) if e.destination_port == 80]


def reset(rig, family, protocol="tcp"):
    """Reset every flow to port 80; return how many there were."""
    found = flows(rig, family, protocol)
    with netns.inside(rig.node):
        return Conntrack().reset(found, int(ip_address(NODE_IPS[family])))


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("client", ["pod", "outside, masqueraded", "node", "node to itself"])
@pytest.mark.parametrize("asked", [True, False], ids=["client waits", "client speaks"])
def test_both_ends_are_told(rig, family, client, asked):
    """Whoever the client is, it is reset with no rule left that knows the Service, and so is the backend.

    It hears it at once though it waits in silence; where the question to it is lost it hears it as soon as it speaks.
    """
    address = NODE_IPS[family] if client == "node to itself" else VIP[family]
    translate(rig, address, pod_ip(1, family), masquerade="masq" in client)
    server = rig.listen(1, 8080, family)
    space = {"pod": rig.pods[2], "outside, masqueraded": rig.outside}.get(client, rig.node)
    connection = rig.connect(space, address, 80)
    accepted = rig.accept(server)
    connection.sendall(b"before")
    assert accepted.recv(100) == b"before"
    accepted.sendall(b"answer")
    assert connection.recv(100) == b"answer"
    assert [flow.stage for flow in flows(rig, family)] == ["open"]
    flush(rig, family)
    if not asked:
        question = ["-p", "tcp", "--sport", "0", "--tcp-flags", "RST", "NONE"]
        netns.run(rig.node, [TOOL[family], "-A", "OUTPUT", *question, "-j", "DROP"])
    assert reset(rig, family) == 1
    if not asked:
        assert end_of(connection, 0.1) == "silence"
        connection.sendall(b"after")
    assert end_of(connection) == "reset"
    with suppress(ConnectionResetError):
        accepted.sendall(b"late")
    assert end_of(accepted) == "reset", "its client has no such connection, and says so"


def test_on_loopback(rig):
    """A connection from the node to a NodePort on 127.0.0.1 is reset on loopback."""
    netns.run(rig.node, ["sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1"])
    translate(rig, "127.0.0.1", pod_ip(1), masquerade=True)
    server = rig.listen(1, 8080)
    connection = rig.connect(rig.node, "127.0.0.1", 80)
    rig.accept(server)
    flush(rig, 4)
    assert reset(rig, 4) == 1
    assert end_of(connection) == "reset"


def test_opening_connection_goes_elsewhere(rig):
    """A client whose first packet met nobody is not reset: its next one is a new flow, and finds whom the rules now name."""
    netns.run(rig.pods[1], [TOOL[4], "-A", "INPUT", "-p", "tcp", "-j", "DROP"])
    translate(rig, VIP[4], pod_ip(1))
    server = rig.listen(2, 8080)
    client = rig.socket(rig.outside)
    client.setblocking(False)
    with pytest.raises(BlockingIOError):
        client.connect((VIP[4], 80))
    assert eventually(lambda: [flow.stage for flow in flows(rig, 4)]) == ["opening"]
    translate(rig, VIP[4], pod_ip(2))
    assert reset(rig, 4) == 1
    accepted = rig.accept(server)
    accepted.sendall(b"hello")
    assert eventually(lambda: received(client)) == b"hello"


def test_many_at_once(rig):
    """Some hundred connections, more than one batch of requests, are all reset, and one that was not named stays."""
    translate(rig, VIP[4], pod_ip(1))
    server = rig.listen(1, 8080)
    connections = []
    for _ in range(150):
        connections.append(rig.connect(rig.outside, VIP[4], 80))
        rig.accept(server).sendall(b"?")
    assert all(connection.recv(1) == b"?" for connection in connections)
    kept = connections.pop()
    found = [flow for flow in flows(rig, 4) if flow.source_port != kept.getsockname()[1]]
    with netns.inside(rig.node):
        assert Conntrack().reset(found, int(ip_address(NODE_IPS[4]))) == 149
    assert {end_of(connection) for connection in connections} == {"reset"}
    assert end_of(kept, 0.1) == "silence"


def test_over_is_over(rig):
    """A connection that both ends closed is told from one that lives."""
    translate(rig, VIP[4], pod_ip(1))
    server = rig.listen(1, 8080)
    connection = rig.connect(rig.outside, VIP[4], 80)
    accepted = rig.accept(server)
    connection.close()
    assert accepted.recv(1) == b""
    accepted.close()
    assert eventually(lambda: [f.stage for f in flows(rig, 4)] == ["over"])


def received(client):
    """Return what a socket that does not block has, or None."""
    with suppress(BlockingIOError):
        return client.recv(100)
    return None


class Association:
    """An SCTP association between two raw sockets, for kernels without SCTP sockets of their own."""

    PORT, CLIENT_TAG, SERVER_TAG = 40000, 0x11111111, 0x22222222

    def __init__(self, rig, address, pod):
        self.client = rig.socket(rig.outside, kind=socket.SOCK_RAW, protocol=socket.IPPROTO_SCTP)
        self.server = rig.socket(rig.pods[pod], kind=socket.SOCK_RAW, protocol=socket.IPPROTO_SCTP)
        self.address = address

    def send(self, tag, chunk):
        """Send a chunk as the client."""
        packet = SCTP(sport=self.PORT, dport=80, tag=tag) / chunk
        self.client.sendto(bytes(packet), (self.address, 0))

    def answer(self, to, tag, chunk):
        """Send a chunk as the server."""
        packet = SCTP(sport=8080, dport=self.PORT, tag=tag) / chunk
        self.server.sendto(bytes(packet), (to, 0))

    def open(self):
        """Shake hands."""
        cookie = SCTPChunkParamStateCookie(cookie=b"cook")
        self.send(0, SCTPChunkInit(init_tag=self.CLIENT_TAG, init_tsn=1))
        data, (client, _) = self.server.recvfrom(2000)
        assert SCTPChunkInit in SCTP(data[20:])
        self.answer(client, self.CLIENT_TAG, SCTPChunkInitAck(init_tag=self.SERVER_TAG, init_tsn=1, params=[cookie]))
        assert SCTPChunkInitAck in self.heard()
        self.send(self.SERVER_TAG, SCTPChunkCookieEcho(cookie=b"cook"))
        assert SCTPChunkCookieEcho in SCTP(self.server.recv(2000)[20:])
        self.answer(client, self.CLIENT_TAG, SCTPChunkCookieAck())
        assert SCTPChunkCookieAck in self.heard()

    def heard(self):
        """Return the next packet that the client gets."""
        return SCTP(self.client.recv(2000)[20:])


def test_sctp_is_aborted(rig):
    """A client gets an ABORT from the Service's address, under the tag that makes it believed; the backend hears no more of it."""
    translate(rig, VIP[4], pod_ip(1), protocol="sctp")
    association = Association(rig, VIP[4], 1)
    association.open()
    (flow,) = flows(rig, 4, "sctp")
    assert (flow.stage, flow.tags) == ("open", (Association.SERVER_TAG, Association.CLIENT_TAG))
    flush(rig, 4)
    assert reset(rig, 4, "sctp") == 1
    data, (source, _) = association.client.recvfrom(2000)
    packet = SCTP(data[20:])
    assert SCTPChunkAbort in packet
    assert (source, packet.sport, packet.tag) == (VIP[4], 80, Association.CLIENT_TAG)
    checked = SCTP(bytes(packet))
    checked.chksum = None
    assert SCTP(bytes(checked)).chksum == packet.chksum
    association.send(Association.SERVER_TAG, SCTPChunkHeartbeatReq())
    association.server.settimeout(0.2)
    with pytest.raises(TimeoutError):
        association.server.recv(2000)
