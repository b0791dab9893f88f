"""The reconcilers of this machine, chosen by mode and by what its kernel has. Impure by purpose, and small.

What only other modes use is handed over as retired: it is emptied once this mode is in place.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import msgspec

from kernelstate.linux.iptables import IptablesPort, Variant, choose_variant, families, is_available
from kernelstate.linux.links import LinuxLinks
from kernelstate.ports import Reconciler
from kernelstate.reconcile import NetfilterReconciler
from kernelstate.reconcile_links import LinkReconciler
from nodeplane.config import NodeConfig
from nodeplane.kernel import NodeKernel
from nodeplane.pipeline import OWNERSHIP

if TYPE_CHECKING:
    from kernelstate.reconcile_nftables import NftablesReconciler

VARIANTS: tuple[Variant, ...] = ("legacy", "nft")


class HostKernel(msgspec.Struct, frozen=True):
    """The kernel's parts, and what was decided about them."""

    kernel: NodeKernel
    iptables_variant: Variant
    iptables_reason: str
    watched: tuple[int, ...]
    """Descriptors that become readable when a part may have drifted."""


def host_kernel(config: NodeConfig, chains: int) -> HostKernel:
    """Put together the parts for the current network namespace, in which about ``chains`` iptables chains will be.

    Raises MissingFeatureError when the kernel lacks what the mode needs.
    """
    variant, reason = _variant(config, chains)
    links = LinuxLinks() if config.overlay else None
    nftables = _nftables() if config.mode == "nftables" else None
    watched = [part.fileno() for part in (links, nftables) if part is not None]
    kernel = NodeKernel(
        NetfilterReconciler(IptablesPort(variant), OWNERSHIP),
        links=LinkReconciler(links) if links else None,
        nftables=nftables,
        families=families(),
        retired=_retired(config.mode, variant),
    )
    return HostKernel(kernel, variant, reason, tuple(watched))


def _variant(config: NodeConfig, chains: int) -> tuple[Variant, str]:
    if config.iptables_variant != "auto":
        return config.iptables_variant, "iptablesVariant in the configuration"
    return choose_variant(chains if config.mode == "iptables" else 0)


def _retired(mode: str, variant: Variant) -> list[Reconciler]:
    """Return the parts that this mode does not use and another may have left."""
    others: list[Reconciler] = [
        NetfilterReconciler(IptablesPort(v), OWNERSHIP, families()) for v in VARIANTS if v != variant and is_available(v)
    ]
    if mode != "nftables" and find_spec("kernelstate.reconcile_nftables"):
        others.append(_nftables())
    return others


def _nftables() -> NftablesReconciler:
    from kernelstate.linux.nftables import NftablesPort
    from kernelstate.reconcile_nftables import NftablesReconciler

    return NftablesReconciler(NftablesPort())
