"""Topology files, and what `lab up` makes of files and options together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from clusterstate.objects import ObjectRef
from netnslab import names
from netnslab.agents import node_config
from netnslab.demo import one_way
from netnslab.errors import LabInputError
from netnslab.plan import read_plan
from netnslab.topology import BUNDLED, load_topology, parse_topology
from nodeplane.lab_commands import split_command

NODES = [{"name": "n1"}, {"name": "n2"}]


@pytest.mark.parametrize("path", sorted(BUNDLED.glob("*.toml")), ids=lambda p: p.stem)
def test_bundled_topologies_are_whole(path: Path) -> None:
    """Each bundled topology gives every node its addresses and podCIDRs, and a configuration an agent takes."""
    topology = load_topology(path)
    families = len(topology.families)
    assert {len(n.ips) for n in topology.nodes} == {len(n.pod_cidrs) for n in topology.nodes} == {families}
    assert [node_config(topology, n.name)["nodeName"] for n in topology.nodes] == [n.name for n in topology.nodes]


def test_the_default_topology() -> None:
    """Without any option a lab is three nodes, nine pods of hostnames, and their Service on NodePort 30080."""
    plan = read_plan(None, [], None, None)
    assert [(n.name, n.ips, n.pod_cidrs) for n in plan.topology.nodes] == [
        (f"node-{i}", [f"192.168.50.1{i}"], [f"10.244.{i}.0/24"]) for i in (1, 2, 3)
    ]
    assert [ref.name for ref in plan.given if ref.kind == "Pod"] == [f"hostnames-{i}" for i in range(1, 10)]
    ports = plan.given[ObjectRef("Service", "default", "hostnames")]["spec"]["ports"]
    assert [(p["port"], p["targetPort"], p["nodePort"]) for p in ports] == [(80, 9376, 30080)]


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        ({}, "f.toml: nodes: must name at least one node"),
        ({"nodes": [{"name": "Bad"}]}, "f.toml: nodes[0].name: must be lower case letters, digits and hyphens"),
        ({"nodes": [{"nmae": "a"}]}, "f.toml: nodes[0].nmae: is not a key that topologies have"),
        ({"color": 1, "nodes": NODES}, "f.toml: color: is not a key that topologies have"),
        ({"nodes": [{"name": 1}]}, "f.toml: nodes[0].name: must be a string, is 1"),
        ({"nodes": [{"name": "router"}]}, "f.toml: nodes[0].name: 'router' is the name of a part of every lab"),
        ({"nodes": [*NODES, {"name": "n1"}]}, "f.toml: nodes: 'n1' is there twice"),
        ({"nodes": [{"name": "a", "segment": "x"}]}, "f.toml: nodes[0].segment: must be one of lan, is 'x'"),
        ({"nodes": [{"name": "a", "ips": ["10.0.0.1"]}]}, "f.toml: nodes[0].ips[0]: must lie in its segment"),
        ({"nodes": [{"name": "a", "ips": ["x"]}]}, "f.toml: nodes[0].ips[0]: must be an IP address, is 'x'"),
        (
            {"nodes": NODES, "segments": [{"name": "s", "subnets": ["10.0.0.0/30"]}]},
            "f.toml: segments[0].subnets: must hold at least 256 addresses, is '10.0.0.0/30'",
        ),
        (
            {"nodes": NODES, "segments": [{"name": "s", "mtu": 9}]},
            "f.toml: segments[0].mtu: must be between 1280 and 65535, is 9",
        ),
        (
            {"nodes": NODES, "cluster": {"pod_cidrs": ["10.0.0.1/16"]}},
            "f.toml: cluster.pod_cidrs[0]: must be a CIDR such as 10.244.0.0/16, is '10.0.0.1/16'",
        ),
        (
            {"nodes": [{"name": f"n{i}", "pod_cidrs": ["10.1.0.0/24"]} for i in (1, 2)]},
            "f.toml: nodes.pod_cidrs: 10.1.0.0/24 overlaps with that of another node",
        ),
        ({"nodes": NODES, "pods": [{"name": "p", "node": "x"}]}, "f.toml: pods[0].node: must be one of n1, n2, is 'x'"),
        (
            {"nodes": NODES, "pods": [{"name": "p", "replicas": -1}]},
            "f.toml: pods[0].replicas: must be between 0 and 1000, is -1",
        ),
    ],
)
def test_errors_name_file_key_and_value(raw: dict[str, Any], error: str) -> None:
    """A wrong topology is refused in one line that names file, key and value."""
    with pytest.raises(LabInputError, match=f"^{re.escape(error)}"):
        parse_topology(raw, "f.toml")


def test_wrong_modes_are_refused_before_anything_is_made() -> None:
    """A service mode, backend or field that no agent takes is an input error that names it."""
    topology = parse_topology({"nodes": NODES, "services": {"mode": "nonsense"}}, "f.toml")
    with pytest.raises(LabInputError, match=r"services.mode: must be one of .*'nonsense'"):
        node_config(topology, "n1")
    with pytest.raises(LabInputError, match="--overlay: must be vxlan, host-gw or udp, is 'ipip'"):
        read_plan(None, [], None, "ipip")
    with pytest.raises(LabInputError, match=r"--topology: must be a TOML file or one of .*three-nodes.*, is 'nope'"):
        read_plan("nope", [], None, None)


def test_objects_alone_leave_the_example_out(tmp_path: Path) -> None:
    """With objects and no topology the lab holds these objects, on the default's nodes."""
    file = tmp_path / "o.yaml"
    file.write_text("kind: Pod\nmetadata: {name: mine}\n---\nkind: ConfigMap\nmetadata: {name: c}\n")
    plan = read_plan(None, [str(file)], None, "host-gw")
    assert (list(plan.given), plan.ignored) == ([ObjectRef("Pod", "default", "mine")], ["ConfigMap c"])
    assert (len(plan.topology.nodes), plan.topology.overlay.backend) == (3, "host-gw")


