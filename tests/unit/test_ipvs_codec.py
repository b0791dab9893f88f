"""IPVS over generic netlink, without a kernel: bytes as pyroute2 reads and writes them, and how requests are framed."""

import errno
import os
import struct

import pytest
from pyroute2.netlink.generic.ipvs import ipvsmsg

from kernelstate.diff_ipvs import IpvsChange
from kernelstate.errors import MissingFeatureError
from kernelstate.linux import ipvs
from kernelstate.linux.generic_netlink import BATCH, GenericSocket
from kernelstate.linux.rtnetlink import HEADER, attribute, number
from kernelstate.objects.ipvs import RealServer, ServerKey, VirtualServer
from kernelstate.reconcile_ipvs import SeenReal

WEB = ServerKey(4, "tcp", 0x0A600001, 443)
DNS6 = ServerKey(6, "udp", (0xFD96 << 112) + 10, 53)
REAL = RealServer(0x0AF40102, 8443, 1)
REAL6 = RealServer((0xFD00 << 112) + 2, 5353, 7)


def understood(command, payload):
    """Return a request as pyroute2 reads it: {attribute: value or the same}."""
    body = struct.pack("=BBxx", command, 1) + payload
    message = ipvsmsg(HEADER.pack(HEADER.size + len(body), 30, 5, 1, 0) + body)
    message.decode()
    assert (message["cmd"], message["version"]) == (command, 1)
    return {name: dict(value["attrs"]) for name, value in message["attrs"]}


def test_virtual_server_as_pyroute2_reads_it():
    """A virtual server's address, scheduler, persistence, flags with full mask, and netmask arrive as meant."""
    server = VirtualServer("mh", (), 10800, by_port=True)
    ((command, payload),) = ipvs.requests_of([IpvsChange("add server", WEB, server)])
    assert understood(command, payload) == {
        "IPVS_CMD_ATTR_SERVICE": {
            "IPVS_SVC_ATTR_AF": 2,
            "IPVS_SVC_ATTR_PROTOCOL": 6,
            "IPVS_SVC_ATTR_ADDR": "10.96.0.1",
            "IPVS_SVC_ATTR_PORT": 443,
            "IPVS_SVC_ATTR_SCHED_NAME": "mh",
            "IPVS_SVC_ATTR_FLAGS": {"flags": 0x11, "mask": 0xFFFFFFFF},
            "IPVS_SVC_ATTR_TIMEOUT": 10800,
            "IPVS_SVC_ATTR_NETMASK": "255.255.255.255",
        }
    }


def test_real_server_as_pyroute2_reads_it():
    """A real server arrives masqueraded, without thresholds, behind nothing but the key of its virtual server."""
    ((command, payload),) = ipvs.requests_of([IpvsChange("add real", DNS6, None, REAL6)])
    assert understood(command, payload) == {
        "IPVS_CMD_ATTR_SERVICE": {
            "IPVS_SVC_ATTR_AF": 10,
            "IPVS_SVC_ATTR_PROTOCOL": 17,
            "IPVS_SVC_ATTR_ADDR": "fd96::a",
            "IPVS_SVC_ATTR_PORT": 53,
        },
        "IPVS_CMD_ATTR_DEST": {
            "IPVS_DEST_ATTR_ADDR_FAMILY": 10,
            "IPVS_DEST_ATTR_ADDR": "fd00::2",
            "IPVS_DEST_ATTR_PORT": 5353,
            "IPVS_DEST_ATTR_FWD_METHOD": 0,
            "IPVS_DEST_ATTR_WEIGHT": 7,
            "IPVS_DEST_ATTR_U_THRESH": 0,
            "IPVS_DEST_ATTR_L_THRESH": 0,
        },
    }


def test_netmask_of_ipv6_is_a_prefix_length():
    """IPVS takes the netmask of an IPv6 server as a number of bits: 128 in the machine's order."""
    payload = ipvs.server_payload(DNS6, VirtualServer("rr", (), 60))
    assert attribute(ipvs.SVC_NETMASK, struct.pack("=I", 128)) in payload


@pytest.mark.parametrize(
    ("verb", "command"),
    [("add server", 1), ("set server", 2), ("delete server", 3), ("add real", 5), ("set real", 6), ("delete real", 7)],
)
def test_command_of_each_verb(verb, command):
    """Each verb is the command that ip_vs.h numbers so."""
    server = VirtualServer("rr", ()) if verb in {"add server", "set server"} else None
    real = REAL if verb.endswith("real") else None
    assert ipvs.requests_of([IpvsChange(verb, WEB, server, real)])[0][0] == command


@pytest.mark.parametrize("key", [WEB, DNS6])
@pytest.mark.parametrize("server", [VirtualServer("rr", ()), VirtualServer("sh", (), 600, by_port=True)])
def test_server_reads_back(key, server):
    """What is written of a virtual server reads back the same."""
    assert ipvs.read_server(ipvs.server_payload(key, server)) == (key, server)


