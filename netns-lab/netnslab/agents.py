"""The agents of a lab: each node's configuration, its process, and what it says of itself.

An agent runs the way it does on a real node, in the node's network namespace and with the node's own view of /run (``mounts``).
The lab speaks to it only through files: objects and ``.generation`` in (or the lab's API server), ``status.json`` out. So an agent that was killed and
started again by hand, in `lab exec NODE`, is as good as the first.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from netnslab import mounts, node_cgroups, processes
from netnslab.errors import LabError, LabInputError
from netnslab.state import LabState, write_file
from netnslab.topology import Topology
from nodeplane.config import parse_config
from nodeplane.config_fields import ConfigError
from nodeplane.status import Status, read_status

CONFIG, OBJECTS, KUBECONFIG = "/run/nodeplane/config.yaml", "/run/nodeplane/objects", "/run/nodeplane/kubeconfig"
"""As the agent sees them."""
SECTIONS = ("iptables", "ipvs", "nftables")
"""What has options of its own in the configuration."""
POLL = 0.02


def node_view(state: LabState, node: str) -> mounts.NodeView:
    """Return what is a node's own below /run."""
    return mounts.NodeView(state.node_dir(node), state.objects, node_cgroups.path(state.name, node))


def node_config(topology: Topology, node: str, mode: str = "") -> dict[str, Any]:
    """Return a node's NodeConfiguration, its Services in ``mode`` or as the topology says.

    Raises LabInputError if that is something an agent would refuse.
    """
    v4, v6 = ([c for c in topology.cluster.pod_cidrs if (":" in c) == (family == 6)] for family in (4, 6))
    overlay: dict[str, Any] = {
        "iface": "eth0",
        "ipMasq": True,
        "Backend": {"Type": topology.overlay.backend, **topology.overlay.options},
        "EnableIPv4": bool(v4),
        "EnableIPv6": bool(v6),
        **({"Network": v4[0]} if v4 else {}),
        **({"IPv6Network": v6[0]} if v6 else {}),
    }
    services = {"clusterCIDR": ",".join(topology.cluster.pod_cidrs), **{m: {"minSyncPeriod": "0.1s"} for m in SECTIONS}}
    config = {
        "apiVersion": "nodeplane.dev/v1alpha1",
        "kind": "NodeConfiguration",
        "nodeName": node,
        "services": {**services, **topology.services, **({"mode": mode} if mode else {})},
        "overlay": overlay,
        "policy": topology.policy or {"enabled": False},
        "serviceOptions": {"cgroup": mounts.CGROUP},
    }
    try:
        parse_config(config)
    except ConfigError as error:
        raise LabInputError(f"topology: {error}") from error
    return config


def write_config(state: LabState, node: str) -> None:
    """Write a node's configuration where its agent reads it."""
    config = node_config(state.topology, node, state.modes.get(node, ""))
    write_file(state.node_dir(node) / "run/config.yaml", msgspec.json.format(msgspec.json.encode(config)))


def reload(state: LabState, nodes: Sequence[str], timeout: float) -> None:
    """Let running agents read their configuration again; returns once each has started anew and is in sync.

    Raises LabError when one does not run, is late, or does not take it.
    """
    before: dict[str, Status] = {}
    for node in nodes:
        status, alive = agent_status(state, node)
        if status is None or not alive:
            raise LabError(f"the agent of {node} is not running")
        before[node] = status
        os.kill(status.pid, signal.SIGHUP)
    end = time.monotonic() + timeout
    for node in nodes:
        while True:
            status, alive = agent_status(state, node)
            if alive and status is not None and status.started != before[node].started and status.synced:
                break
            if status is not None and status.refused_at > before[node].refused_at:
                raise LabError(f"{node} goes on as before: {status.refused}")
            if time.monotonic() > end:
                raise LabError(f"{node} has not started anew after {timeout:g} s: {log_tail(state, node)}")
            time.sleep(POLL)  # bounded; see ``await_sync``


def start(state: LabState, nodes: Sequence[str]) -> dict[str, subprocess.Popen[bytes]]:
    """Start the agents of these nodes."""
    return {node: _start(state, node) for node in nodes}


