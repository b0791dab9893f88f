"""EndpointSlices from selectors, as the endpoint slice controller makes them.

One slice per Service, family and set of resolved ports (a named target port may differ from pod to pod), at most 100 endpoints
each. Conditions as the controller sets them: ``serving`` is the pod's readiness, ``terminating`` its deletion, ``ready`` the one
without the other, or always with publishNotReadyAddresses. Which backends traffic then goes to is the agents' question.
Source: k8s.io/endpointslice, KEP-1672 (terminating), KEP-4444 and KEP-3015 (trafficDistribution).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from typing import NamedTuple

import msgspec

from clusterstate.objects import EndpointSlice
from clusterstate.parse import parse_object
from clusterstate.print import print_object
from netnslab.given import Raw

LARGEST = 100
MANAGED_BY, MIRRORED_BY = "endpointslice-controller.k8s.io", "endpointslicemirroring-controller.k8s.io"
MADE_BY = {"nodeplane.dev/made-by": "netns-lab"}
"""The annotation of what the lab's control plane made: it may take it away again."""
SERVICE_LABEL = "kubernetes.io/service-name"


class ResolvedPort(NamedTuple):
    """A Service port with the number its target has in a pod."""

    name: str
    protocol: str
    port: int


def slices_for(service: Raw, pods: Iterable[Raw], zones: Mapping[str, str]) -> list[Raw]:
    """Return the slices of a Service with a selector; ``pods`` and ``service`` are complete, ``zones`` is by node."""
    spec, metadata = service["spec"], service["metadata"]
    found: dict[tuple[int, tuple[ResolvedPort, ...]], list[Raw]] = {}
    families: list[int] = [6 if f == "IPv6" else 4 for f in spec["ipFamilies"]]
    for pod in pods:
        if not _selected(spec["selector"], metadata["namespace"], pod):
            continue
        ports = _ports(spec.get("ports") or [], pod)
        if ports is None:
            continue
        for ip in pod["status"]["podIPs"]:
            family: int = ip_address(ip["ip"]).version
            if family in families:
                publish = bool(spec.get("publishNotReadyAddresses"))
                found.setdefault((family, ports), []).append(_endpoint(pod, ip["ip"], zones, publish=publish))
    slices: list[Raw] = []
    for family in families:
        groups = [(ports, endpoints) for (f, ports), endpoints in found.items() if f == family]
        chunks = [(p, e[i : i + LARGEST]) for p, e in groups for i in range(0, len(e), LARGEST)] or [((), [])]
        for number, (ports, endpoints) in enumerate(chunks, 1):
            _hint(endpoints, str(spec.get("trafficDistribution", "")))
            slices.append(_slice(metadata, family, number, ports, endpoints))
    return slices


def is_selected(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether labels hold everything a Service's selector asks for."""
    return all(labels.get(key) == value for key, value in selector.items())


def _selected(selector: Mapping[str, str], namespace: str, pod: Raw) -> bool:
    metadata = pod["metadata"]
    alive = pod["status"].get("phase") not in {"Succeeded", "Failed"}
    return alive and metadata.get("namespace") == namespace and is_selected(selector, metadata.get("labels") or {})


def _ports(stated: list[Raw], pod: Raw) -> tuple[ResolvedPort, ...] | None:
    """Resolve target ports in a pod; None if the Service has ports and the pod none of those named."""
    resolved = []
    for port in stated:
        protocol, target = port.get("protocol") or "TCP", port.get("targetPort") or port["port"]
        if isinstance(target, str) and not target.isdigit():
            containers = pod["spec"].get("containers") or []
            target = next(
                (
                    p["containerPort"]
                    for c in containers
                    for p in c.get("ports") or []
                    if p.get("name") == target and (p.get("protocol") or "TCP") == protocol
                ),
                None,
            )
        if target is not None:
            resolved.append(ResolvedPort(port.get("name") or "", protocol, int(target)))
    return tuple(resolved) if resolved or not stated else None


def is_ready(pod: Raw) -> bool:
    """Whether a pod's Ready condition holds."""
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in pod["status"].get("conditions") or [])


