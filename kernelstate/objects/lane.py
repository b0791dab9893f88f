"""The short lane: which links packets of open connections may go between without meeting the rules again."""

from __future__ import annotations

from enum import IntEnum
from typing import TypeAlias

import msgspec

from kernelstate.objects.address import Family

Address: TypeAlias = tuple[Family, int]


class LinkKind(IntEnum):
    """How a packet gets onto a link; the numbers are those of packetpath/bpf/lane.bpf.c."""

    POD = 1
    """The node's end of a pod's veth: it goes to the other end at once."""
    EXIT = 2
    """The uplink, or a tunnel's link: it goes into its queue."""


class LaneLink(msgspec.Struct, frozen=True, order=True):
    """One link that takes part."""

    name: str
    index: int
    kind: LinkKind
