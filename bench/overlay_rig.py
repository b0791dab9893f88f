"""Two nodes with a pod each, and what lies between them: what the overlay's benchmarks send through.

    .-- pod a ------.   .-- node a -------------------.      .-- node b -------------------.   .-- pod b ------.
    | eth0 ---------|---|- pod0         eth0 ---------|------|---- eth0          pod0 -----|---|- eth0         |
    | 10.244.1.2/32 |   |               192.168.1.1   |      |     192.168.1.2             |   | 10.244.2.2/32 |
    '---------------'   '-----------------------------'      '-----------------------------'   '---------------'

A pod hangs on a routed veth, as ``nodeplane-cni`` makes it, or on a ``cni0`` bridge. The link between the nodes passes packets of
64 KiB as they are, as virtio and links within one host do, or ``segments``: then what leaves has the underlay's MTU, and the
receiver puts together what it can (GRO). How packets get from node to node is for ``overlay_paths.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec

from bench.overlay_offloads import change_some, segments_in_hardware, set_features
from kernelstate.linux import netns, sysctl

UNDERLAY_MTU = 1500
NETWORK = "10.244.0.0/16"
GATEWAY = "169.254.1.1"
UPLINK, POD_LINK, BRIDGE = "eth0", "pod0", "cni0"


class End(msgspec.Struct, frozen=True):
    """One node and its pod: the names of their namespaces. ``number`` is 1 or 2."""

    number: int
    node: str
    pod: str

    @property
    def name(self) -> str:
        """The Node's name."""
        return f"node-{self.number}"

    @property
    def node_ip(self) -> str:
        """The node's address."""
        return f"192.168.1.{self.number}"

    @property
    def pod_cidr(self) -> str:
        """The network of the node's pods."""
        return f"10.244.{self.number}.0/24"

    @property
    def pod_ip(self) -> str:
        """The pod's address."""
        return f"10.244.{self.number}.2"

    @property
    def bridge_ip(self) -> str:
        """The bridge's address, where there is one: what flannel gives ``cni0``."""
        return f"10.244.{self.number}.1"


class Rig(msgspec.Struct, frozen=True):
    """Two ends; traffic goes from the pod of ``a`` to the pod of ``b``."""

    a: End
    b: End

    @property
    def ends(self) -> tuple[End, End]:
        """Both."""
        return self.a, self.b

    @property
    def namespaces(self) -> tuple[str, ...]:
        """All four namespaces."""
        return self.a.pod, self.a.node, self.b.node, self.b.pod


@contextlib.contextmanager
def open_rig() -> Iterator[Rig]:
    """Make both nodes and the link between them, and pods without a link; gone afterwards. Raises KernelRefusedError."""
    stem = f"np-bench-{os.getpid()}-{secrets.token_hex(3)}"
    with contextlib.ExitStack() as undo:
        for word in ("a", "b", "pod-a", "pod-b"):
            netns.create(f"{stem}-{word}")
            undo.callback(netns.delete, f"{stem}-{word}")
        rig = Rig(End(1, f"{stem}-a", f"{stem}-pod-a"), End(2, f"{stem}-b", f"{stem}-pod-b"))
        batch(
            rig.a.node,
            f"link add {UPLINK} mtu {UNDERLAY_MTU} type veth peer name {UPLINK} mtu {UNDERLAY_MTU} netns {rig.b.node}",
        )
        for end in rig.ends:
            batch(end.node, f"addr add {end.node_ip}/24 dev {UPLINK}", f"link set {UPLINK} up")
            netns.call(end.node, sysctl.write, "net.ipv4.ip_forward", 1)
        yield rig


def batch(namespace: str, *lines: str, tool: str = "ip") -> None:
    """Run lines of ``ip`` (or another tool with ``-batch``) in a namespace. Raises KernelRefusedError."""
    netns.run(namespace, [tool, "-batch", "-"], stdin="\n".join(lines))


def attach_routed(end: End, mtu: int) -> None:
    """Hang the pod on a veth of its own, to which the node has a route."""
    batch(
        end.node,
        f"link add {POD_LINK} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {end.pod}",
        f"link set {POD_LINK} up",
        f"route add {end.pod_ip}/32 dev {POD_LINK} scope link",
    )
    batch(
        end.pod,
        f"addr add {end.pod_ip}/32 dev eth0",
        "link set eth0 up",
        f"route add {GATEWAY}/32 dev eth0 scope link",
        f"route add default via {GATEWAY} dev eth0",
        f"neigh replace {GATEWAY} lladdr {mac(end.node, POD_LINK)} dev eth0 nud permanent",
    )
    batch(end.node, f"neigh replace {end.pod_ip} lladdr {mac(end.pod, 'eth0')} dev {POD_LINK} nud permanent")


def attach_bridged(end: End, mtu: int) -> None:
    """Hang the pod on ``cni0``, as flannel's plugin has the bridge plugin do it: the bridge is the gateway, ports may hairpin."""
    length = end.pod_cidr.partition("/")[2]
    batch(
        end.node,
        f"link add {BRIDGE} mtu {mtu} type bridge",
        f"addr add {end.bridge_ip}/{length} dev {BRIDGE}",
        f"link set {BRIDGE} up",
        f"link add {POD_LINK} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {end.pod}",
        f"link set {POD_LINK} up master {BRIDGE}",
        f"link set {POD_LINK} type bridge_slave hairpin on",
    )
    batch(
        end.pod,
        f"addr add {end.pod_ip}/{length} dev eth0",
        "link set eth0 up",
        f"route add {NETWORK} via {end.bridge_ip}",
        f"route add default via {end.bridge_ip}",
    )


def mac(namespace: str, link: str) -> str:
    """Return a link's MAC address."""
    return str(json.loads(netns.run(namespace, ["ip", "-j", "link", "show", "dev", link]))[0]["address"])


@contextlib.contextmanager
def segmenting(rig: Rig) -> Iterator[None]:
    """While the body runs no packet larger than the MTU crosses between the nodes; they are put together again on arrival."""
    with contextlib.ExitStack() as undo:
        for end in rig.ends:
            with netns.inside(end.node):
                changed = change_some(UPLINK, segments_in_hardware, on=False) | set_features(UPLINK, {"rx-gro": True})
            undo.callback(netns.call, end.node, set_features, UPLINK, changed)
        yield


def drops(rig: Rig) -> int:
    """Return how many packets the links of all four namespaces have dropped so far, on their way in or out."""
    return sum(netns.call(name, _link_drops) for name in rig.namespaces)


def _link_drops() -> int:
    lines = Path("/proc/thread-self/net/dev").read_text(encoding="ascii").splitlines()
    fields = [line.partition(":")[2].split() for line in lines if ":" in line]
    return sum(int(own[3]) + int(own[11]) for own in fields)
