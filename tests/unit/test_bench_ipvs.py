"""``ipvs-in-vm`` without a machine: what is measured, what a first sync consists of, and how figures are set against each other."""

from __future__ import annotations

import msgspec
import pytest

from bench import cluster
from bench.handover import Handover, prepare
from bench.ipvs_in_vm import Node, plan, rows_of
from bench.packet_cost import TRAFFIC
from bench.result import Options, Row, value_of
from kernelstate.linux.ipvs import NEW_DEST, NEW_SERVICE
from kernelstate.objects.sets import SetSpec

ALL = ("iptables", "ipvs", "nftables")


def test_only_what_is_affordable_is_measured_unasked():
    """IPVS and nftables go up to 50,000 Services, iptables ends before; small clusters come first."""
    assert [(services, datapath.name) for services, datapath in plan(Options(modes=ALL))] == [
        *((n, name) for n in (10, 1_000) for name in ("iptables flat", "iptables", "ipvs", "nftables")),
        *((10_000, name) for name in ("iptables", "ipvs", "nftables")),
        *((50_000, name) for name in ("ipvs", "nftables")),
    ]


@pytest.mark.parametrize(
    ("services", "sizes"),
    [(10, [10, 10]), (4, [4, 4, 10, 10]), (60_000, [10, 10, 60_000, 60_000])],
)
def test_a_stated_size_is_compared_with_ten(services, sizes):
    """A stated size is measured in every datapath of the mode, and ten Services beside it."""
    assert [n for n, _ in plan(Options(services=services, modes=("iptables",)))] == sizes


def test_a_first_sync_goes_through_a_file(tmp_path):
    """Messages are in proportion to the cluster: one a virtual or real server, one an address; a file keeps all of it."""
    cluster.write_list(tmp_path / "cluster.json", 5)
    handover = prepare(tmp_path / "cluster.json", "ipvs", 5, {})
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(handover), type=Handover) == handover
    assert [command for command, _ in handover.servers] == 5 * [NEW_SERVICE, *cluster.ENDPOINTS * [NEW_DEST]]
    assert handover.addresses == tuple(cluster.service_address(i) for i in range(5))
    members = {one.spec: len(one.members) for one in handover.sets}
    assert members[SetSpec("KUBE-CLUSTER-IP", "hash:ip,port")] == 5
    assert handover.messages == {"sets": sum(members.values()), "servers": 20, "addresses": 5}
    assert ("net/ipv4/vs/conntrack", "1") in handover.sysctls
    assert "--match-set KUBE-CLUSTER-IP dst,dst" in handover.text
    assert handover.tables == ()


def test_the_flat_list_is_told_from_the_tree(tmp_path):
    """The settings reach the rules: without dispatching, each Service has its line in KUBE-SERVICES."""
    cluster.write_list(tmp_path / "cluster.json", 600)
    tree, flat = (prepare(tmp_path / "cluster.json", "iptables", 600, settings) for settings in ({}, {"dispatch_above": 0}))
    assert [sum("-j KUBE-SVC-" in line for line in lines_of(one, "KUBE-SERVICES")) for one in (tree, flat)] == [0, 600]


def lines_of(handover: Handover, chain: str) -> list[str]:
    """Return the rules of one chain."""
    return [line for line in handover.text.splitlines() if line.startswith(f"-A {chain} ")]


def node(datapath: str, services: int, apply: dict[str, float], each: float) -> Node:
    """Make a node where every kind of packet costs the same."""
    return Node(datapath, services, apply, dict.fromkeys(TRAFFIC, each))


NODES = [
    node("forwarding", 0, {}, 100.0),
    node("iptables", 10, {"rules": 8.0}, 300.0),
    node("ipvs", 10, {"servers": 3.0, "rules": 1.0}, 400.0),
    node("ipvs", 1_000, {"servers": 50.0, "rules": 1.0}, 440.0),
]
MESSAGES = {10: {"servers": 40}, 1_000: {"servers": 4_000}}


def test_growth_and_ratio_are_within_the_run():
    """A packet is set against the same at ten Services, a first sync against iptables-restore with the same cluster, if there was one."""
    rows = rows_of(NODES, MESSAGES, counted=True)
    new = [row for row in rows if row.name == "new"]
    assert new == [
        Row("new", "none", {"datapath": "forwarding"}, "instructions per packet", 100.0, "instructions"),
        Row("new", "iptables", {"datapath": "iptables", "services": 10}, "instructions per packet", 300.0, "instructions"),
        Row("new", "ipvs", {"datapath": "ipvs", "services": 10}, "instructions per packet", 400.0, "instructions"),
        Row(
            "new",
            "ipvs",
            {"datapath": "ipvs", "services": 1_000, "baseline": "same at 10 services"},
            "instructions per packet",
            440.0,
            "instructions",
            1.1,
        ),
    ]
    applied = {(row.mode, row.params["services"]): row.baseline_ratio for row in rows if row.metric == "kernel apply"}
    assert applied == {("iptables", 10): None, ("ipvs", 10): 0.5, ("ipvs", 1_000): None}
    assert value_of(rows, "first sync", "kernel apply, servers", services=1_000) == 50.0
    assert value_of(rows, "first sync", "sent, servers", services=1_000) == 4_000


def test_time_is_called_time():
    """Where nothing counts instructions, figures are CPU time."""
    units = {(row.metric, row.unit) for row in rows_of(NODES[:2], {}, counted=False)}
    assert units == {("kernel apply", "ms"), ("CPU per packet", "ns")}
