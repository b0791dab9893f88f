"""The real agent with every step measured: its own work apart from what the kernel does with it.

    files --> FileSource --> Pipeline --> reconciler --> text, messages         | iptables-restore, libnftables, kernel
              '------------------- agent's own work -----------------'          | ``ports.py`` says how real they are

Everything is the program's own code, put together as ``nodeplane agent`` does it, without overlay and conntrack (neither has
anything to do for these changes).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from bench.cluster import CLUSTER_CIDR, NODE
from bench.kernel import Applied
from bench.ports import Written, measured_kernel
from bench.stages import KERNEL, Stages
from clusterstate.objects import Node
from clusterstate.sources.files import FileSource
from kernelstate.objects.address import Prefix
from nodeplane.agent import Agent
from nodeplane.config import NodeConfig
from nodeplane.kernel import NodeKernel
from nodeplane.pipeline import Desired, HostFacts, Pipeline
from nodeplane.status import Status
from proxy.settings import ProxySettings


class BareHost:
    """A machine without links that wants no sysctl; implements ``agent.Host``."""

    def facts(self, node: Node | None) -> HostFacts:
        """Return nothing: the Node object says what Services need."""
        return HostFacts()

    def use(self, config: NodeConfig) -> None:
        """Need nothing of it."""

    def prepare(self, desired: Desired) -> Sequence[str]:
        """Set nothing."""
        return ()

    def fileno(self) -> int:
        """Return no descriptor; the loop that would wait on it does not run here."""
        return -1

    def changed(self) -> bool:
        """Nothing ever changes."""
        return False


class Work(msgspec.Struct, frozen=True):
    """What one step cost the agent, in milliseconds, and what it came to."""

    cpu: float
    """CPU time until the kernel has it all, without the kernel's."""
    wall: float
    """Elapsed time of the same."""
    after: float
    """CPU time behind it: bookkeeping, status, and after the first sync a garbage collection."""
    kernel: Applied
    """What the kernel, and the library before it, took in this process; nothing in mode iptables, and not IPVS' where it is lacking."""
    stages: dict[str, float]
    """CPU time of ``cpu`` by stage."""
    text: str
    elements: int
    """Elements, servers and addresses written beside the text."""


class MeasuredAgent:
    """An agent over files whose every step is measured; use inside ``stages.watching()``."""

    def __init__(self, path: Path, mode: str, stages: Stages) -> None:
        settings = ProxySettings(cluster_cidrs=(Prefix.parse(CLUSTER_CIDR),))
        self._put_together(path, NodeConfig(NODE, settings, mode), stages)

    def _put_together(self, path: Path, config: NodeConfig, stages: Stages) -> None:
        self.source = FileSource([path])
        self._written = Written()
        self._stages = stages
        self.agent = Agent(
            pipeline=Pipeline(config),
            source=self.source,
            host=BareHost(),
            kernel=self._kernel(config, self._written),
            publish=lambda _status: None,
            status=Status(pid=os.getpid(), node=NODE, mode=config.mode),
        )

    def _kernel(self, config: NodeConfig, written: Written) -> NodeKernel:
        return measured_kernel(config.mode, written)

    def first(self) -> Work:
        """Do the first full sync: from files to the whole of it."""
        return self._measure(lambda: self.agent.start(self.source.load()))

    def follow(self) -> Work:
        """Take in what has changed on disk since: from the changed file to what is written for it."""
        return self._measure(self._follow)

    def _follow(self) -> None:
        update = self.source.poll()
        assert update is not None, "nothing has changed on disk"
        self.agent.take(update)
        self.agent.sync()

    def _measure(self, step: Callable[[], object]) -> Work:
        stages, written = self._stages, self._written
        stages.clear()
        written.clear()
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        end = time.process_time()
        errors = [*self.agent.status.errors, *self.agent.status.object_errors]
        assert not errors, f"the agent complains: {errors[0]}"
        assert written.texts or written.elements, "nothing came of it"
        handed_wall, handed_cpu = stages.handed
        kernel = Applied(stages.kernel_wall, stages.spent.get(KERNEL, 0.0))
        used = 1000 * (handed_cpu - cpu) - kernel.cpu
        return Work(
            cpu=used,
            wall=1000 * (handed_wall - wall) - kernel.wall,
            after=1000 * (end - handed_cpu),
            kernel=kernel,
            stages=stages.split(used),
            text="".join(written.texts),
            elements=written.elements,
        )

    def close(self) -> None:
        """Stop following the files."""
        self.source.close()