def test_node_objects_are_the_nodes(tmp_path: Path) -> None:
    """Without a topology Node objects are the nodes, where they say they are; each subnet of theirs is a segment."""
    nodes = [("w1", "172.18.0.2", "10.9.1.0/24"), ("w2", "172.18.0.3", "10.9.2.0/24"), ("w3", "172.19.0.2", "10.9.3.0/24")]
    file = tmp_path / "nodes.yaml"
    file.write_text(
        "---\n".join(
            f"kind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDR: {cidr}}}\n"
            f"status: {{addresses: [{{type: InternalIP, address: {ip}}}]}}\n"
            for name, ip, cidr in nodes
        )
    )
    topology = read_plan(None, [str(file)], None, None).topology
    assert [(n.name, n.ips[0], n.pod_cidrs[0]) for n in topology.nodes] == nodes
    assert [(s.name, s.subnets) for s in topology.segments] == [("lan", ["172.18.0.0/24"]), ("lan-2", ["172.19.0.0/24"])]
    assert topology.cluster.pod_cidrs == ["10.9.0.0/16"]


def test_a_bad_object_refuses_all(tmp_path: Path) -> None:
    """One object that cannot be used refuses the file, named with its field and value."""
    file = tmp_path / "bad.yaml"
    file.write_text("kind: Pod\nmetadata: {name: a}\n---\nkind: Service\nmetadata: {name: s}\nspec: {ports: [{port: 99999}]}\n")
    with pytest.raises(LabInputError, match=r"bad.yaml: Service default/s: spec.ports\[0\].port: .*99999"):
        read_plan(None, [str(file)], None, None)


def test_names_are_short_and_unique() -> None:
    """A link's name fits the kernel's 15 characters; pods and nodes never share a namespace's name."""
    assert names.port_link("n" * 40) != names.port_link("n" * 41)
    assert len(names.port_link("n" * 40)) <= names.LONGEST_LINK
    assert names.pod_netns("a", "default", "web") == "np-a-default.web"
    assert len(names.pod_netns("a", "default", "x" * 253)) < 255
    with pytest.raises(LabInputError, match=r"--name: must be .*, is 'A_b'"):
        names.check_lab_name("A_b")


def test_another_backend_leaves_the_options_of_the_files(tmp_path: Path) -> None:
    """``--overlay`` with another backend than the file's drops that one's options; with the same one they stay."""
    overlays = [read_plan("two-segments", [], None, stated).topology.overlay for stated in (None, "vxlan", "host-gw")]
    direct = {"DirectRouting": True}
    assert [(o.backend, o.options) for o in overlays] == [("vxlan", direct), ("vxlan", direct), ("host-gw", {})]


def test_a_program_comes_after_two_dashes() -> None:
    """What follows the place in `lab exec` is options up to ``--``, then the program with dashes of its own."""
    assert split_command(["--name", "l", "--", "ip", "--", "x"]) == (["--name", "l"], ["ip", "--", "x"])
    assert split_command(["ip", "-br", "addr"]) == ([], ["ip", "-br", "addr"])
    assert split_command([]) == ([], [])


def test_an_explanation_is_shortened_to_one_way() -> None:
    """Of an explanation's ways the demo keeps the last, without comments; one without any stays whole."""
    lines = [
        "head",
        "  a with probability 0.5:",
        "    x",
        "  b with probability 0.5:",
        '    -A C -m comment --comment "a b" -j D',
        "agree",
    ]
    assert one_way(lines) == ["head", "  b with probability 0.5:", "    -A C -j D", "agree"]
    assert one_way(["dropped", "agree"]) == ["dropped", "agree"]
