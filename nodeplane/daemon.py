"""``nodeplane agent``: puts the agent together for this machine and runs it until it is told to stop."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import time
from types import FrameType

from clusterstate.snapshot import Update
from clusterstate.sources.files import FileSource
from clusterstate.sources.tree import SourceError
from kernelstate.errors import KernelStateError
from kernelstate.linux.conntrack import Conntrack
from kernelstate.linux.iptables import IptablesPort, choose_variant, families
from kernelstate.linux.links import LinuxLinks
from kernelstate.reconcile import NetfilterReconciler
from kernelstate.reconcile_links import LinkReconciler
from nodeplane.agent import Agent
from nodeplane.commands import Failed, Usage
from nodeplane.config import ConfigError, NodeConfig, load_config
from nodeplane.host import LinuxHost
from nodeplane.pipeline import OWNERSHIP, Pipeline
from nodeplane.status import AlreadyRunningError, Status, take_lock, write_status

log = logging.getLogger("nodeplane")


def run(args: argparse.Namespace) -> int:
    """Run the agent; SIGTERM and SIGINT end it and leave the kernel as it is."""
    try:
        config = load_config(args.config, args.node or "")
        source = FileSource(args.objects)
    except (ConfigError, SourceError) as error:
        raise Usage(str(error)) from error
    with contextlib.closing(source):
        try:
            first = source.load()
        except SourceError as error:
            raise Usage(str(error)) from error
        try:
            lock = take_lock()
        except (AlreadyRunningError, OSError) as error:
            raise Failed(str(error)) from error
        try:
            _follow(config, source, first)
        except KernelStateError as error:
            raise Failed(str(error)) from error
        finally:
            os.close(lock)
    log.info("stopped; the kernel goes on forwarding as it is")
    return 0


def _follow(config: NodeConfig, source: FileSource, first: Update) -> None:
    """Run the agent until a signal ends it."""
    stopped: list[int] = []
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def stop(number: int, _frame: FrameType | None) -> None:
        stopped.append(number)

    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    agent = build_agent(config, source, expected_chains(first))
    agent.start(first)
    agent.run(lambda: bool(stopped), wake_read)


def expected_chains(update: Update) -> int:
    """Guess how many iptables chains a snapshot becomes: one a Service, one an endpoint."""
    slices = update.snapshot.slices.values()
    return len(update.snapshot.services) + sum(len(one.endpoints) for group in slices for one in group.values())


def build_agent(config: NodeConfig, source: FileSource, chains: int) -> Agent:
    """Wire the parts for the current network namespace, in which about ``chains`` chains are going to be."""
    for note in config.notes:
        log.info("%s", note)
    variant, reason = config.iptables_variant, "iptablesVariant in the configuration"
    if variant == "auto":
        variant, reason = choose_variant(chains)
    log.info("node %s: Services in %s through iptables-%s (%s)", config.node_name, config.mode, variant, reason)
    overlay = config.overlay
    for note in overlay.net_conf.notes if overlay else ():
        log.info("overlay.%s", note)
    ports = [LinuxLinks()] if overlay else []
    status = Status(
        pid=os.getpid(),
        node=config.node_name,
        mode=config.mode,
        iptables_variant=variant,
        iptables_reason=reason,
        started=time.time(),
        overlay=overlay.net_conf.backend.type if overlay else "",
    )
    return Agent(
        pipeline=Pipeline(config),
        source=source,
        host=LinuxHost(config),
        netfilter=NetfilterReconciler(IptablesPort(variant), OWNERSHIP),
        links=LinkReconciler(ports[0]) if ports else None,
        conntrack=Conntrack(),
        publish=write_status,
        status=status,
        watched=[port.fileno() for port in ports],
        families=families(),
    )
