"""Everything that watches the agent at work, put together: made before there is an agent, for who waits for objects is alive as well.

Decides nothing but who is there; what each does is in its own module.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from nodeplane import logs
from nodeplane.agent import Agent
from nodeplane.attendant import Attendant
from nodeplane.commands import Failed
from nodeplane.config import NodeConfig
from nodeplane.conntrack_settings import ConntrackSettings
from nodeplane.metrics import NodeMetrics
from nodeplane.node_servers import NodeServers
from nodeplane.reload import ConfigWatch

OOM_SCORE = Path("/proc/self/oom_score_adj")

log = logging.getLogger("nodeplane")


class Watchers:
    """The attendants of one agent. ``open`` at once, ``watch`` when there is an agent, ``close`` when done."""

    def __init__(self, config: NodeConfig, file: ConfigWatch) -> None:
        self._config, self.file = config, file
        self.metrics = NodeMetrics()
        self.servers = NodeServers(config.servers, config.mode, self.metrics)
        self.conntrack = ConntrackSettings(config.conntrack)
        self._undo = contextlib.ExitStack()

    def open(self) -> None:
        """Begin to answer. Raises Failed for a port that is taken where that is to end the agent."""
        _set_oom_score(self._config.oom_score)
        self._undo.callback(self.servers.close)
        for words in self.servers.open():
            if self._config.servers.hard_fail:
                raise Failed(words)
            log.warning("%s", words)

    def watch(self, agent: Agent) -> None:
        """Watch an agent from now on."""
        self.metrics.pipeline = agent.pipeline
        self.metrics.refused = lambda: bool(agent.status.refused)
        self.servers.health = agent.node_health
        if agent.gate is not None:
            self.metrics.told = agent.gate.told
        attendants: tuple[Attendant, ...] = (self.metrics, self.servers, self.conntrack, self.file)
        agent.watched += self.file.descriptors
        agent.attendants += attendants

    def use(self, config: NodeConfig, *, verbose: bool) -> None:
        """Go by another configuration from now on, as far as it is live."""
        self._config = config
        logs.set_up(config.logs, verbose=verbose)
        self.conntrack.use(config.conntrack)
        _set_oom_score(config.oom_score)

    def close(self) -> None:
        """Stop answering."""
        self._undo.close()


def _set_oom_score(score: int | None) -> None:
    if score is None:
        return
    try:
        OOM_SCORE.write_text(str(score))
    except OSError as error:
        log.warning("oomScoreAdj: write %s: %s", OOM_SCORE, error.strerror)
