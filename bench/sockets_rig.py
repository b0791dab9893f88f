"""Services compiled and rendered for sockets, and the reconciler that writes them, in a namespace and at a cgroup of their own."""

from __future__ import annotations

import gc
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from bench import cluster
from bench.kernel import own_namespace
from clusterstate.parse import parse_object
from clusterstate.snapshot import Snapshot, edited
from kernelstate.linux import netns
from kernelstate.linux.ebpf_services import LinuxServiceMaps
from kernelstate.objects.address import Prefix
from kernelstate.reconcile_ebpf import SocketReconciler
from nodeplane.commands import Failed
from nodeplane.host_kernel import FORWARDER
from nodeplane.pipeline import HostFacts, node_facts
from proxy.compile import ServiceCompiler
from proxy.render.ebpf_program import EbpfProgram
from proxy.settings import ProxySettings


class Rig:
    """N Services of the made-up cluster; ``with`` it, in a fresh process. Raises Failed."""

    def __init__(self, cgroup: Path, services: int) -> None:
        self._cgroup, self._services, self._undo = cgroup, services, ExitStack()

    def __enter__(self) -> Self:
        namespace = self._undo.enter_context(own_namespace())
        self._undo.enter_context(netns.inside(namespace))
        objects = [one for raw in cluster.everything(self._services, 1) for one in parse_object(raw, "bench").objects]
        self._snapshot = edited(Snapshot(), (), objects)
        facts = node_facts(cluster.NODE, self._snapshot, HostFacts())
        settings = ProxySettings(cluster_cidrs=(Prefix.parse(cluster.CLUSTER_CIDR),))
        self._compiler, self._program = ServiceCompiler(facts), EbpfProgram(settings, facts, (4,))
        self._compiler.update(self._snapshot, None)
        self._program.update(self._compiler.entries, None)
        port = LinuxServiceMaps(FORWARDER.parent, self._cgroup)
        self._undo.callback(port.close)
        self._reconciler = SocketReconciler(port, time.monotonic)
        self._undo.callback(self._reconciler.cleanup)
        self._reconciler.set_desired(self._program.tables)
        gc.collect()
        gc.freeze()  # as the agent does
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def sync(self) -> None:
        """Write what differs. Raises Failed."""
        report = self._reconciler.sync()
        if not report.ok or not report.changed:
            raise Failed(f"services-sockets: {report.errors[0] if report.errors else 'nothing was written'}")

    def grow(self, index: int) -> None:
        """Let a Service have one endpoint more, compiled and rendered; nothing is written yet."""
        old, new = (
            parse_object(cluster.endpoint_slice(index, count), "bench").objects
            for count in (cluster.ENDPOINTS, cluster.ENDPOINTS + 1)
        )
        self._snapshot = edited(self._snapshot, old, new)
        name = (cluster.NAMESPACE, cluster.service_name(index))
        change = self._program.update(self._compiler.entries, self._compiler.update(self._snapshot, [name]))
        self._reconciler.set_desired(self._program.tables, change)
