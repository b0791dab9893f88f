"""The real program ended, killed and replaced under load: nobody who uses Services or meets policies can tell.

pod 2  --- an open connection, and new ones without a pause ---> ClusterIP ---> pod 1, which lets in nobody but pod 2
pod 3  --- datagrams, denied and counted ------------------------------------->
"""

from __future__ import annotations

import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon_node import SECONDS, DaemonNode
from patience import eventually
from service_node import ServiceNode, pod_ip

from kernelstate.linux import netns
from nodeplane.denied import read_denied

pytestmark = pytest.mark.kernel

VIP = "10.96.0.10"
ENOUGH = 50
"""New connections in each stage."""


def pod(number: int) -> dict[str, Any]:
    meta = {"namespace": "shop", "name": f"p{number}", "labels": {"name": f"p{number}"}}
    spec = {"nodeName": "n1", "containers": [{"name": "c"}]}
    status = {"phase": "Running", "podIP": pod_ip(number), "podIPs": [{"ip": pod_ip(number)}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec, "status": status}


SERVICE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"namespace": "shop", "name": "web"},
    "spec": {"clusterIP": VIP, "ports": [{"port": 80, "targetPort": 8080}]},
}
SLICE = {
    "apiVersion": "discovery.k8s.io/v1",
    "kind": "EndpointSlice",
    "metadata": {"name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
    "addressType": "IPv4",
    "endpoints": [{"addresses": [pod_ip(1)], "nodeName": "n1", "conditions": {"ready": True}}],
    "ports": [{"port": 8080}],
}
POLICY = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"namespace": "shop", "name": "p2-only"},
    "spec": {
        "podSelector": {"matchLabels": {"name": "p1"}},
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"name": "p2"}}}]}],
    },
}


class Load:
    """An open connection and new ones, one after the other; every one of them has to answer."""

    def __init__(self, rig: ServiceNode) -> None:
        self.made, self.fault = 0, ""
        self._stop, self._answered = threading.Event(), threading.Event()
        self._server = rig.listen(1, 8080)
        self._rig = rig
        self.open: socket.socket | None = None
        self._serving, self._asking = (threading.Thread(target=body, daemon=True) for body in (self._serve, self._ask))
        self._serving.start()
        self._asking.start()

    def _serve(self) -> None:
        def echo(one: socket.socket) -> None:
            with one:
                while data := one.recv(100):
                    one.sendall(data)

        self._server.settimeout(0.2)
        while not self._answered.is_set():
            try:
                one, _ = self._server.accept()
            except TimeoutError:
                continue
            one.settimeout(60)
            threading.Thread(target=echo, args=(one,), daemon=True).start()

    def _ask(self) -> None:
        try:
            with netns.inside(self._rig.pods[2]):
                while not self._stop.wait(0.005):
                    with socket.create_connection((VIP, 80), timeout=5) as client:
                        client.sendall(b"new")
                        assert client.recv(100) == b"new"
                    self.made += 1
        except (OSError, AssertionError) as error:
            self.fault = f"after {self.made} connections: {error!r}"

    def go_on(self) -> None:
        """Wait for enough more connections, and use the open one."""
        if self.open is None:
            self.open = self._rig.connect(self._rig.pods[2], VIP, 80)
        wanted = self.made + ENOUGH
        eventually(lambda: self.fault or self.made >= wanted, SECONDS)
        assert not self.fault
        self.open.sendall(b"still here")
        assert self.open.recv(100) == b"still here"

    def close(self) -> None:
        self._stop.set()
        self._asking.join(10)
        self._answered.set()
        self._serving.join(10)


@pytest.fixture(params=["nftables", "iptables"])
def daemon(
    request: pytest.FixtureRequest, make_netns: Callable[[], str], tmp_path: Path
) -> Iterator[tuple[str, ServiceNode, DaemonNode]]:
    """Yield the rig and node n1, whose agent is not started yet."""
    rig = ServiceNode(make_netns, 3)
    node = DaemonNode(
        rig.node, tmp_path, link=False, services={"mode": request.param}, policy={"enabled": True, "mode": request.param}
    )
    for name, one in {"service": SERVICE, "slice": SLICE, "policy": POLICY, **{f"p{n}": pod(n) for n in (1, 2, 3)}}.items():
        node.put(name, one)
    yield request.param, rig, node
    if node.process is not None:
        node.process.kill()
        node.process.wait(10)
    rig.close()


def rules(space: str) -> list[str]:
    """Return every rule and element of the node, without counters."""
    found = netns.run(space, ["nft", "list", "ruleset"]) + netns.run(space, ["iptables-legacy-save"])
    plain = re.sub(r"counter packets \d+ bytes \d+|\[\d+:\d+\]", "", found)
    return [
        line.strip() for line in plain.splitlines() if not line.startswith("# Generated") and not line.startswith("# Completed")
    ]


def counts(space: str, mode: str, wanted: int) -> None:
    """See that so many packets to pod 1 were denied, by the kernel's counter: it never goes back."""

    def counted() -> int:
        with netns.inside(space):
            return sum(one.packets for one in read_denied(mode, {pod_ip(1): "shop/p1"}))

    eventually(lambda: counted() >= wanted, SECONDS, f"{wanted} denied packets were counted")
    assert counted() == wanted


def deny(rig: ServiceNode, number: int) -> None:
    """Send datagrams that are denied."""
    with rig.socket(rig.pods[3], kind=socket.SOCK_DGRAM) as client:
        for _ in range(number):
            client.sendto(b"x", (pod_ip(1), 9))


def terminate(node: DaemonNode, between: Callable[[], None]) -> None:
    assert node.end() == 0
    between()
    node.start()
    node.synced()


def kill(node: DaemonNode, between: Callable[[], None]) -> None:
    assert node.end(signal.SIGKILL) == -signal.SIGKILL
    between()
    node.start()
    node.synced()


def replace(node: DaemonNode, between: Callable[[], None]) -> None:
    """Let the agent become the program that is installed now; its process stays."""
    before = node.synced().started
    node.send(signal.SIGHUP)
    between()
    eventually(lambda: (status := node.status()) and status.started > before and status.synced, SECONDS)


def test_nobody_can_tell(daemon: tuple[str, ServiceNode, DaemonNode]) -> None:
    """Connections go on and new ones are made with the agent there, gone and back; rules and counters stay as they are."""
    mode, rig, node = daemon
    node.start()
    node.synced()
    load = Load(rig)
    try:
        load.go_on()
        before = rules(rig.node)
        for number, stage in enumerate((terminate, kill, replace), 1):
            deny(rig, 5)
            counts(rig.node, mode, 5 * number)
            stage(node, load.go_on)
            load.go_on()
            counts(rig.node, mode, 5 * number)
            assert rules(rig.node) == before, "nothing differs"
    finally:
        load.close()
    assert not load.fault
