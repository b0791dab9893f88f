"""Whether checksums of packets that enter the tunnel are left to the uplink's hardware.

    checksumOffload   on     left to it
                      off    finished before
                      auto   as the kernel has it, but finished before where it was found out that the hardware does it wrong

A tunnel whose checksums are finished before cannot hand on superpackets either: right, and slower.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, TypeAlias

import msgspec

from kernelstate.objects.links import LinkState, Vxlan

ChecksumOffload: TypeAlias = Literal["auto", "on", "off"]


def set_checksums(state: LinkState, stated: ChecksumOffload, unfit: Collection[str]) -> LinkState:
    """Return the state with each vxlan link's ``tx_checksum`` as it should be; ``unfit``: links of which it is known bad."""
    wanted = {"on": True, "off": False, "auto": None}[stated]
    links = [
        msgspec.structs.replace(link, tx_checksum=False if stated == "auto" and link.name in unfit else wanted)
        if isinstance(link.kind, Vxlan)
        else link
        for link in state.links
    ]
    return msgspec.structs.replace(state, links=tuple(links))
