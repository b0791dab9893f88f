"""Objects as rows, as `kubectl get` asks for them: the server decides which columns there are, and what stands in them.

    Accept: application/json;as=Table;v=v1;g=meta.k8s.io  -->  {"kind": "Table", "columnDefinitions": [...], "rows": [...]}

Columns of priority 1 are shown with `-o wide`. The headings and words are those of Kubernetes' own printers.
Source: k8s.io/kubernetes, pkg/printers/internalversion; KEP-555 (server-side get).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, NamedTuple

from netnslab.api.kinds import Kind
from netnslab.api.selectors import Raw

NONE, MOST = "<none>", 3
"""How many endpoints of a list are named."""


class Column(NamedTuple):
    """A heading, and what stands below it; ``now`` is the time ages are reckoned from."""

    name: str
    cell: Callable[[Raw, datetime], Any]
    wide: bool = False
    type: str = "string"


def table(kind: Kind, rows: Iterable[Raw], version: int, include: str, now: datetime) -> Raw:
    """Return a Table. ``include``: how much of each object goes along, as in ``includeObject``: None, Metadata or Object."""
    columns = COLUMNS[kind.kind]
    definitions = [
        {
            "name": column.name,
            "type": column.type,
            "format": "name" if column.name == "Name" else "",
            "description": column.name,
            "priority": int(column.wide),
        }
        for column in columns
    ]
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": {"resourceVersion": str(version)},
        "columnDefinitions": definitions,
        "rows": [{"cells": [c.cell(raw, now) for c in columns], "object": _included(raw, include)} for raw in rows],
    }


def _included(raw: Raw, include: str) -> Raw | None:
    match include:
        case "None":
            return None
        case "Object":
            return raw
        case _:
            return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": raw["metadata"]}


# -- cells -------------------------------------------------------------------------------------------------------------


def age(stamp: str | None, now: datetime) -> str:
    """Return how long ago a time was, as kubectl says it: 42s, 5m3s, 12m, 3h20m, 9h, 2d5h, 30d."""
    if not stamp:
        return "<unknown>"
    seconds = max(0, int((now - datetime.fromisoformat(stamp).astimezone(UTC)).total_seconds()))
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if seconds < 120:
        return f"{seconds}s"
    if minutes < 10:
        return f"{minutes}m{seconds % 60}s" if seconds % 60 else f"{minutes}m"
    if hours < 3:
        return f"{minutes}m"
    if hours < 8:
        return f"{hours}h{minutes % 60}m" if minutes % 60 else f"{hours}h"
    if hours < 48:
        return f"{hours}h"
    return f"{days}d{hours % 24}h" if days < 8 and hours % 24 else f"{days}d"


def _name(raw: Raw, _now: datetime) -> str:
    return str(raw["metadata"]["name"])


def _age(raw: Raw, now: datetime) -> str:
    return age(raw["metadata"].get("creationTimestamp"), now)


def _at(*path: str, absent: Any = NONE) -> Callable[[Raw, datetime], Any]:
    """Return what reads one field."""

    def cell(raw: Raw, _now: datetime) -> Any:
        at: Any = raw
        for step in path:
            at = at.get(step) if isinstance(at, dict) else None
        return absent if at in (None, "") else at

    return cell


def _words(mapping: dict[str, str] | None) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted((mapping or {}).items())) or NONE


def _selector(raw: Raw, _now: datetime) -> str:
    return _words(raw["spec"].get("selector"))


def label_selector(selector: Raw | None) -> str:
    """Write a LabelSelector as kubectl does."""
    found = [f"{key}={value}" for key, value in sorted(((selector or {}).get("matchLabels") or {}).items())]
    for one in (selector or {}).get("matchExpressions") or []:
        values = ",".join(one.get("values") or [])
        plain = {"Exists": one["key"], "DoesNotExist": f"!{one['key']}"}
        found.append(plain.get(one["operator"]) or f"{one['key']} {one['operator'].lower()} ({values})")
    return ",".join(found) or NONE


def _is(raw: Raw, condition: str) -> bool:
    conditions = (raw.get("status") or {}).get("conditions") or []
    return any(c.get("type") == condition and c.get("status") == "True" for c in conditions)


def _pod_ready(raw: Raw, _now: datetime) -> str:
    count = len(raw["spec"].get("containers") or [])
    return f"{count if _is(raw, 'Ready') else 0}/{count}"


def _pod_status(raw: Raw, _now: datetime) -> str:
    if raw["metadata"].get("deletionTimestamp"):
        return "Terminating"
    status = raw.get("status") or {}
    return str(status.get("reason") or status.get("phase") or "Pending")


def _external_ip(raw: Raw, _now: datetime) -> str:
    spec = raw["spec"]
    if spec.get("type") == "ExternalName":
        return str(spec.get("externalName") or NONE)
    ingress = ((raw.get("status") or {}).get("loadBalancer") or {}).get("ingress") or []
    found = [str(one.get("ip") or one.get("hostname")) for one in ingress] + list(spec.get("externalIPs") or [])
    return ",".join(found) or ("<pending>" if spec.get("type") == "LoadBalancer" else NONE)


def _service_ports(raw: Raw, _now: datetime) -> str:
    found = []
    for port in raw["spec"].get("ports") or []:
        node_port = f":{port['nodePort']}" if port.get("nodePort") else ""
        found.append(f"{port['port']}{node_port}/{port.get('protocol') or 'TCP'}")
    return ",".join(found) or NONE


def _some(found: list[str]) -> str:
    more = f" + {len(found) - MOST} more..." if len(found) > MOST else ""
    return (",".join(found[:MOST]) + more) or NONE


def _endpoints(raw: Raw, _now: datetime) -> str:
    return _some(
        [
            f"[{address['ip']}]:{port['port']}" if ":" in address["ip"] else f"{address['ip']}:{port['port']}"
            for subset in raw.get("subsets") or []
            for port in subset.get("ports") or []
            for address in subset.get("addresses") or []
        ]
    )


def _slice_ports(raw: Raw, _now: datetime) -> str:
    return _some([str(port.get("port")) for port in raw.get("ports") or []]).replace(NONE, "<unset>")


def _slice_endpoints(raw: Raw, _now: datetime) -> str:
    return _some([one["addresses"][0] for one in raw.get("endpoints") or []]).replace(NONE, "<unset>")


def _node_status(raw: Raw, _now: datetime) -> str:
    ready = "Ready" if _is(raw, "Ready") else "NotReady"
    return f"{ready},SchedulingDisabled" if raw["spec"].get("unschedulable") else ready


def _roles(raw: Raw, _now: datetime) -> str:
    prefix = "node-role.kubernetes.io/"
    labels = raw["metadata"].get("labels") or {}
    return ",".join(sorted(key.removeprefix(prefix) for key in labels if key.startswith(prefix))) or NONE


def _address(kind: str) -> Callable[[Raw, datetime], str]:
    def cell(raw: Raw, _now: datetime) -> str:
        addresses = (raw.get("status") or {}).get("addresses") or []
        return next((str(one["address"]) for one in addresses if one.get("type") == kind), NONE)

    return cell


def _node_info(field: str) -> Callable[[Raw, datetime], Any]:
    return _at("status", "nodeInfo", field, absent="<unknown>")


def _count(field: str) -> Callable[[Raw, datetime], Any]:
    return _at("status", field, absent=0)


def _deployment_ready(raw: Raw, _now: datetime) -> str:
    return f"{(raw.get('status') or {}).get('readyReplicas', 0)}/{raw['spec'].get('replicas', 1)}"


def _template(field: str) -> Callable[[Raw, datetime], str]:
    def cell(raw: Raw, _now: datetime) -> str:
        return ",".join(str(one.get(field, "")) for one in raw["spec"]["template"]["spec"].get("containers") or [])

    return cell


def _match(raw: Raw, _now: datetime) -> str:
    return label_selector(raw["spec"].get("selector"))


def _pod_selector(raw: Raw, _now: datetime) -> str:
    return label_selector((raw.get("spec") or {}).get("podSelector"))


def _last_seen(raw: Raw, now: datetime) -> str:
    return age(raw.get("lastTimestamp") or raw.get("eventTime") or raw["metadata"].get("creationTimestamp"), now)


def _involved(raw: Raw, _now: datetime) -> str:
    about = raw.get("involvedObject") or {}
    return f"{str(about.get('kind', '')).lower()}/{about.get('name', '')}"


def _cidrs(raw: Raw, _now: datetime) -> str:
    return ",".join(raw["spec"].get("cidrs") or []) or NONE


NAME, AGE = Column("Name", _name), Column("Age", _age)
COLUMNS: dict[str, tuple[Column, ...]] = {
    "Pod": (
        NAME,
        Column("Ready", _pod_ready),
        Column("Status", _pod_status),
        Column("Restarts", lambda _raw, _now: "0"),
        AGE,
        Column("IP", _at("status", "podIP"), wide=True),
        Column("Node", _at("spec", "nodeName"), wide=True),
        Column("Nominated Node", _at("status", "nominatedNodeName"), wide=True),
        Column("Readiness Gates", lambda _raw, _now: NONE, wide=True),
    ),
    "Service": (
        NAME,
        Column("Type", _at("spec", "type")),
        Column("Cluster-IP", _at("spec", "clusterIP")),
        Column("External-IP", _external_ip),
        Column("Port(s)", _service_ports),
        AGE,
        Column("Selector", _selector, wide=True),
    ),
    "Endpoints": (NAME, Column("Endpoints", _endpoints), AGE),
    "EndpointSlice": (
        NAME,
        Column("AddressType", _at("addressType")),
        Column("Ports", _slice_ports),
        Column("Endpoints", _slice_endpoints),
        AGE,
    ),
    "Node": (
        NAME,
        Column("Status", _node_status),
        Column("Roles", _roles),
        AGE,
        Column("Version", _node_info("kubeletVersion")),
        Column("Internal-IP", _address("InternalIP"), wide=True),
        Column("External-IP", _address("ExternalIP"), wide=True),
        Column("OS-Image", _node_info("osImage"), wide=True),
        Column("Kernel-Version", _node_info("kernelVersion"), wide=True),
        Column("Container-Runtime", _node_info("containerRuntimeVersion"), wide=True),
    ),
    "Namespace": (NAME, Column("Status", _at("status", "phase", absent="Active")), AGE),
    "NetworkPolicy": (NAME, Column("Pod-Selector", _pod_selector), AGE),
    "ServiceCIDR": (NAME, Column("CIDRs", _cidrs), AGE),
    "ClusterNetworkPolicy": (
        NAME,
        Column("Tier", _at("spec", "tier")),
        Column("Priority", _at("spec", "priority"), type="integer"),
        AGE,
    ),
    "Deployment": (
        NAME,
        Column("Ready", _deployment_ready),
        Column("Up-to-date", _count("updatedReplicas"), type="integer"),
        Column("Available", _count("availableReplicas"), type="integer"),
        AGE,
        Column("Containers", _template("name"), wide=True),
        Column("Images", _template("image"), wide=True),
        Column("Selector", _match, wide=True),
    ),
    "ReplicaSet": (
        NAME,
        Column("Desired", _at("spec", "replicas", absent=1), type="integer"),
        Column("Current", _count("replicas"), type="integer"),
        Column("Ready", _count("readyReplicas"), type="integer"),
        AGE,
        Column("Containers", _template("name"), wide=True),
        Column("Images", _template("image"), wide=True),
        Column("Selector", _match, wide=True),
    ),
    "Event": (
        Column("Last Seen", _last_seen),
        Column("Type", _at("type")),
        Column("Reason", _at("reason")),
        Column("Object", _involved),
        Column("Source", _at("source", "component", absent=""), wide=True),
        Column("Message", _at("message", absent="")),
        Column("Name", _name, wide=True),
    ),
}
