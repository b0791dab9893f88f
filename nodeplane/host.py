"""The machine as the agent meets it: addresses, uplink, sysctls, subnet.env. Impure by purpose, and small."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from clusterstate.objects import Node
from kernelstate.errors import KernelStateError
from kernelstate.linux import sysctl
from kernelstate.linux.addresses import Addresses
from kernelstate.linux.link_events import LinkEvents
from kernelstate.linux.uplink import uplink_facts
from nodeplane.config import NodeConfig
from nodeplane.pipeline import Desired, HostFacts
from overlay.subnet_env import print_subnet_env
from proxy.render.ipvs_program import LINK


class LinuxHost:
    """The current network namespace."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.events = LinkEvents()

    def facts(self, node: Node | None) -> HostFacts:
        """Return addresses and uplink as they are now; loopback's own and those held for Services are left out."""
        own = tuple(sorted({p for link, p in Addresses().local_addresses() if link not in {"lo", LINK}}))
        uplink = None
        if self.config.overlay is not None:
            uplink = uplink_facts(self.config.overlay.iface, [a.ip for a in node.addresses] if node else [])
        return HostFacts(local_addresses=own, uplink=uplink)

    def fileno(self) -> int:
        """Return the descriptor of link, address, route and neighbour events."""
        return self.events.fileno()

    def changed(self) -> bool:
        """Drain the events; whether one of them concerns us."""
        return self.events.drain()

    def prepare(self, desired: Desired) -> Sequence[str]:
        """Let the kernel forward, let localhost reach NodePorts where asked, and write subnet.env."""
        errors = []
        for name, value in self._sysctls(desired):
            try:
                sysctl.write(name, value)
            except KernelStateError as error:
                errors.append(str(error))
        overlay = self.config.overlay
        if overlay is not None and desired.peers is not None:
            text = print_subnet_env(desired.peers, ip_masq=overlay.ip_masq)
            try:
                _replace(Path(overlay.subnet_file), text)
            except OSError as error:
                errors.append(f"write {overlay.subnet_file}: {error.strerror}")
        return errors

    def _sysctls(self, desired: Desired) -> list[tuple[str, str]]:
        wanted = list(desired.services.sysctls)
        if 4 in desired.families:
            wanted.append(("net/ipv4/ip_forward", "1"))
        if 6 in desired.families:
            wanted.append(("net/ipv6/conf/all/forwarding", "1"))
        services = self.config.services
        if services is not None and services.localhost_node_ports and 4 in desired.families:
            wanted.append(("net/ipv4/conf/all/route_localnet", "1"))
        return wanted


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if path.exists() and path.read_text() == text:
        return
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text)
    fresh.chmod(0o644)
    fresh.replace(path)
