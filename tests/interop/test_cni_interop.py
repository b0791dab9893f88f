"""The CNI plugin among others': flannel's own conflist, Debian's portmap behind it, Debian's bridge below it, as a runtime runs them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cni_node import NODE, CniNode, addresses, ip, namespaces

from kernelstate.linux import netns
from netnslab.cni_runtime import CniFailed

pytestmark = pytest.mark.kernel

FLANNEL_DELEGATE = {"hairpinMode": True, "isDefaultGateway": True}
PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}}
V4_ONLY = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1400\nFLANNEL_IPMASQ=true\n"


@pytest.fixture
def make_netns() -> Iterator[Callable[[], str]]:
    """Make namespaces that go with the test."""
    with namespaces() as make:
        yield make


@pytest.fixture
def node(tmp_path: Path, make_netns: Callable[[], str]) -> CniNode:
    """Return a node with IPv4 only, as flannel's manifest has it."""
    return CniNode(tmp_path, make_netns, V4_ONLY)


def answer_once(namespace: str, port: int) -> socket.socket:
    """Listen in a namespace; the kernel itself completes a connection."""
    with netns.inside(namespace):
        return socket.create_server(("0.0.0.0", port))


def connects(namespace: str, address: str, port: int) -> bool:
    """Whether a TCP connection from a namespace is accepted."""
    with netns.inside(namespace):
        try:
            socket.create_connection((address, port), timeout=3).close()
        except OSError:
            return False
    return True


def rules(namespace: str) -> str:
    """Return what portmap has written of nat rules in a namespace."""
    done = subprocess.run(
        ["ip", "netns", "exec", namespace, "iptables-save", "-t", "nat"], capture_output=True, text=True, check=True
    )
    return "\n".join(line for line in done.stdout.splitlines() if "CNI-DN" in line)


def flannel(node: CniNode, **delegate: Any) -> dict[str, Any]:
    """Return the first plugin of flannel's manifest, its type renamed; ``delegate`` beside what the manifest has there."""
    return node.plugin(delegate={**FLANNEL_DELEGATE, **delegate})


SETTINGS = {
    "routed": ("1.0.0", lambda node: node.plugin()),
    "bridge": ("1.0.0", lambda node: node.plugin(mode="bridge")),
    "flannel's delegate": ("0.3.1", flannel),
    "flannel's delegate, type bridge": ("0.3.1", lambda node: flannel(node, type="bridge")),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_portmap_behind_it(node: CniNode, make_netns: Callable[[], str], setting: str) -> None:
    """A hostPort reaches the pod from outside and from the pod itself; our CHECK passes; DEL, twice, takes the rules and everything else."""
    version, first = SETTINGS[setting]
    runtime = node.runtime(first(node), PORTMAP, version=version, name="cbr0")
    outside = make_netns()
    ip(node.netns, "link", "add", "eth9", "type", "veth", "peer", "name", "eth0", "netns", outside)
    for space, link, address in ((node.netns, "eth9", "198.51.100.1/24"), (outside, "eth0", "198.51.100.2/24")):
        ip(space, "address", "add", address, "dev", link)
        ip(space, "link", "set", link, "up")
    other = node.links()
    pod = node.pod(portMappings=[{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}])
    runtime.add(pod)
    with answer_once(pod.container, 80):
        assert connects(outside, "198.51.100.1", 8080)
        assert connects(pod.container, NODE[0], 8080)
    assert rules(node.netns)
    if version != "0.3.1":  # only ours: portmap 1.1 looks for IPv6 rules in CHECK even where it had none to make
        runtime.execute("CHECK", runtime.conflist["plugins"][0], pod, runtime.result(pod))
    for _ in range(2):
        runtime.delete(pod)
    assert (rules(node.netns), node.left() - other) == ("", set())


def test_flannels_delegate_gets_flannels_values(node: CniNode) -> None:
    """The bridge plugin attaches the pod as it does for flannel: cni0, MTU and subnet of the file, the cluster's network as a route."""
    runtime, pod = node.runtime(flannel(node, type="bridge"), version="0.3.1", name="cbr0"), node.pod()
    result = runtime.add(pod)
    assert [one["name"] for one in result["interfaces"]][::2] == ["cni0", "eth0"]
    routes = {line.split(" dev ")[0] for line in ip(pod.container, "route").splitlines()}
    assert routes == {"default via 10.244.1.1", "10.244.0.0/16 via 10.244.1.1", "10.244.1.0/24"}
    mtus = [
        json.loads(ip(space, "-j", "link", "show", link))[0]["mtu"]
        for space, link in ((node.netns, "cni0"), (pod.container, "eth0"))
    ]
    assert mtus == [1400, 1400]


def test_our_bridge_looks_like_the_bridge_plugins(tmp_path: Path, make_netns: Callable[[], str]) -> None:
    """For the same conflist of flannel's, our bridge mode gives a pod the same addresses, routes and MTU as Debian's plugin."""
    found = []
    for part, delegate in (("theirs", {"type": "bridge"}), ("ours", {})):
        (tmp_path / part).mkdir()
        node = CniNode(tmp_path / part, make_netns, V4_ONLY)
        pod = node.pod()
        node.runtime(flannel(node, **delegate), version="0.3.1", name="cbr0").add(pod)
        link = json.loads(ip(pod.container, "-j", "address", "show", "eth0"))[0]
        v4 = [f"{one['local']}/{one['prefixlen']}" for one in link["addr_info"] if one["family"] == "inet"]
        routes = sorted(" ".join(line.split()[:5]) for line in ip(pod.container, "-4", "route").splitlines())
        gateway = [
            f"{one['local']}" for one in json.loads(ip(node.netns, "-4", "-j", "address", "show", "cni0"))[0]["addr_info"]
        ]
        port = "hairpin on" in ip(node.netns, "-d", "link", "show", "master", "cni0")
        found.append((v4, link["mtu"], routes, gateway, port))
    assert found[0] == found[1]


def test_a_pod_of_flannels_plugin_is_taken_away_by_ours(node: CniNode) -> None:
    """A pod that the bridge plugin attached before nodeplane came is detached by ours: its address is free, its link gone."""
    subnet = [[{"subnet": "10.244.1.0/24"}]]
    ipam = {"type": "host-local", "ranges": subnet, "dataDir": str(node.directory / "networks")}
    before = node.runtime({"type": "bridge", "bridge": "cni0", "isGateway": True, "ipam": ipam}, version="0.3.1", name="cbr0")
    pod = node.pod()
    before.add(pod)
    node.runtime(flannel(node), version="0.3.1", name="cbr0").delete(pod)
    assert node.left() == set()


def test_addresses_are_host_locals_own(node: CniNode) -> None:
    """host-local reads what we leave and we read what it leaves: the file names the container and its interface."""
    runtime, pod = node.runtime(), node.pod()
    (address,) = addresses(runtime.add(pod))
    reservation = node.directory / "networks/np" / address
    assert reservation.read_bytes() == f"{pod.container}\r\neth0".encode()
    runtime.collect()
    assert reservation.exists()
    runtime.collect(valid=[])
    assert not reservation.exists()


def test_version_is_answered_without_anything(node: CniNode) -> None:
    """VERSION needs no configuration, and says every version the specification has had."""
    runtime = node.runtime()
    answer = runtime.execute("VERSION", {"type": "nodeplane-cni"}, None, None)
    assert answer is not None
    assert answer["supportedVersions"] == ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]


