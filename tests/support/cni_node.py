"""A node for CNI plugins, and pods for them to attach: a network namespace, and directories that are the test's own.

    node (netns; 192.0.2.1 and 2001:db8::1 on lo)         pod (netns, empty until ADD)
    <directory>/subnet.env                                container ID = namespace's name
    <directory>/records     what nodeplane-cni keeps
    <directory>/networks    what host-local keeps
    <directory>/results     what the runtime keeps

Plugins are executed as a container runtime does it (netnslab/cni_runtime.py), with the node's namespace as theirs.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kernelstate.linux import netns
from netnslab.cni_runtime import CniRuntime, Pod

PLUGINS = f"{Path(sys.executable).parent}:/usr/lib/cni:/opt/cni/bin"
V4, V6 = "10.244.1.0/24", "fd00:244:0:1::/64"
NODE = ("192.0.2.1", "2001:db8::1")
DUAL_STACK = """FLANNEL_NETWORK=10.244.0.0/16
FLANNEL_SUBNET=10.244.1.1/24
FLANNEL_IPV6_NETWORK=fd00:244::/48
FLANNEL_IPV6_SUBNET=fd00:244:0:1::1/64
FLANNEL_MTU=1400
FLANNEL_IPMASQ=true
"""
CAPABILITIES = {"ips": True, "mac": True, "portMappings": True}


def ip(namespace: str, *words: str) -> str:
    """Run iproute2 in a namespace; return what it printed."""
    done = subprocess.run(["ip", "-n", namespace, *words], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def pings(namespace: str, address: str, *options: str) -> bool:
    """Whether an address answers a packet from a namespace."""
    command = ["ip", "netns", "exec", namespace, "ping", "-c1", "-W2", *options, address]
    return subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0


class CniNode:
    """A node. ``new_netns`` makes a namespace that goes with the test."""

    def __init__(self, directory: Path, new_netns: Callable[[], str], subnet_env: str = DUAL_STACK) -> None:
        self.directory, self.new_netns, self.netns = directory, new_netns, new_netns()
        self.subnet_file = directory / "subnet.env"
        self.subnet_file.write_text(subnet_env)
        for address in NODE:
            ip(self.netns, "address", "add", address, "dev", "lo", *(["nodad"] if ":" in address else []))

    def plugin(self, **fields: Any) -> dict[str, Any]:
        """Return a plugin's object in a conflist, with everything it keeps in this node's directory."""
        own = {"subnetFile": str(self.subnet_file), "dataDir": str(self.directory / "records"), "capabilities": CAPABILITIES}
        own["policySocket"] = str(self.directory / "policy.sock")
        own["ipam"] = {"dataDir": str(self.directory / "networks")}
        return {"type": "nodeplane-cni", **own, **fields}

    def runtime(self, *plugins: dict[str, Any], version: str = "1.1.0", name: str = "np") -> NodeRuntime:
        """Return a runtime for one network of this node."""
        return NodeRuntime(self, {"name": name, "cniVersion": version, "plugins": list(plugins) or [self.plugin()]})

    def pod(self, **known: Any) -> Pod:
        """Make a pod that nothing is attached to yet; ``known`` is what the runtime knows (ips, mac, portMappings)."""
        return pod_in(self.new_netns(), **known)

    def links(self) -> set[str]:
        """Return the node's links but its loopback and bridges."""
        listed: list[dict[str, Any]] = json.loads(ip(self.netns, "-d", "-j", "link"))
        kinds = {one["ifname"]: one.get("linkinfo", {}).get("info_kind") for one in listed}
        return {name for name, kind in kinds.items() if name != "lo" and kind != "bridge"}

    def left(self) -> set[str]:
        """Return everything pods have left: links, routes, neighbours, reservations, records, results."""
        routes = [
            one for family in ("-4", "-6") for one in ip(self.netns, family, "route", "show", "table", "main").splitlines()
        ]
        pods = [one for one in routes if " dev veth" in one]
        files = [p for part in ("records", "networks", "results") for p in (self.directory / part).rglob("*") if p.is_file()]
        kept = {str(p.relative_to(self.directory)) for p in files if p.name != "lock" and "last_reserved" not in p.name}
        neighbours = [one for one in ip(self.netns, "neigh").splitlines() if " dev veth" in one]
        return self.links() | {*pods, *neighbours} | kept


class NodeRuntime(CniRuntime):
    """A runtime whose plugins run in the node's namespace."""

    def __init__(self, node: CniNode, conflist: dict[str, Any]) -> None:
        super().__init__(conflist, PLUGINS, node.directory / "results")
        self.node = node

    def execute(
        self, verb: str, plugin: dict[str, Any], pod: Pod | None, previous: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Execute one plugin, in the node."""
        with netns.inside(self.node.netns):
            return super().execute(verb, plugin, pod, previous)


def pod_in(namespace: str, **known: Any) -> Pod:
    """Return the pod that a namespace is."""
    return Pod(namespace, str(netns.path(namespace)), runtime_config=known)


def addresses(result: dict[str, Any]) -> list[str]:
    """Return the addresses of a result without their lengths."""
    return [one["address"].split("/")[0] for one in result["ips"]]


@contextmanager
def namespaces() -> Iterator[Callable[[], str]]:
    """Make any number of namespaces, whose names nobody else has; all are deleted at the end, whatever is attached to them."""
    with ExitStack() as undo:

        def make() -> str:
            name = f"np-t-{os.getpid()}-{secrets.token_hex(4)}"
            netns.create(name)
            undo.callback(netns.delete, name)
            return name

        yield make
