"""Having pods answer: one responder process per node, told what to serve; and a process of its own for a pod with a command.

Decides when a process is started and ended. How a responder answers is in ``responder``.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kernelstate.linux import netns
from netnslab import node_cgroups, processes
from netnslab.errors import LabError
from netnslab.state import LabPod, LabState, Process

START_SECONDS = 20.0
SOCKET = "responder.sock"


def serve(state: LabState, pods: Iterable[LabPod]) -> list[str]:
    """Have these pods answered for, and nobody else; return what could not be opened, a line each.

    Returns once all sockets are open. Starts the responders that are not running.
    """
    pods = list(pods)
    wanted = {node.name: _wanted(p for p in pods if p.node == node.name) for node in state.topology.nodes}
    starting = {}
    for node, asked in wanted.items():
        if asked and not _is_listening(state.node_dir(node) / SOCKET):
            starting[node] = _start(state, node)
    state.save()
    for node, process in starting.items():
        _await_ready(state, node, process)
    errors = []
    for node, asked in wanted.items():
        if asked or _is_listening(state.node_dir(node) / SOCKET):
            errors += _tell(state.node_dir(node) / SOCKET, node, asked)
    return errors


def _wanted(pods: Iterable[LabPod]) -> dict[str, dict[str, Any]]:
    return {
        p.key: {"netns": p.netns, "ports": [list(port) for port in p.ports], "ipv6": any(":" in ip for ip in p.ips)}
        for p in pods
        if not p.command
    }


def _start(state: LabState, node: str) -> subprocess.Popen[bytes]:
    control = state.node_dir(node) / SOCKET
    with (state.node_dir(node) / "responder.log").open("ab") as log:
        process: subprocess.Popen[bytes] = netns.popen(
            state.node_netns(node),
            node_cgroups.within(state.name, node, [sys.executable, "-m", "netnslab.responder", str(control)]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )
    _remember(state, process.pid, f"responder of {node}")
    return processes.let_run(process)


def _await_ready(state: LabState, node: str, process: subprocess.Popen[bytes]) -> None:
    """Wait for the line a responder prints once it listens."""
    assert process.stdout is not None
    with process.stdout as out:
        if not out.readline():
            log = state.node_dir(node) / "responder.log"
            raise LabError(f"the responder of {node} did not start: {log.read_text()[-500:].strip()}")


def _is_listening(control: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(control))
        except OSError:
            return False
    return True


def _tell(control: Path, node: str, pods: dict[str, dict[str, Any]]) -> list[str]:
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(START_SECONDS)
            sock.connect(str(control))
            sock.sendall(json.dumps(pods).encode() + b"\n")
            with sock.makefile("rb") as lines:
                return list(json.loads(lines.readline())["errors"])
    except (OSError, ValueError) as error:
        raise LabError(f"the responder of {node} does not answer: {error}") from error


# -- pods with a command ---------------------------------------------------------------------------------------------


def start_commands(state: LabState, pods: Iterable[LabPod]) -> list[str]:
    """Start the processes of pods that have a command, their output going to ``logs/``; return what failed, a line each."""
    errors = []
    for pod in (p for p in pods if p.command):
        log = state.root / "logs" / f"{pod.namespace}.{pod.name}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as output:
            try:
                process = netns.popen(
                    pod.netns,
                    node_cgroups.within(state.name, pod.node, pod.command),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env={**os.environ, "HOSTNAME": pod.name, "POD_NAME": pod.name, "POD_NAMESPACE": pod.namespace},
                )
            except OSError as error:
                errors.append(f"Pod {pod.key}: command {pod.command[0]!r}: {error.strerror}")
                continue
        _remember(state, processes.let_run(process).pid, f"pod {pod.key}")
    state.save()
    return errors


def stop_pods(state: LabState, pods: Iterable[LabPod]) -> None:
    """End every process that lives in these pods' namespaces; in the host's network, the pod's own."""
    pods = list(pods)
    inodes = processes.inodes(p.netns for p in pods if not p.host_network)
    labels = {f"pod {p.key}" for p in pods}
    recorded = [p for p in state.processes if p.what in labels]

    def find() -> set[int]:
        return {p.pid for p in recorded if processes.is_alive(p)} | (processes.living_in(inodes) if inodes else set())

    processes.kill(find, "pods")
    state.processes = [p for p in state.processes if p.what not in labels]


def _remember(state: LabState, pid: int, what: str) -> None:
    start = processes.start_time(pid)
    if start is not None:
        state.processes.append(Process(pid, start, what))
