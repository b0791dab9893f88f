"""Where the agent's time goes: CPU time of each stage, taken by standing in the doorway of the functions that begin one.

                                      iptables             nftables              ipvs
    read      files to a snapshot     FileSource           FileSource            FileSource
    compile   to the table of meaning ServiceCompiler      ServiceCompiler       ServiceCompiler
    render    to what should exist    IptablesProgram      NftablesProgram       IpvsProgram
    plan      to changes              FamilyFilter.plan    TableKeeper.sync,     the reconcilers' sync, with messages for
                                                           with the text         ipset and addresses
    print     to what is written      Plan.text            NftablesPort.load:    Plan.text; requests for virtual servers
                                                           netlink messages
    other     all that is left: putting the parts together, bookkeeping

    kernel    not the agent's         TextPort.hand:       libnftables, and messages to the kernel until they are
                                      nothing              answered; where there is no IPVS a dictionary

A stage is charged for itself only: what it calls that is a stage of its own is charged there. The doorways cost two clock readings
a call (about 1 us), and are taken down again afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

from clusterstate.sources.files import FileSource
from proxy.compile import ServiceCompiler

Door: TypeAlias = tuple[type, str, str]
"""A class, its method, and the stage that begins there."""
STAGES = ("read", "compile", "render", "plan", "print", "other")
"""The agent's own."""
KERNEL = "kernel"


def doors(mode: str) -> tuple[Door, ...]:
    """Return where stages begin. Imports what the mode has, and nothing of other modes: that would be in the figures of memory."""
    common = ((FileSource, "load", "read"), (FileSource, "poll", "read"), (ServiceCompiler, "update", "compile"))
    match mode:
        case "iptables":
            return (*common, *_iptables_doors())
        case "nftables":
            return (*common, *_nftables_doors())
        case "ipvs":
            return (*common, *_ipvs_doors())
    raise ValueError(f"no stages are known of mode {mode}")


def _iptables_doors() -> tuple[Door, ...]:
    from bench.ports import TextPort  # noqa: PLC0415
    from kernelstate.diff import Plan  # noqa: PLC0415
    from kernelstate.reconcile_family import FamilyFilter  # noqa: PLC0415
    from proxy.render.iptables_program import IptablesProgram  # noqa: PLC0415

    return (
        (IptablesProgram, "update", "render"),
        (FamilyFilter, "plan", "plan"),
        (Plan, "text", "print"),
        (TextPort, "hand", KERNEL),
    )


def _nftables_doors() -> tuple[Door, ...]:
    from kernelstate.linux.nfnetlink import NfNetlink  # noqa: PLC0415
    from kernelstate.linux.nft_library import Library  # noqa: PLC0415
    from kernelstate.linux.nftables import NftablesPort  # noqa: PLC0415
    from kernelstate.reconcile_table import TableKeeper  # noqa: PLC0415
    from proxy.render.nftables_program import NftablesProgram  # noqa: PLC0415

    return (
        (NftablesProgram, "update", "render"),
        (TableKeeper, "sync", "plan"),
        (NftablesPort, "load", "print"),
        (Library, "run", KERNEL),
        (NfNetlink, "commit", KERNEL),
    )


def _ipvs_doors() -> tuple[Door, ...]:
    from bench.ports import TextPort  # noqa: PLC0415
    from bench.ports_ipvs import CountingServers, EncodingServers  # noqa: PLC0415
    from kernelstate.diff import Plan  # noqa: PLC0415
    from kernelstate.linux.generic_netlink import GenericSocket  # noqa: PLC0415
    from kernelstate.linux.nfnetlink import NfNetlink  # noqa: PLC0415
    from kernelstate.linux.rtnetlink import RouteSocket  # noqa: PLC0415
    from kernelstate.reconcile_addresses import AddressReconciler  # noqa: PLC0415
    from kernelstate.reconcile_family import FamilyFilter  # noqa: PLC0415
    from kernelstate.reconcile_ipvs import IpvsReconciler  # noqa: PLC0415
    from kernelstate.reconcile_sets import IpsetReconciler  # noqa: PLC0415
    from proxy.render.ipvs_program import IpvsProgram  # noqa: PLC0415

    return (
        (IpvsProgram, "update", "render"),
        (FamilyFilter, "plan", "plan"),
        (AddressReconciler, "sync", "plan"),
        (IpvsReconciler, "sync", "plan"),
        (IpsetReconciler, "sync", "plan"),
        (Plan, "text", "print"),
        (CountingServers, "apply", "print"),
        (EncodingServers, "apply", "print"),
        (EncodingServers, "hand", KERNEL),
        (TextPort, "hand", KERNEL),
        (GenericSocket, "execute", KERNEL),
        (NfNetlink, "execute", KERNEL),
        (RouteSocket, "execute", KERNEL),
    )


class Stages:
    """Milliseconds of CPU time by stage, of everything since the last ``clear``."""

    def __init__(self, where: str | Sequence[Door]) -> None:
        """Take the doors of a mode of Services, or other doors."""
        self.spent: dict[str, float] = {}
        self.kernel_wall = 0.0
        """Elapsed milliseconds of stage ``kernel``."""
        self.handed = (0.0, 0.0)
        """``perf_counter`` and ``process_time`` when the kernel had the last of it."""
        self._doors = doors(where) if isinstance(where, str) else tuple(where)
        self._inner: list[float] = []

    def clear(self) -> None:
        """Begin again at zero."""
        self.spent.clear()
        self.kernel_wall = 0.0

    def split(self, total: float) -> dict[str, float]:
        """Return every stage's share of a total in milliseconds; what no door was passed for is ``other``."""
        known = {stage: self.spent.get(stage, 0.0) for stage in STAGES if stage != "other"}
        return {**known, "other": max(0.0, total - sum(known.values()))}

    @contextmanager
    def watching(self) -> Iterator[Stages]:
        """Charge the stages' functions while the body runs."""
        with ExitStack() as undo:
            for owner, name, stage in self._doors:
                original = getattr(owner, name)
                setattr(owner, name, self._charged(original, stage))
                undo.callback(setattr, owner, name, original)
            yield self

    def _charged(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def charged(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            wall, started = time.perf_counter(), time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                ended = time.process_time()
                if stage == KERNEL:
                    self.handed = (time.perf_counter(), ended)
                    self.kernel_wall += 1000 * (self.handed[0] - wall)
                spent = 1000 * (ended - started)
                own = spent - self._inner.pop()
                self.spent[stage] = self.spent.get(stage, 0.0) + own
                if self._inner:
                    self._inner[-1] += spent

        return charged
