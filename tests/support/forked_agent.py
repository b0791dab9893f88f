"""An agent as a process of its own that starts in milliseconds: forked from the test, run in a namespace, killed at will."""

from __future__ import annotations

import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec

from clusterstate.sources.files import FileSource
from kernelstate.linux import netns
from kernelstate.linux.conntrack import Conntrack
from kernelstate.linux.forwarder import LinuxForwarder
from nodeplane.agent import Agent
from nodeplane.config import parse_config
from nodeplane.flows import FlowKeeper
from nodeplane.host import LinuxHost
from nodeplane.host_kernel import host_kernel
from nodeplane.pipeline import Pipeline
from nodeplane.pod_gate import PodGate
from nodeplane.policy_flows import PolicyFlows
from nodeplane.status import Status, read_status, write_status

SECONDS = 60.0


class ForkedAgent:
    """The agent of one node; ``start`` and ``kill`` as often as one likes."""

    def __init__(
        self,
        space: str,
        objects: Path,
        status: Path,
        services: dict,
        *,
        node: str = "n1",
        overlay: dict | None = None,
        policy: str = "",
        options: dict | None = None,
        forwarder: Callable[[], LinuxForwarder | None] = lambda: None,
    ) -> None:
        """Take a function that makes the forwarder of backend udp in the agent's own process; None: the usual one."""
        self.space, self.objects, self.status, self.node, self.forwarder = space, objects, status, node, forwarder
        self.config = parse_config(
            {
                "apiVersion": "nodeplane.dev/v1alpha1",
                "kind": "NodeConfiguration",
                "nodeName": node,
                "services": {
                    "clusterCIDR": "10.244.0.0/16,fd00:244::/32",
                    **{mode: {"minSyncPeriod": "1ms"} for mode in ("iptables", "ipvs", "nftables")},
                    **services,
                },
                **({"overlay": overlay} if overlay else {}),
                **({"serviceOptions": options} if options else {}),
                **({"policy": {"enabled": True, "mode": policy}} if policy else {}),
            }
        )
        self.pid = 0

    def start(self) -> None:
        """Start it; it follows the objects from now on."""
        assert not self.pid
        self.pid = os.fork()
        if self.pid:
            return
        try:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            with netns.inside(self.space):
                self._live()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(1)

    def _live(self) -> None:
        source = FileSource([self.objects])
        host = host_kernel(self.config, 0, self.forwarder())
        agent = Agent(
            pipeline=Pipeline(self.config),
            source=source,
            host=LinuxHost(self.config),
            kernel=host.kernel,
            flows=FlowKeeper(Conntrack(), self.config.services),
            policy_flows=PolicyFlows(Conntrack()) if self.config.policy else None,
            gate=self._gate(),
            publish=lambda status: write_status(status, self.status),
            status=Status(pid=os.getpid(), node=self.node, mode=self.config.mode),
            watched=host.watched,
        )
        agent.start(source.load())
        wake, _ = os.pipe()
        agent.run(lambda: False, wake)

    def _gate(self) -> PodGate | None:
        if not self.config.policy:
            return None
        gate = PodGate(self.node, self.status.with_name("policy.sock"), self.status.with_name("told.json"))
        gate.open()
        return gate

    def kill(self) -> None:
        """End it with SIGKILL, wherever it is."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def wait(self, generation: int) -> Status:
        """Wait until it has programmed a generation."""
        watcher = os.pidfd_open(self.pid)
        try:
            for _ in range(int(SECONDS / 0.01)):
                status = self.read()
                if status and status.pid == self.pid and status.synced and status.generation == str(generation):
                    return status
                ended = select.select([watcher], [], [], 0.01)[0]
                assert not ended, "the agent ended by itself"
        finally:
            os.close(watcher)
        raise AssertionError(f"not in sync with {generation} after {SECONDS:g} s: {self.read()}")

    def read(self) -> Status | None:
        """Return what it last said of itself."""
        try:
            return read_status(self.status)
        except msgspec.DecodeError:
            return None
