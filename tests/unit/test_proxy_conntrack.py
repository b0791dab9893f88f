"""Stale UDP flows are found on every way a backend can go, and nothing else is touched."""

from ipaddress import ip_address

import pytest

from kernelstate.objects.address import Prefix
from kernelstate.ports import ConntrackEntry
from proxy.conntrack import StaleFlows
from proxy.table import Backend, Frontend, Kind, PortName, ServiceEntry

NODE_IP = "192.168.1.1"
LOCAL = frozenset({Prefix.parse(NODE_IP + "/32")})


def number(ip):
    return int(ip_address(ip))


def dns(*pods, protocol="UDP"):
    """Make the entry of a DNS Service with a ClusterIP and a NodePort."""
    backends = tuple(Backend(f"{p}:53", ip_address(p), 53) for p in pods)
    return ServiceEntry(
        PortName("kube-system", "dns", "dns", protocol),
        4,
        (Frontend(Kind.CLUSTER_IP, ip_address("10.96.0.10"), 53), Frontend(Kind.NODE_PORT, None, 30053)),
        cluster=backends,
        has_any=bool(backends),
        serving=backends,
    )


def flow(destination, port, reply_source, reply_port=53):
    """Make a tracked UDP flow."""
    return ConntrackEntry(4, "udp", number("10.244.1.5"), number(destination), 40000, port, number(reply_source), reply_port)


VIA_CLUSTER_IP = flow("10.96.0.10", 53, "10.244.2.7")
VIA_NODE_PORT = flow(NODE_IP, 30053, "10.244.2.7")
VIA_LOCALHOST = flow("127.0.0.1", 30053, "10.244.2.7")
SOMEWHERE_ELSE = flow("198.51.100.9", 30053, "198.51.100.9", 30053)
NEVER_TRANSLATED = flow("10.96.0.10", 53, "10.96.0.10")
TO_THE_OTHER_POD = flow("10.96.0.10", 53, "10.244.2.8")
EVERYTHING = [VIA_CLUSTER_IP, VIA_NODE_PORT, VIA_LOCALHOST, SOMEWHERE_ELSE, NEVER_TRANSLATED, TO_THE_OTHER_POD]
GONE = [VIA_CLUSTER_IP, VIA_NODE_PORT, VIA_LOCALHOST]


@pytest.mark.parametrize(
    ("before", "after", "stale"),
    [
        ([dns("10.244.2.7", "10.244.2.8")], [dns("10.244.2.8")], [*GONE, NEVER_TRANSLATED]),
        ([dns("10.244.2.7")], [dns()], [*GONE, NEVER_TRANSLATED, TO_THE_OTHER_POD]),
        ([dns("10.244.2.7")], [], [*GONE, NEVER_TRANSLATED, TO_THE_OTHER_POD]),
        ([], [dns("10.244.2.7", "10.244.2.8")], [NEVER_TRANSLATED]),
        ([dns()], [dns("10.244.2.7", "10.244.2.8")], [NEVER_TRANSLATED]),
        ([dns("10.244.2.7")], [dns("10.244.2.7", "10.244.2.8")], []),
        ([dns("10.244.2.7", protocol="TCP")], [], []),
    ],
    ids=[
        "one of two goes",
        "the last one goes",
        "the Service goes",
        "the Service comes",
        "the first one comes",
        "one more comes",
        "TCP is left alone",
    ],
)
def test_stale(before, after, stale):
    """Flows to a frontend whose answerer no longer serves are stale; a flow to another host's port 30053 never is."""
    flows = StaleFlows()
    flows.note(before, after)
    assert flows.select(EVERYTHING, LOCAL) == stale


def test_after_a_restart_only_dead_flows_go():
    """A restarted agent compares the kernel's flows with what serves now, and spares those that are alive."""
    flows = StaleFlows()
    flows.note_all({("kube-system", "dns"): (dns("10.244.2.7"),)})
    assert flows.select(EVERYTHING, LOCAL) == [NEVER_TRANSLATED, TO_THE_OTHER_POD]


def test_later_change_wins():
    """A backend that comes back before the flush keeps its flows."""
    first, second = StaleFlows(), StaleFlows()
    first.note([dns("10.244.2.7")], [dns()])
    second.note([dns()], [dns("10.244.2.7")])
    first.merge(second)
    assert first.select([VIA_CLUSTER_IP], LOCAL) == []
