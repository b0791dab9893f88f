"""Who may talk to the lab's API server, and how: its certificate, the tokens, the kubeconfigs.

    lab        /run/nodeplane/labs/L/api/api.sock           `nodeplane lab`, without a token
    people     /run/nodeplane/labs/L/kubeconfig             https://127.0.0.1:PORT, on the host's loopback; may do everything
    agents     /run/nodeplane/kubeconfig in a node          https://ROUTER:6443, as the nodes reach it; may do what ``AGENT`` says
    pods       the Service default/kubernetes               the same address and token they are told

Certificates are made by openssl, for a CA that is thrown away with the lab. What an agent may do is what deploy/'s ClusterRole says.
"""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import msgspec
import yaml

from netnslab.errors import LabError
from netnslab.topology import ROUTER_HOST, Topology, host_address

PORT = 6443
"""Where nodes reach the server."""
DAYS = "3650"
ADMIN, AGENT = "admin", "agent"


class Access(msgspec.Struct):
    """The files of a server's access, below the lab's directory."""

    folder: Path

    @property
    def socket(self) -> Path:
        """The socket for `nodeplane lab`: from every network namespace, and for root alone."""
        return self.folder / "api.sock"

    @property
    def kubeconfig(self) -> Path:
        """The kubeconfig for people."""
        return self.folder.parent / "kubeconfig"

    def make(self, names: Sequence[str], tokens: dict[str, str]) -> None:
        """Make CA, certificate and tokens. Raises LabError."""
        self.folder.mkdir(mode=0o700)
        alternatives = ",".join(f"{'IP' if _is_address(name) else 'DNS'}:{name}" for name in names)
        new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", DAYS)
        self._openssl("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=nodeplane lab")
        signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-addext", f"subjectAltName={alternatives}")
        usage = ("-addext", "basicConstraints=critical,CA:FALSE", "-addext", "extendedKeyUsage=serverAuth")
        self._openssl("req", "-x509", *new, *signed, *usage, "-keyout", "tls.key", "-out", "tls.crt", "-subj", "/CN=kubernetes")
        (self.folder / "tokens.json").write_bytes(msgspec.json.encode({token: who for who, token in tokens.items()}))

    def _openssl(self, *words: str) -> None:
        done = subprocess.run(["openssl", *words], cwd=self.folder, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise LabError(f"openssl {words[0]}: {done.stderr.strip().splitlines()[-1:] or done.returncode}")

    def context(self) -> ssl.SSLContext:
        """Return what a server speaks TLS with."""
        found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        found.load_cert_chain(self.folder / "tls.crt", self.folder / "tls.key")
        return found

    def tokens(self) -> dict[str, str]:
        """Return who has which token, by token."""
        return msgspec.json.decode((self.folder / "tokens.json").read_bytes(), type=dict[str, str])

    def write(self, path: Path, server: str, who: str) -> None:
        """Write a kubeconfig that only its owner can read."""
        token = next(token for token, owner in self.tokens().items() if owner == who)
        authority = (self.folder / "ca.crt").read_bytes()
        content: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lab", "cluster": {"server": server, "certificate-authority-data": authority}}],
            "users": [{"name": who, "user": {"token": token}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": who}}],
            "current-context": "lab",
        }
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(msgspec.to_builtins(content)))


def server_names(topology: Topology) -> list[str]:
    """Return every name and address the server is called by."""
    first = [str(ip_network(cidr)[1]) for cidr in topology.cluster.service_cidrs]
    pods = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"]
    return ["127.0.0.1", "::1", "localhost", *node_addresses(topology), *first, *pods]


def node_addresses(topology: Topology) -> list[str]:
    """Return the router's addresses: where nodes, and the Service default/kubernetes, reach the server."""
    return [host_address(subnet, ROUTER_HOST) for segment in topology.segments for subnet in segment.subnets]


def node_server(topology: Topology, node: str) -> str:
    """Return the server's address for a node: the router's, in the node's own segment."""
    found = topology.node(node)
    assert found is not None
    address = host_address(topology.segment(found.segment).subnets[0], ROUTER_HOST)
    return f"https://[{address}]:{PORT}" if ":" in address else f"https://{address}:{PORT}"


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


# -- what an agent may do ------------------------------------------------------------------------------------------------

READ = frozenset(
    {"services", "endpointslices", "servicecidrs", "nodes", "pods", "namespaces", "networkpolicies", "clusternetworkpolicies"}
)


def may(who: str, verb: str, plural: str, part: str) -> bool:
    """Tell whether somebody may do something: ``verb`` as in RBAC; ``part`` a subresource, or empty."""
    if who == ADMIN:
        return True
    match verb, plural, part:
        case "list" | "watch", _, "":
            return plural in READ
        case ("patch", "nodes", "status") | ("create", "events", ""):
            return True
        case _:
            return False