def _start(state: LabState, node: str) -> subprocess.Popen[bytes]:
    directory = state.node_dir(node)
    write_config(state, node)
    source = ["--kubeconfig", KUBECONFIG] if state.api_port else ["--objects", OBJECTS]
    command = [sys.executable, "-m", "nodeplane", "agent", "--config", CONFIG, *source]
    with (directory / "agent.log").open("ab") as log:
        process = mounts.popen(
            state.node_netns(node),
            node_view(state, node),
            node_cgroups.within(state.name, node, command, mounts.CGROUP),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd="/",
            env={**os.environ, "PATH": path_with_program()},
        )
    return processes.let_run(process)


def path_with_program() -> str:
    """Return PATH with the directory `nodeplane` is installed in, so that it is found in a node as well."""
    return os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])  # noqa: PTH120


# -- what they say ---------------------------------------------------------------------------------------------------


def agent_status(state: LabState, node: str) -> tuple[Status | None, bool]:
    """Return the last status of a node's agent, and whether that agent is alive: its process is, and in the node's netns."""
    try:
        status = read_status(state.node_dir(node) / "run/status.json")
    except msgspec.DecodeError as error:
        raise LabError(f"{node}: status.json cannot be read: {error}") from error
    if status is None:
        return None, False
    inode = processes.netns_inode(status.pid)
    return status, inode is not None and inode in processes.inodes([state.node_netns(node)])


def is_synced(state: LabState, status: Status | None) -> bool:
    """Whether a status says that the lab's latest change is programmed."""
    return status is not None and status.synced and has_reached(state, status)


def has_reached(state: LabState, status: Status) -> bool:
    """Whether a status is of the lab's latest change: of files that very one, of an API server that version or a later."""
    if state.api_port:
        return status.generation.isdecimal() and int(status.generation) >= state.generation
    return status.generation == str(state.generation)


def await_sync(
    state: LabState,
    timeout: float,
    started: dict[str, subprocess.Popen[bytes]] | None = None,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> list[str]:
    """Wait until every live agent has programmed the latest change; return the nodes whose agent is dead.

    With ``started`` no agent may end meanwhile. Raises LabError after ``timeout`` seconds, saying who is late and why.
    """
    nodes, end = [n.name for n in state.topology.nodes if not _is_cut_off(state, n.name)], time.monotonic() + timeout
    while True:
        found = {node: agent_status(state, node) for node in nodes}
        for node, process in (started or {}).items():
            if process.poll() is not None:
                raise LabError(f"the agent of {node} ended with {process.returncode}: {log_tail(state, node)}")
        dead = [] if started else [node for node, (_, alive) in found.items() if not alive]
        if len(dead) == len(nodes):
            raise LabError("no agent is running, so there is nothing to wait for")
        late = [node for node in nodes if node not in dead and not (found[node][1] and is_synced(state, found[node][0]))]
        progress(len(nodes) - len(late), len(nodes))
        if not late:
            return dead
        if time.monotonic() > end:
            reasons = "; ".join(f"{node}: {_why_late(state, node, found[node][0])}" for node in late)
            raise LabError(f"not in sync after {timeout:g} s: {reasons}")
        time.sleep(POLL)  # bounded; a killed agent tells nobody, so a change of its file cannot be waited for alone


def _is_cut_off(state: LabState, node: str) -> bool:
    """Whether a node need not hear of changes: its Node object is gone, so perhaps it cannot reach the API server any more."""
    return bool(state.api_port) and node in state.memory.removed_nodes


def _why_late(state: LabState, node: str, status: Status | None) -> str:
    if status is None:
        return f"has written no status yet ({log_tail(state, node) or 'nothing in its log'})"
    if status.errors:
        return status.errors[0]
    if not has_reached(state, status):
        return f"has programmed change {status.generation or 'none'}, not {state.generation}"
    return f"differs from desired in {', '.join(status.pending) or 'an unnamed part'}"


def log_tail(state: LabState, node: str) -> str:
    """Return the last line of an agent's log."""
    log = state.node_dir(node) / "agent.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
