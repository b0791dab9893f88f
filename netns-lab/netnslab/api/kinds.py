"""The kinds that the lab's API server serves, as discovery tells them: the one place that lists them.

Events are kept in their core form, in which kubectl asks for them; those who write them in the form of events.k8s.io, as
agents do, are understood (``events.py``).
"""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """A kind of object. ``plural`` is what stands in a URL."""

    group: str
    version: str
    kind: str
    plural: str
    short: tuple[str, ...] = ()
    namespaced: bool = True
    has_status: bool = False
    """Whether its status is written apart from the rest, at ``.../status``."""
    in_all: bool = False
    """Whether `kubectl get all` shows it."""

    @property
    def api_version(self) -> str:
        """Return ``apps/v1``, or ``v1`` for the core group."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def base(self) -> str:
        """Return the path below which the group's resources are."""
        return f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"


POD = Kind("", "v1", "Pod", "pods", ("po",), has_status=True, in_all=True)
SERVICE = Kind("", "v1", "Service", "services", ("svc",), has_status=True, in_all=True)
ENDPOINTS = Kind("", "v1", "Endpoints", "endpoints", ("ep",))
NODE = Kind("", "v1", "Node", "nodes", ("no",), namespaced=False, has_status=True)
NAMESPACE = Kind("", "v1", "Namespace", "namespaces", ("ns",), namespaced=False, has_status=True)
EVENT = Kind("", "v1", "Event", "events", ("ev",))
SLICE = Kind("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices")
DEPLOYMENT = Kind("apps", "v1", "Deployment", "deployments", ("deploy",), has_status=True, in_all=True)
REPLICA_SET = Kind("apps", "v1", "ReplicaSet", "replicasets", ("rs",), has_status=True, in_all=True)
NETWORK_POLICY = Kind("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies", ("netpol",))
SERVICE_CIDR = Kind("networking.k8s.io", "v1", "ServiceCIDR", "servicecidrs", namespaced=False, has_status=True)
CLUSTER_POLICY = Kind(
    "policy.networking.k8s.io", "v1alpha2", "ClusterNetworkPolicy", "clusternetworkpolicies", ("cnp",), namespaced=False
)
KINDS = (
    *(POD, SERVICE, ENDPOINTS, NODE, NAMESPACE, EVENT, SLICE, DEPLOYMENT, REPLICA_SET),
    *(NETWORK_POLICY, SERVICE_CIDR, CLUSTER_POLICY),
)
BY_NAME = {kind.kind: kind for kind in KINDS}
BY_PATH = {(kind.group, kind.version, kind.plural): kind for kind in KINDS}
OF_THE_LAB = frozenset(kind.kind for kind in KINDS) - {"Event", "Deployment", "ReplicaSet"}
"""What the lab's control plane reads; of the others it is made by the controllers, or nobody reads it but people."""
