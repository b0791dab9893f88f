"""What a lab looks like: the facts as JSON has them, and the same as a drawing for people.

The JSON shape is a contract: others script against it. Facts come from the state, the objects as the agents see them, and the
agents' own status; nothing here changes anything.
"""

from __future__ import annotations

from typing import Any

import msgspec

from netnslab import agents, names, wiring
from netnslab.endpoints import SERVICE_LABEL
from netnslab.given import Raw
from netnslab.state import LabState
from netnslab.topology import ROUTER_HOST, host_address


def facts(state: LabState) -> dict[str, Any]:
    """Return the facts of `lab status -o json`."""
    return {
        "name": state.name,
        "nodes": [_node(state, n.name, n.ips, n.pod_cidrs) for n in state.topology.nodes],
        "pods": [
            {"namespace": p.namespace, "name": p.name, "node": p.node, "netns": p.netns, "ip": p.ips[0], "ips": list(p.ips)}
            for p in sorted(state.pods, key=lambda p: p.key)
        ],
        "services": services(state),
        "external": {
            "netns": state.node_netns(names.EXTERNAL),
            "ip": wiring.external_addresses(state)[0].partition("/")[0],
        },
        "kubeconfig": str(state.kubeconfig) if state.kubeconfig else None,
    }


def _node(state: LabState, node: str, ips: list[str], pod_cidrs: list[str]) -> dict[str, Any]:
    status, alive = agents.agent_status(state, node)
    return {
        "name": node,
        "netns": state.node_netns(node),
        "ip": ips[0],
        "pod_cidr": pod_cidrs[0],
        "agent_pid": status.pid if status is not None and alive else None,
        "synced": alive and agents.is_synced(state, status),
    }


def objects(state: LabState, kind: str) -> list[Raw]:
    """Return the objects of a kind as the agents see them, sorted by file."""
    return [msgspec.json.decode(p.read_bytes()) for p in sorted(state.objects.glob(f"{kind.lower()}_*.json"))]


def services(state: LabState) -> list[dict[str, Any]]:
    """Return each Service with its addresses, ports and how many endpoints are ready, a pod with two addresses counting once."""
    ready: dict[tuple[str, str], set[str]] = {}
    for one in objects(state, "EndpointSlice"):
        key = (one["metadata"].get("namespace", "default"), (one["metadata"].get("labels") or {}).get(SERVICE_LABEL, ""))
        up = [e for e in one.get("endpoints") or [] if (e.get("conditions") or {}).get("ready") is not False]
        ready.setdefault(key, set()).update((e.get("targetRef") or {}).get("name") or e["addresses"][0] for e in up)
    return [
        {
            "namespace": service["metadata"].get("namespace", "default"),
            "name": service["metadata"]["name"],
            "type": service["spec"].get("type", "ClusterIP"),
            "cluster_ips": [ip for ip in service["spec"].get("clusterIPs") or [] if ip != "None"],
            "ports": [
                {
                    "name": p.get("name", ""),
                    "protocol": p.get("protocol") or "TCP",
                    "port": p["port"],
                    "node_port": p.get("nodePort"),
                }
                for p in service["spec"].get("ports") or []
            ],
            "ready_endpoints": len(
                ready.get((service["metadata"].get("namespace", "default"), service["metadata"]["name"]), ())
            ),
        }
        for service in objects(state, "Service")
    ]


def drawing(state: LabState) -> list[str]:
    """Draw a lab with its real names and addresses."""
    found = facts(state)
    lines = [f"lab {state.name}: {state.topology.description or 'no description'}", ""]
    for segment in state.topology.segments:
        router = ", ".join(host_address(s, ROUTER_HOST) for s in segment.subnets)
        lines.append(f"  segment {segment.name}  {', '.join(segment.subnets)}   (router {router})")
        lines.append("   |")
        if segment is state.topology.segments[0]:
            lines.append(f"   +-- external  {found['external']['ip']}   a client outside the cluster")
        members = [n for n in state.topology.nodes if n.segment == segment.name]
        for node in members:
            fact = next(n for n in found["nodes"] if n["name"] == node.name)
            agent = f"agent {fact['agent_pid']}, {'in sync' if fact['synced'] else 'NOT in sync'}"
            shown = agent if fact["agent_pid"] else "NO AGENT RUNNING"
            lines.append(f"   +-- {node.name}  {', '.join(node.ips)}   pods {', '.join(node.pod_cidrs)}   [{shown}]")
            bar = " " if node is members[-1] else "|"
            lines += [
                f"   {bar}     +-- {p['namespace']}/{p['name']}  {', '.join(p['ips'])}" for p in _pods_of(found, node.name)
            ]
        lines.append("")
    for service in found["services"]:
        ports = ", ".join(_port(p) for p in service["ports"])
        where = ", ".join(service["cluster_ips"]) or "no address of its own"
        count = f"{service['ready_endpoints']} endpoint{'' if service['ready_endpoints'] == 1 else 's'}"
        lines.append(f"  Service {service['namespace']}/{service['name']}  {where}  {ports}  -> {count}")
    return lines


def _pods_of(found: dict[str, Any], node: str, most: int = 12) -> list[dict[str, Any]]:
    """Return a node's pods for the drawing; of very many the first, and how many more."""
    pods = [p for p in found["pods"] if p["node"] == node]
    if len(pods) <= most:
        return pods
    return [*pods[:most], {"namespace": "...", "name": f"{len(pods) - most} more", "ips": []}]


def _port(port: dict[str, Any]) -> str:
    node_port = f" (NodePort {port['node_port']})" if port["node_port"] else ""
    return f"{port['port']}/{port['protocol']}{node_port}"
