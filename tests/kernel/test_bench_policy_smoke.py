"""The benchmarks of policies measure nodes on which policies are in force; what is counted is checked here, never what it costs."""

from __future__ import annotations

import argparse
import os
from ipaddress import IPv4Address

import pytest

from bench import policies, policy_change, policy_connect, policy_layouts, policy_verdict, run
from bench.injection import Clients, open_injector, open_road
from bench.policies import client_address
from bench.policy_layouts import chains_text, write_chains
from bench.result import Options, value_of
from kernelstate.linux import netns
from nodeplane.commands import Failed

pytestmark = pytest.mark.kernel

NFTABLES = Options(modes=("nftables",))


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = set(netns.names())
    yield
    assert not {n for n in set(netns.names()) - before if n.startswith(f"np-bench-{os.getpid()}-")}


def test_clients_are_those_that_were_asked_for():
    """Packets of 2^bits clients in turn come from addresses so far apart, and each reaches the pod that belongs to it."""
    with open_injector() as injector, open_road(injector, "192.168.60.1/32") as road:
        policy_layouts.track(road.node)
        clients = Clients(client_address(0), bits=3, stride=2)
        sent = injector.new_flows(road, policy_verdict._to([0, 1, 2, 3, 4, 5, 6, 7]), 64, clients)
        assert (sent.arrived, sent.lost) == (64, 0)
        flows = netns.run(road.node, ["conntrack", "-L", "-p", "tcp"]).splitlines()
    pairs = {tuple(word.split("=")[1] for word in flow.split() if word.startswith(("src=", "dst=")))[:2] for flow in flows}
    wanted = {(client_address(2 * k), policies.server_address(k)) for k in range(8)}
    assert pairs == {(str(IPv4Address(client)), str(IPv4Address(server))) for client, server in wanted}


def test_verdicts_at_a_tiny_size():
    """Every way at every size is measured for every traffic, and the ratio is to the node without a rule."""
    worlds = (policy_verdict.NODE, policy_verdict.BLOCKS)
    rows = policy_verdict.measure(NFTABLES, rounds=1, budget=0.5, sizes=(1, 3), peers=(2,), worlds=worlds)
    costs = [row for row in rows if row.metric == "CPU per packet"]
    at = [("none", None), ("conntrack", None), ("nftables", 1), ("nftables", 3), ("nftables", 2)]
    assert [(row.name, row.params["way"], row.params.get("policies", row.params.get("blocks"))) for row in costs] == [
        (traffic, way, size) for traffic in ("new", "new, any client", "established") for way, size in at
    ]
    for row in costs:
        bare = value_of(costs, row.name, row.metric, way="none")
        assert row.baseline_ratio == (None if row.params["way"] == "none" else row.value / bare)
    grown = [(row.name, row.params["cluster"], row.params["at most"]) for row in rows if row.metric == "growth from 1"]
    assert grown == [("new", "full node", 1.2), ("new, any client", "full node", 1.2), ("established", "full node", 1.05)]


def test_a_node_without_policies_is_not_measured_for_one_with_them(monkeypatch):
    """Where a stranger gets through, both benchmarks of packets fail instead of calling policies cheap."""
    monkeypatch.setattr(policy_verdict, "program", lambda *_: None)
    with pytest.raises(Failed, match="pods are not isolated"):
        policy_verdict.measure(NFTABLES, rounds=1, sizes=(1,), worlds=(policy_verdict.ONE_POD,))
    monkeypatch.setattr(policy_connect, "program", lambda *_: None)
    with pytest.raises(Failed, match="3 policies do not isolate the server"):
        policy_connect.measure(NFTABLES, rounds=1, connects=1, number=3)


def test_chain_per_policy():
    """The layout that is measured for comparison lets in who is allowed by the last policy, and nobody else."""
    with open_injector() as injector, open_road(injector, "192.168.60.1/32") as road:
        write_chains(road.node, 3, 5)
        target = policy_verdict._to([2])
        assert injector.new_flows(road, target, 10, Clients(client_address(4), bits=0)).lost == 0
        assert injector.new_flows(road, target, 10, Clients(client_address(5), bits=0), patience=0.1).arrived == 0
    assert chains_text(110, 300).count("-A BENCH-NETPOL") == 220


def test_changes_are_counted():
    """A pod's start writes elements and no chain and no set, through nftables, whatever the number of pods."""
    rows = policy_change.measure(NFTABLES, changes=2, sizes=(20, 40))
    for pods in (20, 40):
        found = [value_of(rows, "pod started", f"{kind} that may differ", pods=pods) for kind in ("chains", "sets", "elements")]
        assert found[:2] == [0, 0]
        assert found[2] > 0
        assert value_of(rows, "policy added", "chains that may differ", pods=pods) == 4 * pods // policies.TEAM
    assert {row.params.get("at most") for row in rows if row.metric == "work median"} == {None, 50.0}


def test_a_group_is_all_of_its_benchmarks(monkeypatch, tmp_path):
    """``bench policy`` runs its three parts, one after the other, and one that fails does not stop the others."""
    ran = []

    def fail(name, _options, _args):
        ran.append(name)
        raise Failed(name)

    monkeypatch.setattr(run, "_measure", fail)
    assert run.run(argparse.Namespace(name="policy", services=None, mode=None, results=tmp_path, output="text")) == 1
    assert ran == ["policy-verdict", "policy-connect", "policy-change"]