def _endpoint(pod: Raw, ip: str, zones: Mapping[str, str], *, publish: bool) -> Raw:
    metadata, node, ready = pod["metadata"], pod["spec"]["nodeName"], is_ready(pod)
    terminating = bool(metadata.get("deletionTimestamp"))
    return {
        "addresses": [ip],
        "conditions": {"ready": publish or (ready and not terminating), "serving": ready, "terminating": terminating},
        "nodeName": node,
        **({"zone": zones[node]} if zones.get(node) else {}),
        "targetRef": {"kind": "Pod", "namespace": metadata["namespace"], "name": metadata["name"]},
    }


def _hint(endpoints: list[Raw], distribution: str) -> None:
    """Fill in hints for ``spec.trafficDistribution``: each endpoint is for its own zone, or its own node."""
    if distribution not in {"PreferClose", "PreferSameZone", "PreferSameNode"}:
        return
    for endpoint in endpoints:
        hints = {"forZones": [{"name": endpoint["zone"]}]} if "zone" in endpoint else {}
        if distribution == "PreferSameNode":
            hints["forNodes"] = [{"name": endpoint["nodeName"]}]
        if hints:
            endpoint["hints"] = hints


def _slice(metadata: Raw, family: int, number: int, ports: Iterable[ResolvedPort], endpoints: list[Raw]) -> Raw:
    name = f"{metadata['name']}-ipv{family}" + (f"-{number}" if number > 1 else "")
    labels = {SERVICE_LABEL: metadata["name"], "endpointslice.kubernetes.io/managed-by": MANAGED_BY}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": metadata["namespace"], "labels": labels, "annotations": dict(MADE_BY)},
        "addressType": f"IPv{family}",
        "endpoints": sorted(endpoints, key=lambda e: str(e["targetRef"]["name"])),
        "ports": [{"name": p.name, "protocol": p.protocol, "port": p.port} for p in ports],
    }


# -- Endpoints, the older form -----------------------------------------------------------------------------------------


def endpoints_for(service: Raw, slices: Iterable[Raw]) -> Raw:
    """Return the Endpoints object of a Service's slices: `kubectl get endpoints`. Of the Service's first family, as ever."""
    metadata = service["metadata"]
    subsets = []
    for one in slices:
        if one["addressType"] != service["spec"]["ipFamilies"][0] or not one["endpoints"]:
            continue
        subset: Raw = {}
        for field, ready in (("addresses", True), ("notReadyAddresses", False)):
            found = [e for e in one["endpoints"] if e["conditions"]["ready"] is ready]
            if found:
                subset[field] = [
                    {"ip": e["addresses"][0], "nodeName": e["nodeName"], "targetRef": e["targetRef"]} for e in found
                ]
        subsets.append({**subset, "ports": one["ports"]})
    labels = {"endpoints.kubernetes.io/managed-by": "endpoint-controller"}
    about = {"name": metadata["name"], "namespace": metadata["namespace"], "labels": labels, "annotations": dict(MADE_BY)}
    return {"apiVersion": "v1", "kind": "Endpoints", "metadata": about, "subsets": subsets}


def mirrored_slices(endpoints: Raw) -> list[Raw]:
    """Return the slices of an Endpoints object that somebody gave, as the mirroring controller makes them."""
    made = [one for one in parse_object(endpoints, "").objects if isinstance(one, EndpointSlice)]
    found = []
    for number, one in enumerate(made, 1):
        name = f"{one.service}-mirrored-{number}"
        labels = {**one.labels, SERVICE_LABEL: one.service, "endpointslice.kubernetes.io/managed-by": MIRRORED_BY}
        raw = print_object(msgspec.structs.replace(one, name=name, labels=labels, mirrored=False))
        found.append({**raw, "metadata": {**raw["metadata"], "annotations": dict(MADE_BY)}})
    return found
