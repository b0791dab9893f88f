"""The CNI plugin in the kernel: pods are attached, reachable, checked, detached; and nothing is left, however it went."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cni_node import NODE, CniNode, addresses, ip, pings, pod_in
from cni_node import namespaces as fresh_namespaces

from kernelstate.linux import netns as namespaces
from netnslab.cni_runtime import CniFailed

pytestmark = pytest.mark.kernel

MODES = ("routed", "bridge")


@pytest.fixture
def node(tmp_path: Path, make_netns: Callable[[], str]) -> CniNode:
    """Return a dual-stack node."""
    return CniNode(tmp_path, make_netns)


# -- packets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_pods_and_node_reach_each_other(node: CniNode, mode: str) -> None:
    """Pod to pod, pod to node and node to pod, in both families, with packets of the full MTU; CHECK agrees; DEL leaves nothing."""
    runtime = node.runtime(node.plugin(mode=mode))
    one, two = node.pod(), node.pod()
    first, second = addresses(runtime.add(one)), addresses(runtime.add(two))
    full = {4: ("-M", "do", "-s", "1372"), 6: ("-M", "do", "-s", "1352")}  # of 1400
    for ours, theirs, own_node in zip(first, second, NODE, strict=True):
        size = full[6 if ":" in ours else 4]
        assert pings(one.container, theirs, *size)
        assert pings(one.container, own_node, *size)
        assert pings(node.netns, ours, *size)
    runtime.check(one)
    for pod in (one, two):
        runtime.delete(pod)
    assert node.left() == set()


@pytest.mark.parametrize(("mode", "length", "gateway"), [("routed", 32, "169.254.1.1"), ("bridge", 24, "10.244.1.1")])
def test_the_result_is_what_the_pod_has(node: CniNode, mode: str, length: int, gateway: str) -> None:
    """Addresses, MTU, MAC and default route that the result states are those that iproute2 sees in the pod."""
    runtime, pod = node.runtime(node.plugin(mode=mode)), node.pod(mac="02:11:22:33:44:55", ips=["10.244.1.77"])
    result = runtime.add(pod)
    link = json.loads(ip(pod.container, "-j", "address", "show", "eth0"))[0]
    found = [f"{one['local']}/{one['prefixlen']}" for one in link["addr_info"] if one["scope"] == "global"]
    assert found == [one["address"] for one in result["ips"]]
    assert found[0] == f"10.244.1.77/{length}"
    assert {"name": "eth0", "mac": "02:11:22:33:44:55", "mtu": 1400, "sandbox": pod.netns} in result["interfaces"]
    assert (link["address"], link["mtu"]) == ("02:11:22:33:44:55", 1400)
    assert f"default via {gateway} dev eth0" in ip(pod.container, "route")


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
def test_every_version_is_answered_in_its_form(node: CniNode, version: str) -> None:
    """The result says the version that was asked for, in the form that version has, and DEL understands it."""
    runtime, pod = node.runtime(version=version), node.pod()
    result = runtime.add(pod)
    assert result["cniVersion"] == version
    if version < "0.3.0":
        assert (result["ip4"]["ip"].split("/")[0], "ips" in result) == ("10.244.1.2", False)
    else:
        assert [one.get("version") for one in result["ips"]] == ([None, None] if version >= "1.0.0" else ["4", "6"])
        assert [one.get("mtu") for one in result["interfaces"]] == ([1400, 1400] if version == "1.1.0" else [None, None])
    runtime.delete(pod)
    assert node.left() == set()


# -- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_second_add_changes_nothing(node: CniNode, mode: str) -> None:
    """ADD of an interface that exists fails, and what was attached stays as it was."""
    runtime, pod = node.runtime(node.plugin(mode=mode)), node.pod()
    result = runtime.add(pod)
    before = node.left()
    with pytest.raises(CniFailed, match="File exists"):
        runtime.add(pod)
    assert node.left() == before
    runtime.check(pod)
    assert pings(pod.container, NODE[0])
    assert addresses(result)[0] == "10.244.1.2"


def test_an_add_that_fails_leaves_nothing(tmp_path: Path, make_netns: Callable[[], str]) -> None:
    """Without a free address ADD fails with the address management's words, and neither link nor file remains."""
    node = CniNode(
        tmp_path, make_netns, "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.0.1/30\nFLANNEL_MTU=1400\nFLANNEL_IPMASQ=true\n"
    )
    runtime, first, second = node.runtime(), node.pod(), node.pod()
    runtime.add(first)
    before = node.left()
    with pytest.raises(CniFailed, match="no IP addresses available"):
        runtime.add(second)
    assert node.left() == before
    assert "eth0" not in ip(second.container, "link")


@pytest.mark.parametrize("missing", ["nothing", "netns", "subnet.env", "record", "all"])
@pytest.mark.parametrize("mode", MODES)
def test_del_works_with_anything_missing(node: CniNode, mode: str, missing: str) -> None:
    """DEL frees address, link and files whatever has gone before, and does so again without complaint."""
    runtime, pod = node.runtime(node.plugin(mode=mode)), node.pod()
    runtime.add(pod)
    if missing in {"netns", "all"}:
        namespaces.delete(pod.container)
    if missing in {"subnet.env", "all"}:
        node.subnet_file.unlink()
    if missing in {"record", "all"}:
        for file in (node.directory / "records").rglob(f"{pod.container}*"):
            file.unlink()
    for _ in range(2):
        runtime.delete(pod)
    assert node.left() == set()


