"""What the agent says of itself: one small file, replaced as a whole after every round, read by people and by the lab.

/run/nodeplane/status.json     newest state of the agent of this node (of this mount namespace)
/run/nodeplane/agent.lock      held while an agent runs: there is one per node
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import msgspec

RUN_DIR = Path("/run/nodeplane")
STATUS_FILE = RUN_DIR / "status.json"
LOCK_FILE = RUN_DIR / "agent.lock"


class PeerStatus(msgspec.Struct, frozen=True):
    """One other node, and how packets to its pods get there."""

    node: str
    pod_cidrs: tuple[str, ...]
    public_ip: str
    reach: str
    why: str


class LeaseStatus(msgspec.Struct, frozen=True):
    """This node's lease in etcd, and how etcd is. Times are seconds since the epoch."""

    subnets: tuple[str, ...] = ()
    """None yet: empty."""
    until: float = 0.0
    """When it ends unless it is renewed; 0: never, it is a reservation."""
    endpoint: str = ""
    lost_since: float = 0.0
    """Since when etcd has not answered; 0: it does."""
    error: str = ""
    """Why etcd does not answer, or why there is no lease."""
    problems: tuple[str, ...] = ()


class Status(msgspec.Struct, frozen=True):
    """The agent's state after its last round. Times are seconds since the epoch."""

    pid: int
    node: str
    mode: str
    iptables_variant: str = ""
    iptables_reason: str = ""
    started: float = 0.0
    synced: bool = False
    """Whether everything desired is in the kernel, as far as is known."""
    generation: str = ""
    """The objects' generation that is programmed (see clusterstate/sources/files.py)."""
    revision: int = 0
    kept: str = ""
    """Where the objects come from as long as the API server has not said everything: which time, which file, and why."""
    last_sync: float = 0.0
    last_good: float = 0.0
    """When a write last had no error."""
    services: int = 0
    endpoints: int = 0
    chains: int = 0
    rules: int = 0
    elements: int = 0
    """Of nftables' sets and maps."""
    servers: int = 0
    """Virtual servers of IPVS."""
    frontends: int = 0
    """Of Services, that sockets are told of."""
    unasked: str = ""
    """Why sockets are not told of Services though they should be: packets meet rules instead."""
    lane: int = 0
    """Links between which packets of open connections take the short lane."""
    laneless: str = ""
    """Why packets of open connections take no short lane though they should."""
    policies: int = 0
    """NetworkPolicies that isolate a pod of this node."""
    isolated: int = 0
    """Pods of this node that are isolated in some direction."""
    cluster_policies: int = 0
    """ClusterNetworkPolicies with a rule for a pod of this node."""
    governed: int = 0
    """Pods of this node that they have rules for."""
    policy: str = ""
    """Through what policies are enforced; empty: they are not."""
    policy_pods: dict[str, str] = {}
    """``namespace/name`` of the pods here that policies are about, by address."""
    families: tuple[int, ...] = ()
    overlay: str = ""
    engine: str = ""
    """Who wraps packets of backend udp: userspace or kernel."""
    engine_reason: str = ""
    unguarded: str = ""
    """Why sources of packets from other nodes are not checked though they should be."""
    finished: tuple[str, ...] = ()
    """Links for which checksums are finished before, by the configuration or because hardware would do them wrong."""
    peers: tuple[PeerStatus, ...] = ()
    lease: LeaseStatus | None = None
    """None where Node objects say each node's subnet."""
    refused: str = ""
    """Why the last new configuration was not taken; empty if there was none, or it was."""
    refused_at: float = 0.0
    pending: tuple[str, ...] = ()
    """Parts that differ from what is desired."""
    errors: tuple[str, ...] = ()
    """What the kernel refused; tried again."""
    object_errors: tuple[str, ...] = ()
    """Objects that were left out."""
    problems: tuple[str, ...] = ()
    """What the objects ask for and cannot be had."""


class AlreadyRunningError(Exception):
    """Another agent holds this node."""


def write_status(status: Status, path: Path = STATUS_FILE) -> None:
    """Replace the status file; a reader sees the old one or the new one."""
    fresh = path.with_suffix(f".{os.getpid()}.tmp")
    fresh.write_bytes(msgspec.json.format(msgspec.json.encode(status), indent=2) + b"\n")
    fresh.replace(path)