FAULTS = {
    "netns": ({}, {"netns": "/run/netns/np-t-nobody"}, 8, "CNI_NETNS.*np-t-nobody"),
    "interface": ({}, {"ifname": "a/b"}, 4, "CNI_IFNAME.*a/b"),
    "container": ({}, {"container": "../x"}, 4, r"CNI_CONTAINERID.*\.\./x"),
    "mode": ({"mode": "ring"}, {}, 7, "mode.*ring"),
    "mtu": ({"mtu": 5}, {}, 7, "mtu.*5"),
    "mac": ({}, {"runtime_config": {"mac": "01:00:00:00:00:00"}}, 7, "mac.*01:00"),
    "address": ({}, {"runtime_config": {"ips": ["192.0.2.77"]}}, None, r"192\.0\.2\.77"),
    "ipam plugin": ({"ipam": {"type": "nobody"}}, {}, 7, "nobody.*CNI_PATH"),
    "subnet.env": ({"subnetFile": "/nonexistent/subnet.env"}, {}, 11, "/nonexistent/subnet.env"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_has_its_code_and_names_the_value(node: CniNode, fault: str) -> None:
    """What is wrong in configuration or environment is answered in CNI's form, with field and value; nothing is made."""
    fields, changes, code, words = FAULTS[fault]
    pod = node.pod()._replace(**changes)
    with pytest.raises(CniFailed, match=words) as caught:
        node.runtime(node.plugin(**fields)).add(pod)
    assert code in {None, caught.value.code}
    assert node.left() == set()


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"cniVersion": "9.0.0", "name": "x"}'])
def test_bad_input_is_answered_in_json(node: CniNode, data: bytes) -> None:
    """Whatever comes on stdin, stdout has one error object of CNI's form and the exit status is 1."""
    runtime = node.runtime()
    program = next(p for d in runtime.cni_path.split(os.pathsep) if (p := Path(d) / "nodeplane-cni").is_file())
    environment = {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "c",
        "CNI_NETNS": "/n",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/usr/lib/cni",
    }
    done = subprocess.run([program], input=data, env=environment, capture_output=True, timeout=120, check=False)
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["code"]) == (1, 1 if b"9.0.0" in data else 6)
    assert answer["msg"]


@pytest.mark.parametrize("mode", ["routed", "bridge"])
def test_a_pod_reaches_itself_by_nat(node: CniNode, mode: str) -> None:
    """A connection of a pod that the node's rules send back to it (a Service with itself behind it) comes back."""
    pod = node.pod()
    (address,) = addresses(node.runtime(node.plugin(mode=mode)).add(pod))
    for rule in (
        ["PREROUTING", "-d", "10.96.0.1", "-p", "tcp", "-j", "DNAT", "--to-destination", f"{address}:80"],
        ["POSTROUTING", "-s", address, "-d", address, "-j", "MASQUERADE"],
    ):
        command = ["ip", "netns", "exec", node.netns, "iptables", "-w", "-t", "nat", "-I", *rule]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    with answer_once(pod.container, 80):
        assert connects(pod.container, "10.96.0.1", 80)


@pytest.mark.parametrize("mode", ["routed", "bridge"])
def test_rules_see_packets_between_pods_of_a_node(node: CniNode, mode: str) -> None:
    """A connection by a Service's address to another pod of the node works: its answers pass the node's rules, on the bridge as well."""
    runtime = node.runtime(node.plugin(mode=mode))
    client, server = node.pod(), node.pod()
    runtime.add(client)
    (address,) = addresses(runtime.add(server))
    rule = ["PREROUTING", "-d", "10.96.0.1", "-p", "tcp", "-j", "DNAT", "--to-destination", f"{address}:80"]
    command = ["ip", "netns", "exec", node.netns, "iptables", "-w", "-t", "nat", "-I", *rule]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with answer_once(server.container, 80):
        assert connects(client.container, "10.96.0.1", 80)