def test_the_nodes_own_namespace_is_refused(node: CniNode) -> None:
    """ADD into the node's namespace is an error that says so, and DEL never deletes a link of the node."""
    runtime, pod = node.runtime(), pod_in(node.netns)
    with pytest.raises(CniFailed, match="own network namespace"):
        runtime.add(pod)
    ip(node.netns, "link", "add", "eth0", "type", "veth", "peer", "name", "other")
    runtime.delete(pod)
    assert {"eth0", "other"} <= node.links()


# -- CHECK -----------------------------------------------------------------------------------------------------------

DAMAGES = {
    "pod address": ("pod", ["address", "del", "10.244.1.2/{length}", "dev", "eth0"], "lacks address 10.244.1.2"),
    "pod default route": ("pod", ["route", "del", "default"], "lacks route 0.0.0.0/0"),
    "pod MAC": ("pod", ["link", "set", "eth0", "address", "02:00:00:00:00:01"], "has MAC 02:00:00:00:00:01"),
    "pod MTU": ("pod", ["link", "set", "eth0", "mtu", "1300"], "has MTU 1300"),
    "pod link": ("pod", ["link", "del", "eth0"], "eth0"),
    "node link down": ("node", ["link", "set", "{veth}", "down"], "is down"),
}
ROUTED_DAMAGES = {
    "node route": ("node", ["route", "del", "10.244.1.2"], "lacks route 10.244.1.2/32"),
    "node neighbour": ("node", ["neigh", "del", "10.244.1.2", "dev", "{veth}"], "lacks the permanent neighbour 10.244.1.2"),
    "pod neighbour": ("pod", ["neigh", "del", "169.254.1.1", "dev", "eth0"], "lacks the permanent neighbour 169.254.1.1"),
}
BRIDGE_DAMAGES = {
    "gateway": ("node", ["address", "del", "10.244.1.1/24", "dev", "cni0"], "lacks address 10.244.1.1"),
    "port": ("node", ["link", "set", "{veth}", "nomaster"], "is no port of cni0"),
    "hairpin": ("node", ["link", "set", "{veth}", "type", "bridge_slave", "hairpin", "off"], "lacks hairpin"),
}
ROWS = [("routed", name, row) for name, row in (DAMAGES | ROUTED_DAMAGES).items()]
ROWS += [("bridge", name, row) for name, row in (DAMAGES | BRIDGE_DAMAGES).items()]


@pytest.mark.parametrize(("mode", "row"), [(m, r) for m, _, r in ROWS], ids=[f"{m}: {n}" for m, n, _ in ROWS])
def test_check_names_the_damage(node: CniNode, mode: str, row: tuple[str, list[str], str]) -> None:
    """CHECK passes until something is changed from outside, then names it."""
    where, command, words = row
    runtime, pod = node.runtime(node.plugin(mode=mode)), node.pod()
    runtime.add(pod)
    runtime.check(pod)
    values = {"veth": next(iter(node.links())), "length": "32" if mode == "routed" else "24"}
    ip(pod.container if where == "pod" else node.netns, *(word.format(**values) for word in command))
    with pytest.raises(CniFailed, match=words):
        runtime.check(pod)


# -- GC and crowds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_gc_takes_what_no_attachment_owns(node: CniNode, mode: str) -> None:
    """GC removes links, addresses and files of unknown containers, with or without record, and touches nothing that is listed."""
    runtime = node.runtime(node.plugin(mode=mode))
    kept, leaked, unrecorded = node.pod(), node.pod(), node.pod()
    for pod in (kept, leaked, unrecorded):
        runtime.add(pod)
    for file in (node.directory / "records").rglob(f"{unrecorded.container}*"):
        file.unlink()
    namespaces.delete(leaked.container)
    for pod in (leaked, unrecorded):
        for file in runtime.cache.glob(f"*{pod.container}*"):
            file.unlink()
    runtime.collect()
    runtime.check(kept)
    assert len(node.links()) == 1
    runtime.delete(kept)
    assert node.left() == set()


def test_a_crowd_leaves_nothing_behind(node: CniNode) -> None:
    """50 rounds of ADD and DEL side by side, a third of the pods dying without DEL, and GC in between: no address is given twice, none stays."""
    runtime = node.runtime()

    def live(number: int) -> list[str]:
        with fresh_namespaces() as make:
            pod = pod_in(make())
            got = addresses(runtime.add(pod))
            if number % 3:
                runtime.delete(pod)
            return got

    with ThreadPoolExecutor(8) as crowd:
        for batch in (range(25), range(25, 50)):
            assert all(len(got) == 2 for got in crowd.map(live, batch))
            runtime.collect(valid=[])
            assert {one for one in node.left() if not one.startswith("results/")} == set()


def test_pods_at_the_same_time_get_different_addresses(node: CniNode) -> None:
    """Ten ADDs at once give ten pairs of addresses, and every pod answers."""
    runtime, pods = node.runtime(node.plugin(mode="bridge")), [node.pod() for _ in range(10)]
    with ThreadPoolExecutor(10) as crowd:
        found = [addresses(one) for one in crowd.map(runtime.add, pods)]
    assert len({one for pair in found for one in pair}) == 20
    assert all(pings(node.netns, pair[0]) for pair in found)


# -- STATUS ----------------------------------------------------------------------------------------------------------


def test_status_says_why_not(node: CniNode) -> None:
    """STATUS is content on a node that has its subnet, and without the file answers code 50 and the file's name."""
    runtime = node.runtime()
    runtime.status()
    node.subnet_file.unlink()
    with pytest.raises(CniFailed, match=r"subnet\.env") as caught:
        runtime.status()
    assert caught.value.code == 50