def read_status(path: Path = STATUS_FILE) -> Status | None:
    """Return what the last agent wrote, or None where none ever did."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Status)
    except FileNotFoundError:
        return None


def take_lock(path: Path = LOCK_FILE) -> int:
    """Become the node's agent until the returned descriptor is closed. Raises AlreadyRunningError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise AlreadyRunningError(f"{path}: another agent of this node is running") from error
    return descriptor


def is_running(path: Path = LOCK_FILE) -> bool:
    """Whether an agent holds the node now."""
    if not path.exists():
        return False
    try:
        os.close(take_lock(path))
    except AlreadyRunningError:
        return True
    return False


def _written(status: Status) -> str:
    """Say what Services have become in the kernel, most important first."""
    parts = [f"{status.servers} virtual servers"] if status.servers else []
    parts += [f"{status.frontends} frontends told to sockets"] if status.frontends else []
    parts += [f"{status.elements} elements of nftables maps and sets"] if status.elements else []
    return ", ".join([*parts, f"{status.rules} iptables rules in {status.chains} chains"])


def _policy_lines(status: Status) -> list[str]:
    told = []
    if status.policies:
        told.append(f"{status.policies} NetworkPolicies isolate {status.isolated} pods here")
    if status.cluster_policies:
        told.append(f"{status.cluster_policies} ClusterNetworkPolicies have rules for {status.governed} pods here")
    return [f"{'' if i else 'policy':<9} {words}" for i, words in enumerate(told)]


def _lease_lines(lease: LeaseStatus) -> list[str]:
    """Say what this node holds and whether etcd is there."""
    if not lease.subnets:
        held = "none yet"
    elif not lease.until:
        held = f"{', '.join(lease.subnets)}, reserved"
    else:
        held = f"{', '.join(lease.subnets)}, until {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(lease.until))}"
    state = f"answers at {lease.endpoint}"
    if lease.lost_since:
        state = f"LOST {time.time() - lease.lost_since:.0f} s ago (what was last known is kept)"
    lines = [f"lease     {held}", f"etcd      {state}"]
    return [*lines, f"          {lease.error}"] if lease.error else lines


def status_lines(status: Status, *, running: bool) -> list[str]:
    """Return the status as a person reads it."""
    variant = f" (iptables-{status.iptables_variant}: {status.iptables_reason})" if status.iptables_variant else ""
    state = "in sync" if status.synced else "NOT in sync"
    lines = [
        f"node      {status.node}, agent {f'pid {status.pid}' if running else 'NOT RUNNING (the kernel goes on forwarding)'}",
        f"services  {status.mode}{variant}",
        f"          {status.services} Services, {status.endpoints} endpoints: {_written(status)}",
        *([f"          sockets are NOT told of Services, packets meet nftables: {status.unasked}"] if status.unasked else []),
        *([f"          open connections take a short lane between {status.lane} links"] if status.lane else []),
        *([f"          open connections take NO short lane: {status.laneless}"] if status.laneless else []),
        f"state     {state}, last written {time.time() - status.last_sync:.0f} s ago",
    ]
    if status.kept:
        lines.append(f"objects   {status.kept}")
    if status.overlay:
        engine = f", {status.engine} engine ({status.engine_reason})" if status.engine else ""
        lines.append(f"overlay   {status.overlay}{engine}, {len(status.peers)} peers")
        lines += [f"          {p.node}: {', '.join(p.pod_cidrs)} at {p.public_ip}, {p.reach} ({p.why})" for p in status.peers]
    if status.unguarded:
        lines.append(f"          sources of packets from other nodes are NOT checked: {status.unguarded}")
    if status.finished:
        lines.append(f"          tx-checksum is off on {', '.join(status.finished)}")
    if status.lease is not None:
        lines += _lease_lines(status.lease)
    lines += _policy_lines(status)
    for title, items in (
        ("refused", (status.refused,) if status.refused else ()),
        ("pending", status.pending),
        ("errors", status.errors),
        ("left out", status.object_errors),
        ("problems", status.problems),
    ):
        lines += [f"{title if i == 0 else '':<9} {item}" for i, item in enumerate(items)]
    return lines
