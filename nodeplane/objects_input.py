"""``--objects`` or ``--kubeconfig``, ``--config``, ``--node`` and ``--mode`` of the one-shot commands, read and checked."""

from __future__ import annotations

import argparse
import sys
from ipaddress import IPv4Interface, IPv6Interface, ip_interface

import msgspec

from clusterstate.objects import IPAddress
from clusterstate.snapshot import Snapshot, Update
from kernelstate.objects.address import Prefix
from nodeplane.cluster_source import read_once
from nodeplane.commands import Usage
from nodeplane.config import NodeConfig, default_config, load_config
from nodeplane.config_fields import ConfigError
from nodeplane.pipeline import Desired, HostFacts, Pipeline
from overlay.table import Uplink


class NodeView(msgspec.Struct, frozen=True):
    """A snapshot seen from one node."""

    config: NodeConfig
    snapshot: Snapshot
    facts: HostFacts
    pipeline: Pipeline
    desired: Desired


def read_view(args: argparse.Namespace) -> NodeView:
    """Read everything a one-shot command was given. Raises Usage.

    An object that cannot be used is named on stderr and left out, as the agent does it.
    """
    try:
        mode = args.mode or ""
        config = load_config(args.config, args.node, mode) if args.config else default_config(args.node, mode)
    except ConfigError as error:
        raise Usage(str(error)) from error
    found = read_once(args, config)
    snapshot = found.snapshot
    for fault in found.errors:
        print(f"nodeplane: {'' if fault.kept else 'left out: '}{fault}", file=sys.stderr)
    if config.node_name not in snapshot.nodes and snapshot.nodes:
        names = ", ".join(sorted(snapshot.nodes))
        raise Usage(f"--node {config.node_name}: no such Node among the objects; there are {names}")
    facts = _facts(config, snapshot, args.local_address)
    pipeline = Pipeline(config)
    desired = pipeline.update(Update(snapshot, None), facts)
    return NodeView(config, snapshot, facts, pipeline, desired)


def _facts(config: NodeConfig, snapshot: Snapshot, stated: list[str]) -> HostFacts:
    """Stand in for the host: its addresses are those of its Node object and those stated."""
    node = snapshot.nodes.get(config.node_name)
    interfaces: list[IPv4Interface | IPv6Interface] = []
    for text in stated:
        try:
            interfaces.append(ip_interface(text))
        except ValueError as error:
            raise Usage(f"--local-address: must be an IP address, with or without /LENGTH, is {text!r}") from error
    own = [a.ip for a in node.addresses] if node else []
    addresses = dict.fromkeys(Prefix.host(a) for a in (*own, *(i.ip for i in interfaces)))
    return HostFacts(local_addresses=tuple(addresses), uplink=_uplink(config, own, interfaces))


def _uplink(config: NodeConfig, own: list[IPAddress], stated: list[IPv4Interface | IPv6Interface]) -> Uplink | None:
    """Stand in for the node's link to the others.

    A length stated with ``--local-address`` says how far the segment reaches; without one every node is taken to be on it.
    """
    if config.overlay is None or not own:
        return None
    lengths = {i.ip: i for i in stated if i.network.prefixlen < i.max_prefixlen}
    addresses = tuple(lengths.get(a) or ip_interface(f"{a}/0") for a in own)
    return Uplink(name=config.overlay.iface or "eth0", addresses=addresses, mtu=1500)
