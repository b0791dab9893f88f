"""Made-up clusters with NetworkPolicies, always the same: pods of one node that others may reach, and who these are.

    one pod     server-0 is selected by N policies, each lets one client in                 as when every client comes with its policy
    full node   110 pods, policy k selects pod k % 110 and lets one client in               the kubelet's most, N policies over all
    crowded     110 pods that a policy isolates, the last is selected by N - 1 more, each of which lets one client in
    peers       server-0 is selected by one policy that lets N pods in, by their label
    blocks      the same with N address blocks of two addresses each, of which no two touch
    teams       N pods of this node in groups of ten, each group selected by ten policies that let ten other groups in

Servers are on node-1 and listen on TCP 8080; clients, apart from those of *teams*, are on node-2, the client of policy k, or peer
number k, at 10.240.1.0 + k, that of block k at 10.240.1.0 + 4k. All let in on that port alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address
from pathlib import Path

import msgspec

from bench.cluster import NAMESPACE, NODE, Raw, endpoint_address, node
from bench.injection import FIRST_CLIENT

PORT = 8080
PODS = 110
"""Pods of a full node: the kubelet's default for maxPods."""
BLOCK_STRIDE = 4
"""Addresses from one block to the next."""
TEAM = 10
"""Pods of a group, and policies that select it."""


def server_address(number: int) -> int:
    """Return the address of a pod of this node."""
    return endpoint_address(number, 0)


def client_address(number: int) -> int:
    """Return the address of a pod elsewhere that one policy, or the only one, lets in."""
    return FIRST_CLIENT + number


def pod(name: str, address: int, node_name: str, **labels: str) -> Raw:
    """Return a running pod."""
    ip = str(IPv4Address(address))
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "labels": labels,
            "uid": f"{address:08x}-0000-4000-8000-0000000000aa",
        },
        "spec": {
            "nodeName": node_name,
            "containers": [{"name": "main", "ports": [{"containerPort": PORT, "protocol": "TCP"}]}],
        },
        "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]},
    }


def policy(name: str, selected: dict[str, str], peers: list[Raw]) -> Raw:
    """Return a policy that lets these peers in on the servers' port, none: nobody; no label: every pod of the namespace is selected."""
    ingress = [{"from": peers, "ports": [{"protocol": "TCP", "port": PORT}]}]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "podSelector": {"matchLabels": selected},
            "policyTypes": ["Ingress"],
            "ingress": ingress if peers else [],
        },
    }


def labelled(**labels: str) -> Raw:
    """Return a peer: the pods of the namespace with these labels."""
    return {"podSelector": {"matchLabels": labels}}


# -- clusters ----------------------------------------------------------------------------------------------------------


def one_pod(policies: int) -> Iterator[Raw]:
    """Yield *one pod*."""
    yield from _servers(1)
    yield from _policy_for_each_client(policies, 1)


def full_node(policies: int) -> Iterator[Raw]:
    """Yield *full node*."""
    yield from _servers(PODS)
    yield from _policy_for_each_client(policies, PODS)


def crowded(number: int) -> Iterator[Raw]:
    """Yield *crowded*."""
    yield from _servers(PODS)
    yield policy("isolates-all", {}, [])
    yield from _policy_for_each_client(number - 1, 1, first=PODS - 1)


def peers(number: int) -> Iterator[Raw]:
    """Yield *peers*."""
    yield from _servers(1)
    yield policy("clients", {"app": "server-0"}, [labelled(role="client")])
    for k in range(number):
        yield pod(f"client-{k:05d}", client_address(k), "node-2", role="client")


def blocks(number: int) -> Iterator[Raw]:
    """Yield *blocks*."""
    yield from _servers(1)
    cidrs = (f"{IPv4Address(client_address(k * BLOCK_STRIDE))}/31" for k in range(number))
    yield policy("clients", {"app": "server-0"}, [{"ipBlock": {"cidr": cidr}} for cidr in cidrs])


def teams(pods: int) -> Iterator[Raw]:
    """Yield *teams*: as many policies as pods."""
    yield from (node(number) for number in (1, 2))
    groups = max(1, pods // TEAM)
    for number in range(pods):
        yield team_pod(number, number // TEAM % groups)
    for group in range(groups):
        for k in range(TEAM):
            peer = labelled(team=f"team-{(group + 7 * k + 1) % groups:03d}")
            yield policy(f"team-{group:03d}-{k}", {"team": f"team-{group:03d}"}, [peer])


def team_pod(number: int, group: int) -> Raw:
    """Return a pod of *teams*."""
    return pod(f"member-{number:05d}", server_address(number), NODE, team=f"team-{group:03d}", tier="inner")


def write(path: Path, objects: Iterable[Raw]) -> None:
    """Write objects as one JSON List."""
    path.write_bytes(msgspec.json.encode({"apiVersion": "v1", "kind": "List", "items": list(objects)}))


def put(directory: Path, one: Raw) -> Path:
    """Write one object to a file of its own, so that a reader sees the old version or the new one; return where."""
    path = directory / f"{one['kind'].lower()}_{one['metadata']['name']}.json"
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_bytes(msgspec.json.encode(one))
    fresh.replace(path)
    return path


def _servers(number: int) -> Iterator[Raw]:
    yield from (node(n) for n in (1, 2))
    for k in range(number):
        yield pod(f"server-{k}", server_address(k), NODE, app=f"server-{k}")


def _policy_for_each_client(policies: int, servers: int, first: int = 0) -> Iterator[Raw]:
    for k in range(policies):
        yield pod(f"client-{k:05d}", client_address(k), "node-2", client=f"{k:05d}")
        yield policy(f"lets-{k:05d}-in", {"app": f"server-{first + k % servers}"}, [labelled(client=f"{k:05d}")])
