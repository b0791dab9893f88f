"""What a node says of itself on its Node object: when, what, how often, and what becomes of it where the server refuses."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from ipaddress import ip_address, ip_interface
from types import SimpleNamespace
from typing import Any

import pytest
from immutables import Map
from msgspec.structs import replace
from overlay_worlds import DUAL, HOST_GW, N1, N2, UPLINK, VXLAN, compile_nodes, snapshot
from patience import eventually

from clusterstate.objects import Node
from clusterstate.snapshot import Update
from clusterstate.sources.reflector import ApiError
from nodeplane import announcer
from nodeplane.announcer import Announcer
from nodeplane.attendant import Round
from overlay.lease import derived_mac, print_annotations
from overlay.netconf import NetConf
from overlay.registry.nodes import own_annotations

A = "flannel.alpha.coreos.com/"
SECONDS = 10.0


class Api:
    """A server that takes patches of one Node, or refuses them."""

    def __init__(self, node: Node) -> None:
        self.node, self.refuses = node, ""
        self.patches: list[tuple[str, dict[str, Any]]] = []
        self.refused = 0
        self.conditions: list[dict[str, str]] = []
        self._lock = threading.Lock()

    def patch(self, path: str, body: bytes) -> bytes:
        with self._lock:
            if self.refuses:
                self.refused += 1
                raise ApiError(403, self.refuses)
            patch = json.loads(body)
            self.patches.append((path, patch))
            changed = patch.get("metadata", {}).get("annotations", {})
            self.node = replace(self.node, annotations=self.node.annotations.update(changed))
            self.conditions += patch.get("status", {}).get("conditions", [])
        return b"{}"


class World:
    """A node's agent as its announcer meets it."""

    def __init__(self, node: Node = N1) -> None:
        self.api = Api(node)
        self.announcer = Announcer(self.api, "n1")

    def round(self, conf: NetConf = VXLAN, *, errors: tuple[str, ...] = ()) -> None:
        """Take in what the server says now, and write it to the kernel."""
        state = snapshot(self.api.node, N2)
        desired = SimpleNamespace(peers=compile_nodes(state, "n1", conf, UPLINK))
        self.announcer.taken(Update(state, None), desired)  # type: ignore[arg-type]
        self.announcer.synced(Round(0.0, (), errors, False, None))  # type: ignore[arg-type]

    def wanted(self, conf: NetConf = VXLAN) -> dict[str, str]:
        return own_annotations(compile_nodes(snapshot(self.api.node, N2), "n1", conf, UPLINK), self.api.node)

    def says(self, annotations: dict[str, str]) -> bool:
        return all(self.api.node.annotations.get(key) == value for key, value in annotations.items())


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for name in ("REST", "FIRST_PAUSE"):
        monkeypatch.setattr(announcer, name, 0.001)
    made = World()
    made.announcer.start()
    yield made
    made.announcer.stop(SECONDS)
    assert not made.announcer._thread.is_alive()


def test_what_is_said() -> None:
    """Backend, tunnel's end and address in both families, as flannel writes them."""
    table = compile_nodes(snapshot(N1, N2), "n1", DUAL, UPLINK)
    assert own_annotations(table, N1) == {
        A + "kube-subnet-manager": "true",
        A + "backend-type": "vxlan",
        A + "backend-data": f'{{"VNI":1,"VtepMAC":"{derived_mac("n1", 1, 4)}"}}',
        A + "public-ip": "192.168.1.1",
        A + "backend-v6-data": f'{{"VNI":1,"VtepMAC":"{derived_mac("n1", 1, 6)}"}}',
        A + "public-ipv6": "fd00:1::1",
    }
    host_gw = own_annotations(compile_nodes(snapshot(N1, N2), "n1", HOST_GW, UPLINK), N1)
    assert host_gw == print_annotations("host-gw", {4: "192.168.1.1"}, {})


@pytest.mark.parametrize(
    ("annotations", "uplink", "told"),
    [
        ({"public-ip": "192.168.1.77"}, "192.168.1.1/24", "192.168.1.1"),
        ({"public-ip": "eth0"}, "192.168.1.1/24", "192.168.1.1"),
        ({"node-public-ip": "192.168.1.8"}, "192.168.1.1/24", "192.168.1.8"),
        ({"node-public-ip": "192.168.1.8", "public-ip-overwrite": "203.0.113.5"}, "192.168.1.1/24", "203.0.113.5"),
        ({}, "10.9.0.1/16", "10.9.0.1"),
    ],
    ids=["an earlier one", "rubbish", "stated", "a NAT's", "another link"],
)
def test_which_address(annotations: dict[str, str], uplink: str, told: str) -> None:
    """What people state counts before the Node's own address, that one before the uplink's; what was said earlier does not count."""
    node = replace(N1, annotations=Map({A + key: value for key, value in annotations.items()}))
    link = replace(UPLINK, addresses=(ip_interface(uplink),))
    table = compile_nodes(snapshot(node, N2), "n1", VXLAN, link)
    assert ip_address(own_annotations(table, node)[A + "public-ip"]) == ip_address(told)


def test_said_once_and_again_if_somebody_changes_it(world: World) -> None:
    """After the first round in sync the Node says it all in one patch of its status; what somebody takes away comes back."""
    world.round()
    wanted = world.wanted()
    eventually(lambda: world.says(wanted), SECONDS)
    assert world.api.patches[0][0] == "/api/v1/nodes/n1/status"
    (condition,) = world.api.conditions
    assert (condition["type"], condition["status"]) == ("NetworkUnavailable", "False")
    world.round()
    world.round()
    assert len(world.api.patches) == 1, "it is said already"
    world.api.node = replace(world.api.node, annotations=Map({"mine": "1", **wanted, A + "backend-type": "ipip"}))
    world.round()
    eventually(lambda: world.says({**wanted, "mine": "1"}), SECONDS)
    assert world.api.patches[1:] == [("/api/v1/nodes/n1/status", {"metadata": {"annotations": {A + "backend-type": "vxlan"}}})]


def test_nothing_before_the_kernel_has_it(world: World) -> None:
    """A node whose overlay is not written tells nobody to send packets there."""
    world.round(errors=("links: no",))
    world.announcer.synced(Round(0.0, (), ("links: no",), False, None))  # type: ignore[arg-type]
    assert world.announcer._patch() is None
    assert world.api.patches == []
    world.round()
    eventually(lambda: world.says(world.wanted()), SECONDS)


def test_another_backend_is_told(world: World) -> None:
    """A node whose backend changes says so."""
    world.round()
    eventually(lambda: world.api.patches, SECONDS)
    world.round(HOST_GW)
    eventually(lambda: world.says({A + "backend-type": "host-gw", A + "backend-data": "null"}), SECONDS)


def test_a_server_that_forbids_it_is_asked_again(world: World) -> None:
    """Refused, it is a problem that people see and asked again; it ends with the refusal."""
    world.api.refuses = 'nodes "n1" is forbidden'
    world.round()
    eventually(lambda: world.api.refused > 2, SECONDS)
    assert world.announcer.problems() == ('Node n1: its annotations cannot be written: 403 nodes "n1" is forbidden',)
    world.api.refuses = ""
    eventually(lambda: world.says(world.wanted()), SECONDS)
    eventually(lambda: not world.announcer.problems(), SECONDS)
