"""What an agent hands to the kernel in its first sync, taken down on one machine and handed over on another.

    this machine                                        a machine that has IPVS, and is slow
    objects --> Pipeline --> what should exist            read --> the agent's own doors to the kernel --> a node
                               '--> write --- file ---------^

An emulated CPU takes minutes to read 50,000 Services; what is left to do there is what is measured there. All is made and encoded
by the program's own code, in the agent's order, for a kernel that holds nothing yet. Leaves to others: the node
(``injection.py``), and what becomes of the figures (``ipvs_in_vm.py``).
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from bench.cluster import CLUSTER_CIDR, NODE
from bench.kernel import own_namespace
from bench.ports import TextPort, Written
from clusterstate.sources.files import FileSource
from kernelstate.diff_ipvs import diff_ipvs
from kernelstate.diff_sets import changes_to_make
from kernelstate.errors import KernelRefusedError, MissingFeatureError
from kernelstate.features import Feature
from kernelstate.linux import ipvs, netns, sysctl
from kernelstate.linux.generic_netlink import GenericSocket
from kernelstate.linux.ipset import LinuxIpset
from kernelstate.linux.iptables import IptablesPort
from kernelstate.linux.nfnetlink import NfNetlink
from kernelstate.linux.nft_library import Library
from kernelstate.linux.nftables import NftablesPort
from kernelstate.linux.rtnetlink import RouteSocket
from kernelstate.linux.service_addresses import LinuxServiceAddresses
from kernelstate.objects.address import Prefix
from kernelstate.objects.sets import IpSet
from kernelstate.reconcile import NetfilterReconciler
from kernelstate.reconcile_addresses import SERVICE_LINK
from kernelstate.reconcile_nftables import NftablesReconciler
from nodeplane.config import NodeConfig
from nodeplane.kernel import NodeKernel
from nodeplane.pipeline import OWNERSHIP, Desired, HostFacts, Pipeline
from proxy.settings import ProxySettings

LINK_ADDRESSES, SHARE = 10_000, 5_000
"""So many addresses are put on one link, as an agent does; of more, each link gets a share. The kernel walks through all of a link's
addresses for each that comes: six minutes for 50,000 on an emulated CPU. Packets do not tell: addresses are looked up over all links."""
FLUSH = 17
"""IPVS_CMD_FLUSH of linux/ip_vs.h."""


class Messages(msgspec.Struct, frozen=True):
    """One transaction of nftables as netlink messages (type, flags, payload); ``family`` is netfilter's number."""

    subsystem: int
    family: int
    messages: list[tuple[int, int, bytes]]


class Handover(msgspec.Struct, frozen=True):
    """A first sync. IPv4 only; ``addresses`` are numbers, ``servers`` requests (command, attributes)."""

    mode: str
    services: int
    text: str
    """For iptables-restore."""
    sysctls: tuple[tuple[str, str], ...] = ()
    sets: tuple[IpSet, ...] = ()
    servers: tuple[tuple[int, bytes], ...] = ()
    addresses: tuple[int, ...] = ()
    tables: tuple[str | Messages, ...] = ()
    """Of mode nftables: what libnftables is told, and what it is too slow for."""

    @property
    def messages(self) -> dict[str, int]:
        """How many requests netlink gets, by part; members of a set go some hundreds in one and are counted one by one."""
        counts = {"sets": sum(len(one.members) for one in self.sets), "servers": len(self.servers)}
        return {**counts, "addresses": len(self.addresses)}


# -- taking down -------------------------------------------------------------------------------------------------------


def prepare(path: Path, mode: str, services: int, options: Mapping[str, Any]) -> Handover:
    """Return the first sync of a cluster; ``options`` are fields of ``ProxySettings``. Mode nftables needs root and the library."""
    settings = ProxySettings(cluster_cidrs=(Prefix.parse(CLUSTER_CIDR),), **options)
    with contextlib.closing(FileSource([path])) as source:
        desired = Pipeline(NodeConfig(NODE, settings, mode)).update(source.load(), HostFacts())
    wanted = desired.services
    return Handover(
        mode,
        services,
        text=_text(desired),
        sysctls=wanted.sysctls,
        sets=tuple(wanted.sets.values()),
        servers=tuple(ipvs.requests_of(diff_ipvs(wanted.servers, wanted.servers, {}, {}, graceful=True))),
        addresses=tuple(sorted(prefix.network for prefix in wanted.addresses)),
        tables=_tables(desired) if wanted.tables else (),
    )


def _text(desired: Desired) -> str:
    written = Written()
    kernel = NodeKernel(NetfilterReconciler(TextPort(written), OWNERSHIP))
    kernel.set_desired(desired)
    kernel.netfilter.sync()
    return "".join(written.texts)


