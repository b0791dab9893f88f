"""The kernel as a measured agent of mode ``ipvs`` meets it, in the current network namespace.

    virtual servers   the kernel's, where it has IPVS; else requests are encoded all the same, and a dictionary takes them
    sets              the kernel's, where it has ipset; else likewise
    addresses         the kernel's, on a link that it has a kind for
    rules             text that is kept (``ports.TextPort``)

Imported for this mode only: other modes are measured without these modules in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.ports import Written
from kernelstate.diff_ipvs import IpvsChange
from kernelstate.diff_sets import TEMPORARY, AddMembers, DeleteMembers, SetChange, SetHeader
from kernelstate.fake_ipvs import FakeIpvs
from kernelstate.fake_sets import FakeIpset
from kernelstate.linux.ipset import LinuxIpset, has_ipset
from kernelstate.linux.ipvs import LinuxIpvs, has_ipvs, requests_of
from kernelstate.linux.service_addresses import LinuxServiceAddresses
from kernelstate.objects.address import Prefix
from kernelstate.objects.sets import Member, SetSpec
from kernelstate.ownership import Ownership
from kernelstate.reconcile_addresses import AddressReconciler
from kernelstate.reconcile_ipvs import IpvsReconciler
from kernelstate.reconcile_sets import IpsetPort, IpsetReconciler
from nodeplane.kernel import IpvsParts
from proxy.render.ipvs import SET_TYPES, set_name
from proxy.render.ipvs_program import LINK


class EncodingServers(FakeIpvs):
    """Encodes every request as for the kernel, and remembers the outcome instead of sending it."""

    def __init__(self, written: Written) -> None:
        super().__init__()
        self._written = written

    def apply(self, changes: Sequence[IpvsChange]) -> list[str]:
        """Do each, in order."""
        self._written.elements += len(requests_of(changes))
        return self.hand(changes)

    def hand(self, changes: Sequence[IpvsChange]) -> list[str]:
        """Take the changes: here the kernel would have them."""
        return super().apply(changes)


class CountingServers(LinuxIpvs):
    """The kernel's virtual servers, with a count of requests."""

    def __init__(self, written: Written) -> None:
        super().__init__()
        self._written = written

    def apply(self, changes: Sequence[IpvsChange]) -> list[str]:
        """Do each, in order."""
        self._written.elements += len(changes)
        return super().apply(changes)


class CountingSets:
    """Sets, wherever they are kept, with a count of members that come and go."""

    def __init__(self, written: Written, port: IpsetPort) -> None:
        self._written, self._port = written, port

    def headers(self) -> dict[str, SetHeader]:
        """Return every set, without its members."""
        return self._port.headers()

    def members(self, spec: SetSpec) -> frozenset[Member]:
        """Return a set's members."""
        return self._port.members(spec)

    def apply(self, changes: Sequence[SetChange]) -> str:
        """Do each, in order, until one is refused."""
        self._written.elements += sum(len(one.members) for one in changes if isinstance(one, AddMembers | DeleteMembers))
        return self._port.apply(changes)


class CountingAddresses(LinuxServiceAddresses):
    """The link's addresses, with a count of requests."""

    def __init__(self, written: Written) -> None:
        super().__init__(LINK)
        self._written = written

    def apply(self, added: Sequence[Prefix], deleted: Sequence[Prefix]) -> list[str]:
        """Add, then delete addresses."""
        self._written.elements += len(added) + len(deleted)
        return super().apply(added, deleted)


def measured_ipvs(written: Written) -> IpvsParts:
    """Return the parts of the mode. Raises KernelStateError."""
    addresses = AddressReconciler(CountingAddresses(written))
    ownership = Ownership(frozenset(set_name(name, family) for name in SET_TYPES for family in (4, 6)), (TEMPORARY,))
    return IpvsParts(
        IpsetReconciler(CountingSets(written, LinuxIpset() if has_ipset() else FakeIpset()), ownership),
        IpvsReconciler(CountingServers(written) if has_ipvs() else EncodingServers(written), addresses.addresses),
        addresses,
    )
