"""The kernel as a measured agent meets it, by mode.

    iptables    the text is kept, and nothing is done with it: iptables-restore is measured on its own (``kernel.py``)
    nftables    the real thing, in the current network namespace: libnftables works in the agent's process and memory
    ipvs        as real as this kernel is (``ports_ipvs.py``)

What was written is counted; when, and how long the kernel took, is told by ``stages.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kernelstate.fake import RecordingNetfilter
from kernelstate.objects.address import Family
from kernelstate.objects.nftables import Data, ElementKey, NamedSet, TableKey
from kernelstate.reconcile import NetfilterReconciler
from nodeplane.kernel import NodeKernel
from nodeplane.pipeline import OWNERSHIP

if TYPE_CHECKING:
    from kernelstate.reconcile_nftables import NftablesReconciler


class Written:
    """What was handed over since the last ``clear``."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.elements = 0
        """Elements, members, servers and addresses that went to the kernel as netlink messages, without a text."""

    def clear(self) -> None:
        """Begin again with nothing."""
        self.texts.clear()
        self.elements = 0


class TextPort(RecordingNetfilter):
    """An iptables that takes every text and does nothing."""

    def __init__(self, written: Written) -> None:
        super().__init__()
        self._written = written

    def apply(self, family: Family, restore_text: str) -> None:
        """Keep the text; it is encoded as for a pipe."""
        super().apply(family, restore_text)
        self._written.texts.append(restore_text)
        self.hand(restore_text.encode())

    def hand(self, data: bytes) -> None:
        """Do nothing: here the kernel would have it."""


def measured_kernel(mode: str, written: Written) -> NodeKernel:
    """Return the parts for a mode, in the current network namespace where they are real. Raises KernelStateError.

    What a mode needs is imported here, so that other modes are measured without it in memory.
    """
    netfilter = NetfilterReconciler(TextPort(written), OWNERSHIP)
    match mode:
        case "nftables":
            return NodeKernel(netfilter, nftables=_nftables(written))
        case "ipvs":
            from bench.ports_ipvs import measured_ipvs  # noqa: PLC0415

            return NodeKernel(netfilter, ipvs=measured_ipvs(written))
    return NodeKernel(netfilter)


def _nftables(written: Written) -> NftablesReconciler:
    from kernelstate.linux.nftables import NftablesPort  # noqa: PLC0415
    from kernelstate.reconcile_nftables import NftablesReconciler  # noqa: PLC0415

    class CountingPort(NftablesPort):
        def apply(self, text: str) -> None:
            written.texts.append(text)
            super().apply(text)

        def load(self, key: TableKey, named: NamedSet, elements: Mapping[ElementKey, Data]) -> None:
            written.elements += len(elements)
            super().load(key, named, elements)

    return NftablesReconciler(CountingPort())