@pytest.mark.parametrize(("key", "real"), [(WEB, REAL), (DNS6, REAL6)])
def test_real_server_reads_back(key, real):
    """What is written of a real server reads back the same, with its connections."""
    payload = ipvs.real_payload(key, real)
    counted = payload[4:] + number(ipvs.DEST_ACTIVE, 3) + number(ipvs.DEST_INACTIVE, 2)
    message = ipvs.key_payload(key) + attribute(ipvs.ATTR_DEST | ipvs.NESTED, counted)
    assert ipvs.read_real(message, 4 if key.family == 4 else 16) == SeenReal(*real, 3, 2)


def service(*extra):
    inner = ipvs.key_attributes(WEB) + attribute(ipvs.SVC_SCHED, b"rr\0") + b"".join(extra)
    return attribute(ipvs.ATTR_SERVICE | ipvs.NESTED, inner)


def flags(value):
    return attribute(ipvs.SVC_FLAGS, struct.pack("=II", value, 0xFFFFFFFF))


WHOLE = attribute(ipvs.SVC_NETMASK, b"\xff\xff\xff\xff")


@pytest.mark.parametrize(
    "extra",
    [
        (flags(0x2 | 0x4), WHOLE),  # one packet
        (flags(0x2 | 0x8), WHOLE),  # fallback of sh and mh
        (flags(0x3), number(ipvs.SVC_TIMEOUT, 60), attribute(ipvs.SVC_NETMASK, b"\xff\xff\xff\0")),
        (flags(0x2), WHOLE, attribute(ipvs.SVC_PE, b"sip\0")),
    ],
)
def test_what_we_never_set_equals_nothing(extra):
    """A server with a flag, netmask or engine of somebody else's making differs from every server that is desired."""
    _, server = ipvs.read_server(service(*extra))
    assert server.scheduler.startswith("rr flags 0x")


def test_firewall_mark_servers_are_not_ours():
    """A virtual server that is known by a firewall mark has no address, and is passed over."""
    inner = number(ipvs.SVC_FWMARK, 7) + struct.pack("=HHH2x", 6, ipvs.SVC_AF, 2)
    assert ipvs.read_server(attribute(ipvs.ATTR_SERVICE, inner)) is None


class Kernel:
    """A socket with a kernel behind it that knows the family IPVS as 30 and fails the requests it is told to."""

    def __init__(self, failing=(), family=30):
        self.failing, self.family = dict(failing), family
        self.datagrams, self.waiting, self.seen = [], [], 0
        self.closed = False

    def send(self, data):
        self.datagrams.append(data)
        position = 0
        while position < len(data):
            length, kind, flags, sequence, _ = HEADER.unpack_from(data, position)
            position += length
            if kind == 0x10 and self.family:
                body = struct.pack("=BBxx", 1, 2) + attribute(1, struct.pack("=H", self.family))
                self.waiting.append(HEADER.pack(HEADER.size + len(body), 0x10, 0, sequence, 0) + body)
                continue
            code = errno.ENOENT if kind == 0x10 else self.failing.get(self.seen, 0)
            self.seen += kind != 0x10
            if code or flags & 0x4:
                answer = struct.pack("=i", -code) + data[position - length : position - length + HEADER.size]
                self.waiting.append(HEADER.pack(HEADER.size + len(answer), 2, 0x100, sequence, 0) + answer)

    def recv(self, _size):
        return self.waiting.pop(0)

    def close(self):
        self.closed = True


def test_only_the_last_of_a_datagram_is_acknowledged():
    """A thousand requests that go well travel in three datagrams and cost three answers."""
    kernel = Kernel()
    generic = GenericSocket("IPVS", 1, lambda: kernel)
    kernel.datagrams.clear()
    assert generic.execute([(5, b"")] * 1000) == [0] * 1000
    assert [len(d) // 20 for d in kernel.datagrams] == [BATCH, BATCH, 1000 - 2 * BATCH]
    assert kernel.waiting == []


def test_each_failure_meets_its_request():
    """Errors in the middle, at the end and at the start of a batch come back at the place of the request they are about."""
    failing = {0: errno.EEXIST, 7: errno.ESRCH, BATCH - 1: errno.ENOENT, BATCH: errno.EEXIST, 999: errno.ENOENT}
    generic = GenericSocket("IPVS", 1, lambda: Kernel(failing))
    assert {i: code for i, code in enumerate(generic.execute([(5, b"")] * 1000)) if code} == failing


def test_missing_family_is_a_missing_feature():
    """A kernel without IPVS is told by name, and the socket is closed."""
    kernel = Kernel(family=0)
    with pytest.raises(MissingFeatureError, match="ipvs is not available here"):
        GenericSocket("IPVS", 1, lambda: kernel)
    assert kernel.closed


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (IpvsChange("delete server", WEB), errno.ESRCH, ""),
        (IpvsChange("delete real", WEB, None, REAL), errno.ENOENT, ""),
        (IpvsChange("add server", WEB, VirtualServer("np", ())), errno.ENOENT, "no scheduler np in this kernel"),
        (IpvsChange("set real", WEB, None, REAL), errno.ENOENT, os.strerror(errno.ENOENT)),
    ],
)
def test_what_an_errno_means(change, code, words):
    """Deleting what is gone is success; a missing scheduler is called one."""
    assert ipvs._judged(change, code) == words
