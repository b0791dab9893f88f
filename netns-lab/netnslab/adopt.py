"""Nodes out of given Node objects: they say where a lab's nodes are, where they say anything.

    a topology was stated    its nodes take on the addresses and podCIDRs of the Node objects of their names
    none was stated          the Node objects *are* the nodes; their addresses make the segments (one per /24, or /64)

So `lab up --objects cluster.yaml` builds the cluster of that file. Everything else of a Node object stays in the object.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

from netnslab.errors import LabInputError
from netnslab.given import Given, Raw
from netnslab.topology import Topology, parse_topology

SEGMENT_PREFIX = {4: 24, 6: 64}


def adopt_nodes(raw: dict[str, Any], given: Given, source: str, *, only_these: bool) -> Topology:
    """Return the topology of a decoded file, its nodes as Node objects have them. Raises LabInputError."""
    nodes = {ref.name: one for ref, one in given.items() if ref.kind == "Node"}
    if not nodes:
        return parse_topology(raw, source)
    if only_these:
        raw = {**raw, "segments": [], "nodes": [{"name": name} for name in nodes]}
    tables = [dict(n) for n in raw.get("nodes", []) if isinstance(n, dict)]
    for table in tables:
        if table.get("name") in nodes:
            table.update(_stated(nodes[table["name"]]))
    raw = {**raw, "nodes": tables}
    if only_these:
        raw["segments"] = _segments(tables)
        raw["cluster"] = {**raw.get("cluster", {}), **_pod_networks(tables, raw.get("cluster", {}))}
    return parse_topology(raw, f"{source} with the Node objects")


def _stated(node: Raw) -> dict[str, list[str]]:
    """Return ``ips`` and ``pod_cidrs`` where a Node object states them; one address per family, the first."""
    spec, status = node.get("spec") or {}, node.get("status") or {}
    ips: dict[int, str] = {}
    for address in status.get("addresses") or []:
        if address.get("type") == "InternalIP":
            ips.setdefault(ip_address(address["address"]).version, address["address"])
    cidrs = spec.get("podCIDRs") or ([spec["podCIDR"]] if spec.get("podCIDR") else [])
    return {**({"ips": list(ips.values())} if ips else {}), **({"pod_cidrs": cidrs} if cidrs else {})}


def _segments(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make a segment of the nodes that share a subnet, and put them on it. A node without addresses goes on the first."""
    found: dict[tuple[str, ...], str] = {}
    for node in nodes:
        key = tuple(
            str(ip_network(f"{ip}/{SEGMENT_PREFIX[ip_address(ip).version]}", strict=False)) for ip in node.get("ips", [])
        )
        if key:
            node["segment"] = found.setdefault(key, f"lan-{len(found) + 1}" if found else "lan")
    by_subnet: dict[str, str] = {}
    for key, name in found.items():
        for subnet in key:
            if by_subnet.setdefault(subnet, name) != name:
                raise LabInputError(f"Node objects: status.addresses: some nodes in {subnet} lack the other family")
    return [{"name": name, "subnets": list(key)} for key, name in found.items()] or [{"name": "lan"}]


def _pod_networks(nodes: list[dict[str, Any]], cluster: dict[str, Any]) -> dict[str, list[str]]:
    """Return the smallest pod networks, /16 or /48 at most, that hold all stated podCIDRs; the file's where they do."""
    stated = cluster.get("pod_cidrs") or ["10.244.0.0/16"]
    parts = [ip_network(c) for node in nodes for c in node.get("pod_cidrs", [])]
    networks: dict[int, str] = {ip_network(c).version: c for c in stated}
    for version, prefix in ((4, 16), (6, 48)):
        own = [p for p in parts if p.version == version]
        have = ip_network(networks[version]) if version in networks else None
        if own and not (have and all(p.subnet_of(have) for p in own)):  # type: ignore[arg-type]
            whole = own[0] if own[0].prefixlen <= prefix else own[0].supernet(new_prefix=prefix)
            while not all(p.subnet_of(whole) for p in own):  # type: ignore[arg-type]
                whole = whole.supernet()
            networks[version] = str(whole)
    return {"pod_cidrs": [networks[v] for v in sorted(networks)]}