def _tables(desired: Desired) -> tuple[str | Messages, ...]:
    """Let this kernel have the tables in a namespace of its own, and take down what it was told."""
    told: list[str | Messages] = []
    run, commit = Library.run, NfNetlink.commit

    def heard_run(self: Library, text: str) -> None:
        told.append(text)
        run(self, text)

    def heard_commit(self: NfNetlink, operation: str, subsystem: int, family: int, messages: Any) -> None:
        told.append(Messages(subsystem, family, list(messages)))
        commit(self, operation, subsystem, family, messages)

    with own_namespace() as name, netns.inside(name), contextlib.ExitStack() as undo:
        for owner, door, heard in ((Library, "run", heard_run), (NfNetlink, "commit", heard_commit)):
            undo.callback(setattr, owner, door, getattr(owner, door))
            setattr(owner, door, heard)
        reconciler = NftablesReconciler(undo.enter_context(contextlib.closing(NftablesPort())))
        reconciler.set_desired(desired.services.tables, None)
        report = reconciler.sync()
    if not report.ok:
        raise KernelRefusedError("prepare", "nftables", report.errors[0])
    return tuple(told)


# -- handing over ------------------------------------------------------------------------------------------------------


class Spent:
    """Milliseconds of CPU that kernel, tools and libraries took, by part, in the order in which an agent writes them."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    @contextlib.contextmanager
    def charged(self, part: str, owner: type, door: str) -> Iterator[None]:
        """While the body runs, charge a part for what is done behind a door: the messages are ready when it is called."""
        original = getattr(owner, door)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = _cpu()
            try:
                return original(*args, **kwargs)
            finally:
                self.parts[part] = self.parts.get(part, 0.0) + _cpu() - started

        setattr(owner, door, timed)
        try:
            yield
        finally:
            setattr(owner, door, original)


def hand_over(handover: Handover) -> dict[str, float]:
    """Give it to the kernel, in the current network namespace; return milliseconds of CPU by part. Raises KernelStateError."""
    spent = Spent()
    if handover.servers and not ipvs.has_ipvs():  # asking loads its module, without which it has no sysctls
        raise MissingFeatureError(Feature.IPVS, "no such generic netlink family")
    for name, value in handover.sysctls:
        sysctl.write(name, value)
    if handover.tables:
        with spent.charged("tables", Library, "run"), spent.charged("tables", NfNetlink, "commit"):
            _write_tables(handover.tables)
    if handover.servers:
        with spent.charged("sets", NfNetlink, "execute"):
            _refused(LinuxIpset().apply([change for one in handover.sets for change in changes_to_make(one.spec, one.members)]))
        with spent.charged("servers", GenericSocket, "execute"):
            _write_servers(handover.servers)
        with spent.charged("addresses", RouteSocket, "execute"):
            _write_addresses(handover.addresses)
    if handover.text:
        with spent.charged("rules", IptablesPort, "apply"):
            IptablesPort("legacy").apply(4, handover.text)
    return spent.parts


def _write_tables(tables: tuple[str | Messages, ...]) -> None:
    library = Library()
    with NfNetlink() as netlink:
        for told in tables:
            if isinstance(told, str):
                library.run(told)
            else:
                netlink.commit("write", told.subsystem, told.family, told.messages)


def _write_servers(requests: tuple[tuple[int, bytes], ...]) -> None:
    with contextlib.closing(GenericSocket(ipvs.FAMILY, ipvs.VERSION)) as netlink:
        codes = netlink.execute(requests)
    _refused(next((f"request {i}: {os.strerror(code)}" for i, code in enumerate(codes) if code), ""))


def _write_addresses(addresses: tuple[int, ...]) -> None:
    """Put addresses on kube-ipvs0; of a great many only the first, and the rest on links beside it."""
    share = LINK_ADDRESSES if len(addresses) <= LINK_ADDRESSES else SHARE
    for number, first in enumerate(range(0, len(addresses), share)):
        with contextlib.closing(LinuxServiceAddresses(f"{SERVICE_LINK}-{number}" if number else SERVICE_LINK)) as link:
            link.create()
            _refused("; ".join(link.apply([Prefix(4, address, 32) for address in addresses[first : first + share]], [])[:1]))


def flush_servers() -> None:
    """Delete every virtual server of the current network namespace."""
    with contextlib.closing(GenericSocket(ipvs.FAMILY, ipvs.VERSION)) as netlink:
        (code,) = netlink.execute([(FLUSH, b"")])
    _refused(f"flush: {os.strerror(code)}" if code else "")


def _refused(words: str) -> None:
    if words:
        raise KernelRefusedError("hand over", "a first sync", words)


def _cpu() -> float:
    """Return milliseconds of CPU of this thread, and of the tools it has waited for."""
    tools = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.thread_time_ns() / 1e6 + 1000 * (tools.ru_utime + tools.ru_stime)
