"""The agent's own parts on a ServiceNode: objects in, kernel programmed, flows ended; each round is one call.

The mode is a parameter; what the agent's loop adds (when a round is due) is the caller's business.
"""

from __future__ import annotations

import time
from ipaddress import ip_address, ip_network

from immutables import Map
from service_node import NODE_IPS, ServiceNode

from clusterstate.objects import Endpoint, EndpointPort, EndpointSlice, Node, NodeAddress, Service, ServicePort
from clusterstate.snapshot import Snapshot, Update
from kernelstate.linux import netns, sysctl
from kernelstate.linux.conntrack import Conntrack
from kernelstate.objects.address import Prefix
from kernelstate.ports import Reconciler
from nodeplane.config import parse_config
from nodeplane.flows import FlowKeeper
from nodeplane.host_kernel import host_kernel
from nodeplane.pipeline import HostFacts, Pipeline

NODE = Node(
    "n1",
    tuple(NodeAddress("InternalIP", ip_address(a)) for a in NODE_IPS.values()),
    (ip_network("10.244.0.0/16"), ip_network("fd00:244::/32")),
)
FACTS = HostFacts(tuple(Prefix.parse(a) for a in NODE_IPS.values()))


def service(ip: str, ports: dict[str, int], *, name: str = "web", node_port: int = 0, affinity: int = 0) -> Service:
    """Return a Service of one port a protocol; all ports lead to 8080."""
    found = tuple(ServicePort(p.lower(), p, port, 8080, node_port) for p, port in ports.items())  # type: ignore[arg-type]
    return Service(
        "default",
        name,
        type="NodePort" if node_port else "ClusterIP",
        cluster_ips=(ip_address(ip),),
        ports=found,
        affinity_seconds=affinity,
    )


def endpoints(one: Service, addresses: list[str]) -> EndpointSlice:
    """Return the Service's slice; every address is a ready endpoint on this node."""
    return EndpointSlice(
        one.namespace,
        f"{one.name}-1",
        one.name,
        one.cluster_ips[0].version,
        tuple(Endpoint(ip_address(a), node="n1") for a in addresses),
        tuple(EndpointPort(p.name, p.protocol, 8080) for p in one.ports),
    )


class ProgrammedNode:
    """What an agent holds, without its loop."""

    def __init__(self, rig: ServiceNode, mode: str, **options: object) -> None:
        self.rig = rig
        config = parse_config(
            {
                "apiVersion": "nodeplane.dev/v1alpha1",
                "kind": "NodeConfiguration",
                "nodeName": "n1",
                "services": {"mode": mode, "clusterCIDR": "10.244.0.0/16"},
                "serviceOptions": options,
                # No lock of the whole machine's, as the legacy variant has one: other tests may hold it for long.
                "iptablesVariant": "nft",
            }
        )
        assert config.services is not None
        self.pipeline = Pipeline(config)
        self.flows = FlowKeeper(Conntrack(), config.services)
        self.revision = 0
        with netns.inside(rig.node):
            sysctl.write("net/ipv4/conf/all/route_localnet", "1")
            self.kernel = host_kernel(config, 100).kernel
        for part in self.kernel.retired:  # a fresh namespace holds nothing of other modes
            _close(part)
        self.kernel.retired.clear()

    def close(self) -> None:
        """Close the kernel's parts; what is programmed goes with the namespace."""
        for part in self.kernel.parts:
            _close(part)

    def program(self, *services: tuple[Service, list[str]]) -> None:
        """Bring the node to exactly these Services, each with its endpoints' addresses."""
        self.revision += 1
        slices = [endpoints(one, addresses) for one, addresses in services]
        snapshot = Snapshot(
            self.revision,
            Map({(one.namespace, one.name): one for one, _ in services}),
            Map({(s.namespace, s.service): Map({s.ref: s}) for s in slices}),
            Map({"n1": NODE}),
        )
        desired = self.pipeline.update(Update(snapshot, None), FACTS)
        self.flows.take(desired.stale, time.monotonic())
        with netns.inside(self.rig.node):
            for name, value in desired.services.sysctls:
                sysctl.write(name, value)
            self.kernel.set_desired(desired)
            reports = self.kernel.sync()
        assert all(report.ok for report in reports), reports
        self.end_flows()

    def look(self) -> bool:
        """Do what the agent does each second: see whether something is due, and if so do it."""
        with netns.inside(self.rig.node):
            if self.kernel.drifted():
                assert all(report.ok for report in self.kernel.sync())
        return True

    def end_flows(self) -> int:
        """End the flows that are due; return how many."""
        with netns.inside(self.rig.node):
            report = self.flows.sync(frozenset(FACTS.local_addresses), time.monotonic())
        assert report.ok, report.errors
        return report.changed


def _close(part: Reconciler) -> None:
    """Close the sockets of a part that holds any."""
    close = getattr(getattr(part, "_port", None), "close", None)
    if close is not None:
        close()
