"""A pod's first packets: it is flooded from the moment it has an address, and nothing comes through that policies forbid."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from cni_node import CniNode, NodeRuntime, ip, pod_in
from forked_agent import ForkedAgent
from patience import eventually

from kernelstate.linux import netns
from netnslab.cni_runtime import CniFailed, Pod

pytestmark = pytest.mark.kernel

PORT = 9
DENY = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"namespace": "a", "name": "deny"},
    "spec": {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]},
}


def manifest(name: str) -> dict[str, Any]:
    """Return a Pod as it is before its start: on the node, and without addresses."""
    spec = {"nodeName": "n1", "containers": [{"name": "c"}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "a", "name": name}, "spec": spec}


@contextmanager
def flood(node: str, *addresses: str) -> Iterator[list[int]]:
    """Send datagrams to addresses without a pause, from a stranger behind the node; yields how many were sent, in a list of one."""
    sent, stop = [0], threading.Event()

    def run() -> None:
        with netns.inside(node):
            client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with client:
            for address in cycle(addresses):
                if stop.is_set():
                    return
                try:
                    client.sendto(b"x", (address, PORT))
                    sent[0] += 1
                except OSError:  # there is no route to it yet
                    time.sleep(0.0002)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield sent
    finally:
        stop.set()
        thread.join(5)


class Rig:
    """A node with an agent, a stranger who floods, and pods that the CNI plugin attaches."""

    def __init__(self, directory: Path, new_netns: Any, policy: str) -> None:
        self.new_netns = new_netns
        (directory / "cni").mkdir()
        self.node = CniNode(directory / "cni", new_netns)
        self.objects = directory / "objects"
        self.objects.mkdir()
        self.write(
            "node", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}, "spec": {"podCIDR": "10.244.1.0/24"}}
        )
        self.status = directory / "status.json"
        self.agent = ForkedAgent(self.node.netns, self.objects, self.status, {"mode": "iptables"}, policy=policy)
        self.stranger = new_netns()
        ip(self.node.netns, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", self.stranger)
        for space, own, up in ((self.node.netns, "198.51.100.1/24", "eth0"), (self.stranger, "198.51.100.2/24", "eth0")):
            ip(space, "address", "add", own, "dev", up)
            ip(space, "link", "set", up, "up")
        ip(self.stranger, "route", "add", "default", "via", "198.51.100.1")

    def write(self, name: str, one: dict[str, Any]) -> None:
        (self.objects / f"{name}.json").write_text(json.dumps(one))

    def generation(self, number: int) -> None:
        (self.objects / ".generation").write_text(str(number))
        self.agent.wait(number)

    def attach(self, name: str, *, waits: bool, seconds: int = 10) -> tuple[str, str]:
        """Attach a pod, waiting for its policies or not; return its namespace and its IPv4 address."""
        pod = self.pod(name)
        result = self.runtime(waits=waits, seconds=seconds).add(pod)
        return pod.container, result["ips"][0]["address"].partition("/")[0]

    def runtime(self, *, waits: bool = True, seconds: int = 10) -> NodeRuntime:
        where = str(self.status.with_name("policy.sock" if waits else "nobody"))
        return self.node.runtime(self.node.plugin(policySocket=where, policyWaitSeconds=seconds))

    def pod(self, name: str) -> Pod:
        bare = pod_in(self.new_netns())
        return Pod(bare.container, bare.netns, args=f"IgnoreUnknown=1;K8S_POD_NAMESPACE=a;K8S_POD_NAME={name}")

    def told(self) -> set[str]:
        """Return the pods whose addresses the agent has from their start."""
        return {one["name"] for one in json.loads(self.status.with_name("told.json").read_bytes())}


@pytest.fixture(params=["nftables", "iptables"])
def rig(request: pytest.FixtureRequest, tmp_path: Path, make_netns: Any) -> Iterator[Rig]:
    made = Rig(tmp_path, make_netns, request.param)
    made.agent.start()
    yield made
    made.agent.kill()


def arrived(space: str) -> int:
    """Return how many datagrams have come into a namespace, whether somebody wanted them or not."""
    with netns.inside(space):
        lines = [
            line.split() for line in Path("/proc/thread-self/net/snmp").read_text().splitlines() if line.startswith("Udp:")
        ]
    counts = dict(zip(lines[0][1:], map(int, lines[1][1:]), strict=True))
    return counts["InDatagrams"] + counts["NoPorts"]


def next_address(address: str) -> str:
    """Return the address that is given out after this one."""
    head, _, last = address.rpartition(".")
    return f"{head}.{int(last) + 1}"


def test_not_one_packet_before_the_policy(rig):
    """Flooded from before it has a link, a pod that a policy isolates sees no packet; one that does not wait sees some."""
    for name in ("first", "careless", "careful"):
        rig.write(name, manifest(name))
    rig.write("deny", DENY)
    rig.generation(1)
    _, address = rig.attach("first", waits=True)
    for name, waits in (("careless", False), ("careful", True)):
        address = next_address(address)
        with flood(rig.stranger, address) as sent:
            space, given = rig.attach(name, waits=waits)
            assert given == address
            before, end = sent[0], time.monotonic() + 5
            while sent[0] < before + 500 and time.monotonic() < end:
                select.select([], [], [], 0.01)
        assert sent[0] >= before + 500
        assert (arrived(space) == 0) == waits, name


def test_a_killed_agent_lets_nobody_start(rig):
    """Behind an agent that was killed a pod waits, fails with the reason, and leaves nothing; the next agent lets it through."""
    rig.write("late", manifest("late"))
    rig.write("deny", DENY)
    rig.generation(1)
    rig.agent.kill()
    with pytest.raises(CniFailed, match=r"NetworkPolicies of pod a/late are not in force after 1 s: no agent answers"):
        rig.attach("late", waits=True, seconds=1)
    assert rig.node.left() - {"eth0"} == set()
    rig.agent.start()
    space, _ = rig.attach("late", waits=True)
    assert arrived(space) == 0


CROWD = 50


def test_a_crowd_starts_isolated_and_is_forgotten(rig):
    """50 pods start at the same time under a flood to all their addresses: none sees a packet. What was told of them goes with them."""
    names = [f"p{number}" for number in range(CROWD)]
    for name in names:
        rig.write(name, manifest(name))
    rig.write("deny", DENY)
    rig.generation(1)
    runtime, pods = rig.runtime(seconds=60), [rig.pod(name) for name in names]
    with flood(rig.stranger, *(f"10.244.1.{last}" for last in range(2, CROWD + 2))) as sent, ThreadPoolExecutor(CROWD) as crowd:
        found = list(crowd.map(runtime.add, pods))
        assert len({one["address"] for result in found for one in result["ips"]}) == 2 * CROWD
        enough = sent[0] + 20 * CROWD
        eventually(lambda: sent[0] >= enough, 10, "the flood went on")
        assert [arrived(pod.container) for pod in pods] == [0] * CROWD
        assert rig.told() == set(names)
        list(crowd.map(runtime.delete, pods[1:]))
    eventually(lambda: rig.told() == {names[0]}, 5, "those that went are forgotten, and nobody else")
