"""A lab's pods come and go as on a real node: the node's container runtime executes the CNI plugin ``nodeplane-cni`` for each.

    np-L-node-1, with the node's own /run and /var/lib                    np-L-default.web-1
      /run/flannel/subnet.env  <-- agent
      runtime: ADD, CNI_NETNS=/run/netns/np-L-default.web-1  ---------->  eth0 10.244.1.2/32, default via 169.254.1.1
        nodeplane-cni --> host-local --> /var/lib/cni/networks

What the objects say is what a pod gets: its addresses go along as ``runtimeConfig``. host-local gives only addresses of the node's own
subnet, one of each family; for a pod that states others the ``static`` plugin takes its place. Nodes work side by side.

Decides what runtimes are told. What is to be attached comes from ``lab``; how a runtime goes about it is in ``cni_runtime``.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from kernelstate.linux import netns
from netnslab import agents, mounts
from netnslab.cni_runtime import CniFailed, CniRuntime, Json, Pod
from netnslab.errors import LabError
from netnslab.state import LabPod, LabState

Started = Mapping[str, subprocess.Popen[bytes]]
RESULTS = Path("/var/lib/cni/results")
"""As the node sees it; where libcni keeps them."""
PLUGIN_DIRECTORIES = ("/opt/cni/bin", "/usr/lib/cni")
READY_SECONDS = 60.0
POLL = 0.02


def make_pods(state: LabState, pods: Sequence[LabPod], started: Started | None = None) -> None:
    """Make namespaces for pods that are not in their host's network, and attach each once its node's agent has said the subnet.

    ``started``: agents that have only just been started. Raises LabError, also when one of them ends meanwhile.
    """
    own = [pod for pod in pods if not pod.host_network]
    for pod in own:
        netns.create(pod.netns)

    def attach(node: str, here: Sequence[LabPod]) -> None:
        for pod in here:
            _runtime(state, node, pod).add(_attachment(pod))

    for node in sorted({pod.node for pod in own}):
        await_subnet(state, node, started or {})
    _on_each_node(state, own, attach)


def remove_pods(state: LabState, pods: Sequence[LabPod]) -> None:
    """Detach pods, then let go of their namespaces. What is not there is success; raises LabError."""
    own = [pod for pod in pods if not pod.host_network]

    def detach(node: str, here: Sequence[LabPod]) -> None:
        for pod in here:
            _runtime(state, node, pod).delete(_attachment(pod))

    _on_each_node(state, own, detach)
    for pod in own:
        netns.delete(pod.netns)


def await_subnet(state: LabState, node: str, started: Started) -> None:
    """Wait until a node's agent has written subnet.env, as a kubelet waits for its network. Raises LabError."""
    file, end = state.node_dir(node) / "flannel/subnet.env", time.monotonic() + READY_SECONDS
    while not file.exists():
        process = started.get(node)
        if process is not None and process.poll() is not None:
            raise LabError(f"the agent of {node} ended with {process.returncode}: {agents.log_tail(state, node)}")
        if time.monotonic() > end:
            words = agents.log_tail(state, node) or "nothing in its log"
            raise LabError(f"{node} has no subnet.env after {READY_SECONDS:g} s: its agent: {words}")
        time.sleep(POLL)  # bounded; an agent that ends writes no file that could be watched for


def _on_each_node(state: LabState, pods: Sequence[LabPod], work: Callable[[str, Sequence[LabPod]], None]) -> None:
    """Do the work of each node in a thread that is where the node's runtime would be. Raises LabError with all that failed."""
    failures: list[str] = []

    def body(node: str, here: Sequence[LabPod]) -> None:
        try:
            mounts.enter(state.node_netns(node), agents.node_view(state, node))
            work(node, here)
        except CniFailed as error:
            failures.append(f"{node}: {error}")
        except Exception as error:  # what ends a thread is told by nobody else
            failures.append(f"{node}: {type(error).__name__}: {error}")

    nodes = sorted({pod.node for pod in pods})
    threads = [threading.Thread(target=body, args=(n, [p for p in pods if p.node == n]), name=f"runtime of {n}") for n in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise LabError("; ".join(sorted(failures)))


def _attachment(pod: LabPod) -> Pod:
    """Return a pod as its runtime knows it; a container's ID is a hash, as those of real runtimes look."""
    container = hashlib.sha256(pod.netns.encode()).hexdigest()
    names = f"K8S_POD_NAMESPACE={pod.namespace};K8S_POD_NAME={pod.name};K8S_POD_INFRA_CONTAINER_ID={container}"
    full = {4: 32, 6: 128}
    known = {"ips": [f"{ip}/{full[ip_address(ip).version]}" for ip in pod.ips]}
    return Pod(container, str(netns.path(pod.netns)), args=f"IgnoreUnknown=1;{names}", runtime_config=known)


def _runtime(state: LabState, node: str, pod: LabPod) -> CniRuntime:
    found = next(n for n in state.topology.nodes if n.name == node)
    path = os.pathsep.join((os.path.dirname(sys.executable), *PLUGIN_DIRECTORIES))  # noqa: PTH120  not resolved: the environment's
    return CniRuntime(conflist(deals_out=_deals_out(found.pod_cidrs, pod.ips)), path, RESULTS)


def conflist(*, deals_out: bool) -> Json:
    """Return the network list of a node; without ``deals_out`` a pod's addresses are taken as stated, whatever they are."""
    plugin: dict[str, Any] = {"type": "nodeplane-cni", "capabilities": {"ips": True}}
    if deals_out:
        return {"cniVersion": "1.1.0", "name": "nodeplane", "plugins": [plugin]}
    return {"cniVersion": "1.1.0", "name": "stated", "plugins": [{**plugin, "ipam": {"type": "static"}}]}


def _deals_out(pod_cidrs: Sequence[str], ips: Sequence[str]) -> bool:
    """Whether host-local would give exactly these addresses: one of each subnet, neither its first (the gateway's) nor its last."""
    if len(ips) != len(pod_cidrs):
        return False
    for cidr in map(ip_network, pod_cidrs):
        inside = [ip_address(ip) for ip in ips if ip_address(ip) in cidr]
        ends = {cidr.network_address, cidr.network_address + 1, cidr.broadcast_address}
        if len(inside) != 1 or inside[0] in ends:
            return False
    return True
