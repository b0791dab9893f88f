"""The real agent with a kernel that only keeps the text, so that what is measured is the agent and nothing else.

    files --> FileSource --> Pipeline --> NetfilterReconciler --> text          | iptables-restore, kernel
              '------------------- agent's own work -----------------'          | measured on its own: ``kernel.py``

Everything up to the text is the program's own code, put together as ``nodeplane agent`` does it, without overlay and conntrack
(neither has anything to do for these changes).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from bench.cluster import CLUSTER_CIDR, NODE
from bench.stages import Stages
from clusterstate.objects import Node
from clusterstate.sources.files import FileSource
from kernelstate.fake import RecordingNetfilter
from kernelstate.objects.address import Family, Prefix
from kernelstate.reconcile import NetfilterReconciler
from nodeplane.agent import Agent
from nodeplane.config import NodeConfig
from nodeplane.kernel import NodeKernel
from nodeplane.pipeline import OWNERSHIP, Desired, HostFacts, Pipeline
from nodeplane.status import Status
from proxy.settings import ProxySettings


class TextPort(RecordingNetfilter):
    """Notes when a text was handed over: there the agent's own work ends and iptables-restore's begins."""

    def __init__(self) -> None:
        super().__init__()
        self.handed = (0.0, 0.0)
        self.size = 0

    def apply(self, family: Family, restore_text: str) -> None:
        """Keep the text, as bytes too (it is what a pipe takes), and read the clocks."""
        super().apply(family, restore_text)
        self.size = len(restore_text.encode())
        self.handed = (time.perf_counter(), time.process_time())


class BareHost:
    """A machine without links that wants no sysctl; implements ``agent.Host``."""

    def facts(self, node: Node | None) -> HostFacts:
        """Return nothing: the Node object says what Services need."""
        return HostFacts()

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
    """What one step cost the agent, in milliseconds, and the text it came to."""

    cpu: float
    """CPU time up to the text."""
    wall: float
    """Elapsed time up to the text."""
    after: float
    """CPU time behind it: bookkeeping, status, and after the first sync a garbage collection."""
    stages: dict[str, float]
    """CPU time up to the text, by stage."""
    text: str


class MeasuredAgent:
    """An agent over files whose every step is measured; use inside ``stages.watching()``."""

    def __init__(self, path: Path, mode: str, stages: Stages) -> None:
        self.port = TextPort()
        self.source = FileSource([path])
        self._stages = stages
        settings = ProxySettings(cluster_cidrs=(Prefix.parse(CLUSTER_CIDR),))
        self.agent = Agent(
            pipeline=Pipeline(NodeConfig(NODE, settings, mode)),
            source=self.source,
            host=BareHost(),
            kernel=NodeKernel(NetfilterReconciler(self.port, OWNERSHIP)),
            conntrack=None,
            publish=lambda _status: None,
            status=Status(pid=os.getpid(), node=NODE, mode=mode),
        )

    def first(self) -> Work:
        """Do the first full sync: from files to the whole text."""
        return self._measure(lambda: self.agent.start(self.source.load()))

    def follow(self) -> Work:
        """Take in what has changed on disk since: from the changed file to the text of the change."""
        return self._measure(self._follow)

    def _start(self) -> None:
        self.agent.start(self.source.load())

    def _follow(self) -> None:
        update = self.source.poll()
        assert update is not None, "nothing has changed on disk"
        self.agent.take(update)
        self.agent.sync()

    def _measure(self, step: Callable[[], object]) -> Work:
        self._stages.clear()
        self.port.texts.clear()
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        end = time.process_time()
        errors = [*self.agent.status.errors, *self.agent.status.object_errors]
        assert not errors, f"the agent complains: {errors[0]}"
        assert self.port.texts, "no text came of it"
        handed_wall, handed_cpu = self.port.handed
        used = 1000 * (handed_cpu - cpu)
        return Work(
            cpu=used,
            wall=1000 * (handed_wall - wall),
            after=1000 * (end - handed_cpu),
            stages=self._stages.split(used),
            text="".join(self.port.texts.values()),
        )

    def close(self) -> None:
        """Stop following the files."""
        self.source.close()
