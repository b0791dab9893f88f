"""The connection tracking table: dumping the flows of a protocol, deleting exact flows, ending connections.

    original   client:sport  -> service:dport     as sent                 CTA_TUPLE_ORIG
    reply      backend:port  -> client:sport      as answered, after DNAT CTA_TUPLE_REPLY

Decides nothing: which flows are stale is a feature's question. What is written and read: ``conntrack_codec.py``; how a
connection is ended: ``conntrack_reset.py``. The kernel filters by protocol where it can (since 5.8); what an older one sends
besides is dropped here. Source: include/uapi/linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from kernelstate.errors import KernelRefusedError
from kernelstate.linux import conntrack_reset
from kernelstate.linux.conntrack_codec import ADDRESS_FAMILY, BATCH, CT_DELETE, CT_GET, key, protocol_query, read_entry
from kernelstate.linux.nfnetlink import NfNetlink
from kernelstate.objects.address import Family
from kernelstate.ports import ConntrackEntry


class Conntrack:
    """Implements ``ports.ConntrackPort`` for the network namespace of the calling thread."""

    def entries(self, family: Family, protocol: str) -> list[ConntrackEntry]:
        """Dump the flows of one protocol. Raises KernelRefusedError."""
        with NfNetlink() as netlink:
            query = protocol_query(protocol)
            dump = netlink.dump(f"dump {protocol} conntrack entries", CT_GET, ADDRESS_FAMILY[family], query)
            found = (read_entry(family, protocol, message) for message in dump)
            return [entry for entry in found if entry is not None]

    def delete(self, entries: Sequence[ConntrackEntry]) -> int:
        """Delete exactly these; those already gone do not count. Raises KernelRefusedError at the first that is refused."""
        deleted = 0
        with NfNetlink() as netlink:
            for start in range(0, len(entries), BATCH):
                batch = entries[start : start + BATCH]
                codes = netlink.execute(CT_DELETE, [(ADDRESS_FAMILY[entry.family], key(entry)) for entry in batch])
                for entry, code in zip(batch, codes, strict=True):
                    if code not in {0, errno.ENOENT}:
                        raise KernelRefusedError("delete conntrack entry", str(entry), os.strerror(code))
                    deleted += code == 0
        return deleted

    def reset(self, entries: Sequence[ConntrackEntry], refuser: int) -> int:
        """End these TCP connections or SCTP associations and tell their clients (``conntrack_reset.py`` says how).

        ``refuser`` is an address of this node's own, of the family of the flows. Of flows that are still opening only the
        entry goes: what the client sends again is a new flow. Returns how many were deleted; raises KernelRefusedError.
        """
        ended = [entry for entry in entries if entry.stage == "open"]
        deleted = self.delete(entries)
        if ended:
            conntrack_reset.refuse(ended, refuser)
        return deleted
