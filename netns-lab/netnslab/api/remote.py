"""The lab's side of its API server: starting the process, and asking it to change objects or to say when all is in effect."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterable
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from ipaddress import ip_address, ip_network
from typing import Any

import msgspec

from clusterstate.objects import ObjectRef
from netnslab import processes
from netnslab.api.access import ADMIN, AGENT, PORT, Access, node_addresses, node_server, server_names
from netnslab.endpoints import SERVICE_LABEL
from netnslab.errors import LabError, LabInputError
from netnslab.given import Given, Raw, reference
from netnslab.state import LabState, Process
from netnslab.topology import Topology

LABEL, MODULE = "api server", "netnslab.api.server"
ANSWER_SECONDS = 120.0


class Answer(msgspec.Struct):
    """What the server did with many objects."""

    created: list[ObjectRef] = []
    changed: list[ObjectRef] = []
    deleted: list[ObjectRef] = []
    missing: list[ObjectRef] = []
    warnings: list[str] = []
    version: int = 0


def access(state: LabState) -> Access:
    """Return the files of a lab's access."""
    return Access(state.root / "api")


def start(state: LabState) -> None:
    """Make certificates and kubeconfigs, start the server, and wait until it listens. Raises LabError."""
    found = access(state)
    found.make(server_names(state.topology), {who: secrets.token_urlsafe(24) for who in (ADMIN, AGENT)})
    run(state)
    found.write(found.kubeconfig, f"https://127.0.0.1:{state.api_port}", ADMIN)
    for node in state.topology.nodes:
        found.write(state.node_dir(node.name) / "run/kubeconfig", node_server(state.topology, node.name), AGENT)


def run(state: LabState) -> None:
    """Start the server's process, at the port it had if it had one; the state is written with what it is. Raises LabError."""
    with (state.root / "api/server.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE, state.name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )
    begun = processes.start_time(process.pid)
    if begun is not None:
        state.processes = [p for p in state.processes if p.what != LABEL] + [Process(process.pid, begun, LABEL)]
    state.save()
    assert process.stdout is not None
    with process.stdout as out:
        line = out.readline()
    if not line:
        said = (state.root / "api/server.log").read_text(errors="replace").strip().splitlines()
        raise LabError(f"the lab's API server did not start: {said[-1] if said else 'it said nothing'}")
    processes.let_run(process)
    state.api_port = int(json.loads(line)["port"])
    state.save()


# -- asking --------------------------------------------------------------------------------------------------------------


def apply(state: LabState, objects: Given) -> Answer:
    """Create or replace objects, all or none; return when that is in effect. Raises LabInputError and LabError."""
    return _ask(state, "apply", list(objects.values()))


def delete(state: LabState, refs: Iterable[ObjectRef]) -> Answer:
    """Delete objects; return when they are gone. Raises LabError."""
    return _ask(state, "delete", list(refs))


def settle(state: LabState) -> int:
    """Wait until all that was written is in effect in the lab; return the version agents then have to reach. Raises LabError."""
    return _ask(state, "settle", None).version


def _ask(state: LabState, word: str, body: Any) -> Answer:
    connection = HTTPConnection("localhost", timeout=ANSWER_SECONDS)
    try:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection.sock:
            connection.sock.settimeout(ANSWER_SECONDS)
            connection.sock.connect(str(access(state).socket))
            connection.request("POST", f"/lab/{word}", msgspec.json.encode(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            said = answer.read()
    except (OSError, HTTPException) as error:
        again = f"python -m {MODULE} {state.name}"
        raise LabError(f"the API server of lab {state.name!r} does not answer ({error}); `{again}` starts it again") from error
    if answer.status == HTTPStatus.OK:
        return msgspec.json.decode(said, type=Answer)
    words = str(msgspec.json.decode(said, type=dict[str, Any]).get("message"))
    raise (LabInputError if answer.status in {400, 409, 422} else LabError)(words)


# -- default/kubernetes ----------------------------------------------------------------------------------------------------


def with_kubernetes(given: Given, topology: Topology) -> Given:
    """Add the Service by which pods reach the server, unless somebody else has its name or its address."""
    stated = {ip for raw in given.values() if raw["kind"] == "Service" for ip in _cluster_ips(raw)}
    cidr = topology.cluster.service_cidrs[0]
    address, family = str(ip_network(cidr)[1]), ip_network(cidr).version
    servers = [ip for ip in node_addresses(topology) if ip_address(ip).version == family]
    metadata = {"name": "kubernetes", "namespace": "default"}
    service: Raw = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {**metadata, "labels": {"component": "apiserver", "provider": "kubernetes"}},
        "spec": {"clusterIP": address, "ports": [{"name": "https", "port": 443, "targetPort": PORT, "protocol": "TCP"}]},
    }
    one: Raw = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {**metadata, "labels": {SERVICE_LABEL: "kubernetes"}},
        "addressType": f"IPv{family}",
        "endpoints": [{"addresses": [servers[0]], "conditions": {"ready": True}}] if servers else [],
        "ports": [{"name": "https", "port": PORT, "protocol": "TCP"}],
    }
    if address in stated or reference(service) in given or not servers:
        return given
    return {**given, reference(service): service, reference(one): one}


def _cluster_ips(service: Raw) -> list[str]:
    spec = service.get("spec") or {}
    return [*(spec.get("clusterIPs") or []), *([spec["clusterIP"]] if spec.get("clusterIP") else [])]
