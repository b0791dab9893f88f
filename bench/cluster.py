"""A made-up cluster of any size, always the same: N Services, each with one EndpointSlice of three endpoints.

    Service  bench/svc-00042   10.96.0.43:80/TCP  ClusterIP   --.
    slice    bench/svc-00042-a 10.128.0.126:8080, .127, .128    +-- on ten nodes in turn; node-1 is the one measured
    Node     node-1 ... node-10

Objects carry what the API server adds (uid, resourceVersion, labels, targetRef), because parsing has to get past it. Written as
one object a file (what a lab, or a mirror of the API, keeps) or as one JSON List (``kubectl get -o json``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from ipaddress import IPv4Address, ip_network
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

Raw: TypeAlias = dict[str, Any]

NAMESPACE = "bench"
NODE = "node-1"
NODES = 10
ENDPOINTS = 3
"""Endpoints of a Service that nobody has touched."""
CLUSTER_CIDR = "10.128.0.0/9"
_SERVICES, _PODS = IPv4Address("10.96.0.1"), IPv4Address("10.128.0.1")
_NODE_IPS, _NODE_PODS = IPv4Address("192.168.60.0"), IPv4Address("10.192.0.0")
_ROOM = 8
"""Pod addresses set aside for a Service, so that one can grow without meeting the next."""


def service_name(index: int) -> str:
    """Return the name of the Service with that number."""
    return f"svc-{index:05d}"


def service_address(index: int) -> int:
    """Return the ClusterIP of the Service with that number."""
    return int(_SERVICES) + index


def endpoint_address(index: int, i: int) -> int:
    """Return the address of an endpoint, counted from 0, of the Service with that number."""
    return int(_PODS) + index * _ROOM + i


def service(index: int) -> Raw:
    """Return a ClusterIP Service with one port."""
    name = service_name(index)
    address = str(IPv4Address(service_address(index)))
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(name, index, {"app": name}),
        "spec": {
            "clusterIP": address,
            "clusterIPs": [address],
            "internalTrafficPolicy": "Cluster",
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}],
            "selector": {"app": name},
            "sessionAffinity": "None",
            "type": "ClusterIP",
        },
        "status": {"loadBalancer": {}},
    }


def endpoint_slice(index: int, endpoints: int = ENDPOINTS) -> Raw:
    """Return the slice of the Service with that number."""
    name = service_name(index)
    return {
        "addressType": "IPv4",
        "apiVersion": "discovery.k8s.io/v1",
        "endpoints": [_endpoint(index, i) for i in range(endpoints)],
        "kind": "EndpointSlice",
        "metadata": _metadata(f"{name}-a", index, {"kubernetes.io/service-name": name, "app": name}),
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }


def node(number: int) -> Raw:
    """Return a Node, counted from 1, as flannel leaves it."""
    address = node_address(number)
    annotations = {
        "flannel.alpha.coreos.com/backend-type": "vxlan",
        "flannel.alpha.coreos.com/backend-data": json.dumps(
            {"VNI": 1, "VtepMAC": f"02:00:00:00:{number >> 8:02x}:{number & 255:02x}"}
        ),
        "flannel.alpha.coreos.com/kube-subnet-manager": "true",
        "flannel.alpha.coreos.com/public-ip": address,
    }
    labels = {"topology.kubernetes.io/zone": f"zone-{number % 3}"}
    cidr = str(ip_network((int(_NODE_PODS) + (number << 8), 24)))
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": f"node-{number}", "labels": labels, "annotations": annotations},
        "spec": {"podCIDR": cidr, "podCIDRs": [cidr]},
        "status": {"addresses": [{"type": "InternalIP", "address": address}]},
    }


def node_address(number: int) -> str:
    """Return the address of a Node, counted from 1; all are in one subnet of 22 bits."""
    return str(_NODE_IPS + number)


def everything(services: int, nodes: int) -> Iterator[Raw]:
    """Yield a cluster with any number of nodes."""
    yield from (node(number) for number in range(1, nodes + 1))
    for index in range(services):
        yield service(index)
        yield endpoint_slice(index)


def objects(services: int) -> Iterator[Raw]:
    """Return the whole cluster."""
    return everything(services, NODES)


def write_list(path: Path, services: int) -> None:
    """Write the cluster as one JSON List."""
    path.write_bytes(msgspec.json.encode({"apiVersion": "v1", "kind": "List", "items": list(objects(services))}))


def write_directory(directory: Path, services: int) -> None:
    """Write the cluster as one object a file."""
    directory.mkdir(parents=True, exist_ok=True)
    for one in objects(services):
        put(directory, one)


def put(directory: Path, one: Raw) -> None:
    """Write one object to its file, so that a reader sees the old version or the new one."""
    path = file_of(directory, one)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_bytes(msgspec.json.encode(one))
    fresh.replace(path)


def file_of(directory: Path, one: Raw) -> Path:
    """Return where an object lies."""
    return directory / f"{one['kind'].lower()}_{one['metadata']['name']}.json"


def _endpoint(index: int, i: int) -> Raw:
    return {
        "addresses": [str(IPv4Address(endpoint_address(index, i)))],
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "nodeName": f"node-{(index + i) % NODES + 1}",
        "targetRef": {"kind": "Pod", "name": f"{service_name(index)}-{i}", "namespace": NAMESPACE, "uid": _uid(index, i + 1)},
        "zone": f"zone-{(index + i) % NODES % 3}",
    }


def _metadata(name: str, index: int, labels: dict[str, str]) -> Raw:
    return {
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "labels": labels,
        "name": name,
        "namespace": NAMESPACE,
        "resourceVersion": str(100_000 + index),
        "uid": _uid(index, 0),
    }


def _uid(index: int, i: int) -> str:
    return f"{index:08x}-0000-4000-8000-{i:012x}"
