"""``nodeplane agent``: puts the agent together for this machine and runs it until it is told to stop.

SIGHUP makes it read its configuration again: if that is right the process starts anew in its place (same pid), compares the
kernel with what it now wants, and writes the difference; if it is wrong it says so and goes on. So a node changes its mode
without a moment in which nobody answers. The same happens when etcd says what the network is only after the agent has started, and when
the file changes in something that an agent which runs cannot take up (``reload.py``).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING

from clusterstate.snapshot import Update
from clusterstate.sources.tree import SourceError
from kernelstate.errors import KernelStateError
from kernelstate.linux.conntrack import Conntrack
from nodeplane import logs, pod_gate
from nodeplane.agent import Agent
from nodeplane.announcer import Announcer
from nodeplane.cluster_source import ClusterSource, open_source, server_of
from nodeplane.commands import Failed, Usage
from nodeplane.config import NodeConfig
from nodeplane.config_fields import ConfigError
from nodeplane.denied import DeniedLogger
from nodeplane.event_writer import EventWriter
from nodeplane.flags import read_config
from nodeplane.flows import FlowKeeper
from nodeplane.health import HealthServers
from nodeplane.host import LinuxHost
from nodeplane.host_kernel import host_kernel
from nodeplane.lease_keeper import LeaseKeeper
from nodeplane.network_config import with_network
from nodeplane.notify import Notifier
from nodeplane.pipeline import Pipeline
from nodeplane.pod_gate import PodGate
from nodeplane.policy_flows import PolicyFlows
from nodeplane.reload import ConfigWatch, differing, is_live, with_live
from nodeplane.status import AlreadyRunningError, Status, take_lock, write_status
from nodeplane.watchers import Watchers

if TYPE_CHECKING:
    from clusterstate.sources.kubeclient import KubeClient

log = logging.getLogger("nodeplane")


def run(args: argparse.Namespace) -> int:
    """Run the agent; SIGTERM and SIGINT end it and leave the kernel as it is."""
    with contextlib.ExitStack() as undo:
        watch = ConfigWatch(args.config)  # before the file is read: a change meanwhile is not missed
        undo.callback(watch.close)
        try:
            config = read_config(args)
            source = open_source(args, config)
        except (ConfigError, SourceError) as error:
            raise Usage(str(error)) from error
        undo.enter_context(contextlib.closing(source))
        try:
            first = source.load() if args.objects else None  # a server may take its time, files may be wrong
        except SourceError as error:
            raise Usage(str(error)) from error
        try:
            undo.callback(os.close, take_lock())
        except (AlreadyRunningError, OSError) as error:
            raise Failed(str(error)) from error
        logs.set_up(config.logs, verbose=args.verbose)
        watchers = Watchers(config, watch)
        undo.callback(watchers.close)
        watchers.open()
        first = first or source.load()
        try:
            _follow(args, config, source, first, watchers)
        except KernelStateError as error:
            raise Failed(str(error)) from error
    log.info("stopped; the kernel goes on forwarding as it is")
    return 0


def _follow(args: argparse.Namespace, config: NodeConfig, source: ClusterSource, first: Update, watchers: Watchers) -> None:
    """Run the agent until a signal ends it, or replaces it."""
    caught: list[int] = []
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def note(number: int, _frame: FrameType | None) -> None:
        caught.append(number)

    signal.set_wakeup_fd(wake_write)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, note)
    stated = config
    config = with_network(config)
    keeper = LeaseKeeper(config.overlay, config.node_name) if config.overlay and config.overlay.etcd else None
    notifier = Notifier()
    agent = build_agent(config, source, expected_chains(first), keeper, notifier)
    watchers.watch(agent)
    writers = _writers(config, server_of(source))
    agent.attendants += writers
    for writer in writers:
        writer.start()
    if keeper is not None:
        keeper.start()
    watch = watchers.file
    waits_for_network = keeper is not None
    try:
        agent.start(first)
        while True:
            network = keeper if waits_for_network else None
            agent.run(lambda: bool(caught) or watch.is_due or _is_network_found(network), wake_read)  # noqa: B023 (called in here)
            taken = len(caught)  # what comes from here on is for the next turn
            if set(caught) - {signal.SIGHUP}:
                return
            notifier.reloading()
            if taken or not watch.is_due:
                why = "SIGHUP" if taken else "etcd says a network"
                waits_for_network = waits_for_network and bool(taken)
                watch.seen()
                agent.refuse(_start_anew(args, why))
            else:
                watch.seen()
                stated = _take_up(args, stated, agent, watchers)
            del caught[:taken]
    finally:
        notifier.stopping()
        for writer in writers:
            writer.stop()
        if agent.denied is not None:
            agent.denied.stop()
        if keeper is not None:
            keeper.stop()


def _writers(config: NodeConfig, api: KubeClient | None) -> list[Announcer | EventWriter]:
    """Return what writes to the API server, where there is one: Events, and with an overlay what this node tells the others."""
    if api is None:
        return []
    overlay = config.overlay
    announces = overlay is not None and overlay.etcd is None and overlay.announce
    return [EventWriter(api, config.node_name), *([Announcer(api, config.node_name)] if announces else [])]


def _is_network_found(keeper: LeaseKeeper | None) -> bool:
    return keeper is not None and keeper.state.network_found


def _take_up(args: argparse.Namespace, before: NodeConfig, agent: Agent, watchers: Watchers) -> NodeConfig:
    """Take up what the file says now, or say why not. Returns the configuration that is in force, as it is stated."""
    try:
        wanted = read_config(args)
    except ConfigError as error:
        log.error("%s changed: %s: going on as before", args.config, error)  # noqa: TRY400
        agent.refuse(str(error))
        return before
    fields = differing(before, wanted)
    anew = [field for field in fields if not is_live(field)]
    if anew:
        agent.refuse(_start_anew(args, f"{args.config} changed in {', '.join(fields)}"))
        return before
    if fields:
        log.info("%s changed in %s: in force from now on", args.config, ", ".join(fields))
        for note in wanted.notes:
            log.info("%s", note)
        watchers.use(wanted, verbose=args.verbose)
        agent.reconfigure(with_live(agent.pipeline.config, wanted))
    agent.accept()
    return wanted


def _start_anew(args: argparse.Namespace, why: str) -> str:  # noqa: RET503  (exec does not return)
    """Replace this process by one that reads the configuration again; returns only if that cannot work, and says why."""
    try:
        config = read_config(args)
        host_kernel(config, 0)
    except (ConfigError, KernelStateError) as error:
        log.error("%s: %s: going on as before", why, error)  # noqa: TRY400 (one line for people, no traceback)
        return str(error)
    log.info("%s: starting anew, Services in %s", why, config.mode)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # stays ignored over the exec until the new program listens
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606  (the very program that runs)


def expected_chains(update: Update) -> int:
    """Guess how many iptables chains a snapshot becomes: one a Service, one an endpoint."""
    slices = update.snapshot.slices.values()
    return len(update.snapshot.services) + sum(len(one.endpoints) for group in slices for one in group.values())


def build_agent(
    config: NodeConfig,
    source: ClusterSource,
    chains: int,
    keeper: LeaseKeeper | None = None,
    notifier: Notifier | None = None,
) -> Agent:
    """Wire the parts for the current network namespace, in which about ``chains`` chains are going to be."""
    notifier = notifier or Notifier({})

    def publish(status: Status) -> None:
        write_status(status)
        notifier.publish(status)

    for note in config.notes:
        log.info("%s", note)
    host = host_kernel(config, chains)
    variant, reason = host.iptables_variant, host.iptables_reason
    log.info("node %s: Services in %s; iptables-%s (%s)", config.node_name, config.mode, variant, reason)
    overlay = config.overlay
    if host.unguarded:
        log.info("overlay.sourceCheck: sources of packets from other nodes are not checked: %s", host.unguarded)
    if host.unasked:
        log.info("sockets are not told of Services, packets meet nftables: %s", host.unasked)
    if host.laneless:
        log.info("packets of open connections take no short lane: %s", host.laneless)
    if host.engine is not None:
        log.info("overlay udp: packets are wrapped by the %s engine (%s)", host.engine.engine, host.engine.reason)
    status = Status(
        pid=os.getpid(),
        node=config.node_name,
        mode=config.mode,
        iptables_variant=variant,
        iptables_reason=reason,
        started=time.time(),
        policy=config.policy,
        overlay=overlay.net_conf.backend.type if overlay else "",
        engine=host.engine.engine if host.engine else "",
        engine_reason=host.engine.reason if host.engine else "",
        unguarded=host.unguarded,
        unasked=host.unasked,
        laneless=host.laneless,
    )
    agent = Agent(
        pipeline=Pipeline(config),
        source=source,
        host=LinuxHost(config, keeper),
        kernel=host.kernel,
        flows=FlowKeeper(Conntrack(), config.services) if config.services else None,
        policy_flows=PolicyFlows(Conntrack()) if config.policy else None,
        publish=publish,
        alive=notifier.alive,
        status=status,
        watched=host.watched,
    )
    agent.health = HealthServers(agent.is_healthy)
    if config.policy_log is not None:
        try:
            agent.denied = DeniedLogger()
            agent.denied.start()
        except KernelStateError as error:  # another agent's, or ulogd's: policies are enforced all the same
            log.warning("policy.logDenied: denied packets are not logged: %s", error)
    if config.policy:
        agent.gate = PodGate(config.node_name)
        try:
            agent.gate.open()
        except OSError as error:
            raise Failed(f"{pod_gate.SOCKET}: cannot be listened on: {error.strerror or error}") from error
    else:
        pod_gate.remove()
    return agent
