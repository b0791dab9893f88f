"""What each policy does to which flows, and when; what fails is tried again."""

from ipaddress import ip_address

import pytest

from kernelstate.errors import KernelRefusedError
from kernelstate.objects.address import Prefix
from kernelstate.ports import ConntrackEntry
from nodeplane.flows import FlowKeeper, refusing_address
from proxy.conntrack import StaleFlows
from proxy.settings import ProxySettings
from proxy.table import Backend, Frontend, Kind, PortName, ServiceEntry

NODE_IP = "192.168.1.1"
LOCAL = frozenset({Prefix.parse(NODE_IP), Prefix.parse("192.168.9.9")})


def number(ip):
    return int(ip_address(ip))


class Flows:
    """A connection tracking table in memory; ``log`` is what was done to which protocol's flows."""

    def __init__(self, *entries):
        self.held = list(entries)
        self.log = []
        self.fail = set()

    def entries(self, family, protocol):
        if protocol in self.fail:
            raise KernelRefusedError("dump", f"{protocol} conntrack entries", "Device or resource busy")
        return [e for e in self.held if (e.family, e.protocol) == (family, protocol)]

    def delete(self, entries):
        return self._end("deleted", entries)

    def reset(self, entries, refuser):
        return self._end(f"reset from {ip_address(refuser)}", entries)

    def _end(self, how, entries):
        self.held = [e for e in self.held if e not in entries]
        self.log += [(how, e.protocol) for e in entries]
        return len(entries)


def flow(protocol):
    """Make a flow to 10.96.0.10:80 that 10.244.2.7 answers."""
    return ConntrackEntry(
        4, protocol, number("10.244.1.5"), number("10.96.0.10"), 40000, 80, number("10.244.2.7"), 80, stage="open"
    )


def service(protocol, *pods):
    backends = tuple(Backend(f"{p}:80", ip_address(p), 80) for p in pods)
    frontends = (Frontend(Kind.CLUSTER_IP, ip_address("10.96.0.10"), 80),)
    return ServiceEntry(PortName("ns", "web", "p", protocol), 4, frontends, cluster=backends, serving=backends)


PROTOCOLS = ("UDP", "TCP", "SCTP")


def removal(policy, *protocols):
    """Return what a change notes that takes the last endpoint from a Service."""
    stale = StaleFlows(frozenset({"UDP"} if policy == "keep" else PROTOCOLS))
    for protocol in protocols:
        stale.note([service(protocol, "10.244.2.7")], [service(protocol)])
    return stale


TOLD = f"reset from {NODE_IP}"


@pytest.mark.parametrize(
    ("policy", "at_once", "after_30_s"),
    [
        ("keep", [("deleted", "udp")], []),
        ("drain", [("deleted", "udp")], [(TOLD, "sctp"), (TOLD, "tcp")]),
        ("reset", [("deleted", "udp"), (TOLD, "sctp"), (TOLD, "tcp")], []),
    ],
)
def test_policies(policy, at_once, after_30_s):
    """UDP flows go at once under each policy; connections stay, or are reset, at once or when their time is over."""
    table = Flows(*(flow(p.lower()) for p in PROTOCOLS))
    keeper = FlowKeeper(table, ProxySettings(flows_to_removed=policy, drain_seconds=30))
    keeper.take(removal(policy, *PROTOCOLS), 100)
    assert keeper.sync(LOCAL, 100).changed == len(at_once)
    assert table.log == at_once
    assert keeper.next_due == (130 if after_30_s else None)
    table.log.clear()
    keeper.sync(LOCAL, 129)
    assert table.log == []
    keeper.sync(LOCAL, 130)
    assert table.log == after_30_s
    assert keeper.next_due is None


def test_failures_are_tried_again():
    """What the kernel refuses is an error line and stays due; one protocol's failure does not hold up another's."""
    table = Flows(flow("udp"), flow("tcp"))
    table.fail = {"udp"}
    keeper = FlowKeeper(table, ProxySettings(flows_to_removed="reset"))
    keeper.take(removal("reset", "UDP", "TCP"), 100)
    report = keeper.sync(LOCAL, 100)
    assert (report.changed, report.errors) == (1, ("dump udp conntrack entries: Device or resource busy",))
    assert [e.protocol for e in table.held] == ["udp"]
    table.fail = set()
    assert keeper.sync(LOCAL, 101).changed == 1
    assert keeper.sync(LOCAL, 102).changed == 0


def test_no_dump_without_need():
    """Where nothing went, the table is not read."""
    table = Flows()
    table.fail = {"udp", "tcp", "sctp"}
    keeper = FlowKeeper(table, ProxySettings(flows_to_removed="drain", drain_seconds=30))
    keeper.take(removal("drain", "TCP"), 100)
    assert keeper.sync(LOCAL, 101).ok


def test_without_an_address_flows_are_only_deleted():
    """A node without an address of the family cannot tell the client; the flow goes all the same."""
    table = Flows(flow("tcp"))
    keeper = FlowKeeper(table, ProxySettings(flows_to_removed="reset"))
    keeper.take(removal("reset", "TCP"), 100)
    keeper.sync(frozenset(), 100)
    assert table.log == [("deleted", "tcp")]


@pytest.mark.parametrize(
    ("family", "local", "expected"),
    [
        (4, ["192.168.9.9", "192.168.1.1"], "192.168.1.1"),
        (6, ["192.168.1.1", "fe80::1", "fd00::1"], "fd00::1"),
        (6, ["192.168.1.1", "fe80::1"], None),
    ],
)
def test_refusing_address(family, local, expected):
    """Clients are told from the node's first address of the family that is good beyond one link."""
    found = refusing_address(family, frozenset(Prefix.parse(a) for a in local))
    assert found == (None if expected is None else number(expected))
