"""The machine as the agent meets it: addresses, uplink, sysctls, subnet.env, leases. Impure by purpose, and small."""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from pathlib import Path

from clusterstate.objects import IPAddress, Node
from kernelstate.errors import KernelStateError
from kernelstate.linux import sysctl
from kernelstate.linux.addresses import Addresses
from kernelstate.linux.link_events import LinkEvents
from kernelstate.linux.uplink import uplink_facts
from nodeplane.checksum_test import ChecksumTest, tasks_of
from nodeplane.config import NodeConfig
from nodeplane.lease_keeper import LeaseKeeper
from nodeplane.pipeline import Desired, HostFacts
from overlay.netconf import VxlanBackend
from overlay.subnet_env import print_subnet_env
from proxy.render.ipvs_program import LINK


class LinuxHost:
    """The current network namespace, and what ``keeper`` learns from etcd."""

    def __init__(self, config: NodeConfig, keeper: LeaseKeeper | None = None) -> None:
        self.config, self.keeper = config, keeper
        self.events = LinkEvents()
        self.checksums = _checksum_test(config)
        self._either = select.epoll()
        for source in (self.events, keeper, self.checksums):
            if source is not None:
                self._either.register(source.fileno(), select.EPOLLIN)

    def facts(self, node: Node | None) -> HostFacts:
        """Return addresses and uplink as they are now; loopback's own and those held for Services are left out."""
        own = tuple(sorted({p for link, p in Addresses().local_addresses() if link not in {"lo", LINK}}))
        uplink = None
        if self.config.overlay is not None:
            uplink = uplink_facts(self.config.overlay.iface, [a.ip for a in node.addresses] if node else [])
        unfit = self.checksums.unfit if self.checksums is not None else frozenset()
        if self.keeper is None or self.config.overlay is None:
            return HostFacts(local_addresses=own, uplink=uplink, unfit=unfit)
        found = [uplink.address(family) for family in (4, 6)] if uplink is not None else []
        told: dict[int, IPAddress] = {}
        for address in (*found, *self.config.overlay.public_ips):
            if address is not None:
                told[address.version] = address
        self.keeper.tell(told)
        state = self.keeper.state
        return HostFacts(local_addresses=own, uplink=uplink, unfit=unfit, members=state.members, lease=state.lease)

    def fileno(self) -> int:
        """Return one descriptor for events of links and addresses, news of leases, and verdicts on checksums."""
        return self._either.fileno()

    def changed(self) -> bool:
        """Drain all of them; whether anything concerns us."""
        leases = self.keeper is not None and self.keeper.drain()
        checksums = self.checksums is not None and self.checksums.drain()
        return self.events.drain() or leases or checksums

    def use(self, config: NodeConfig) -> None:
        """Go by another configuration from now on; its overlay is the same."""
        self.config = config

    def prepare(self, desired: Desired) -> Sequence[str]:
        """Let the kernel forward, let localhost reach NodePorts where asked, and write subnet.env."""
        errors = []
        for name, value in self._sysctls(desired):
            try:
                sysctl.write(name, value)
            except KernelStateError as error:
                errors.append(str(error))
        overlay = self.config.overlay
        if self.checksums is not None and desired.peers is not None:
            self.checksums.take(tasks_of(desired.peers))
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


def _checksum_test(config: NodeConfig) -> ChecksumTest | None:
    """Return what finds out about the hardware's checksums, where there is a tunnel and nobody has said how they should be."""
    conf = config.overlay.net_conf if config.overlay is not None and config.overlay.checksum_offload == "auto" else None
    if conf is None or not isinstance(conf.backend, VxlanBackend):
        return None
    return ChecksumTest([conf.backend.link_name(family) for family in conf.families])


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if path.exists() and path.read_text() == text:
        return
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text)
    fresh.chmod(0o644)
    fresh.replace(path)
