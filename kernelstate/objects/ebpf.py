"""Services at the socket: what the kernel's programs are told when a process connects, or sends a datagram.

    frontend (address, protocol, port) --> SocketService: for whom, and which pool --> Pool: one of its endpoints
    NodePort (0, protocol, port)       --> the same, on the node's ``own`` addresses

What a table does not name, and what it says is not for whoever asks, goes on to packet rules as if there were no programs.
How all this lies in the kernel's maps is for ``service_layout.py``.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from kernelstate.objects.address import Family, address_text

SocketProtocol: TypeAlias = Literal["tcp", "udp"]
Endpoint: TypeAlias = tuple[int, int]
"""Address and port."""
NODE_PORT = 0
"""The address of a frontend that answers on the node's own."""


class Who(IntFlag):
    """Whose sockets are meant; the numbers are those of packetpath/include/np_services.h."""

    NOBODY = 0
    NODE = 1
    """Processes in the node's own network namespace."""
    PODS = 2
    """All others."""


class SocketFrontend(NamedTuple):
    """What a process asks for."""

    family: Family
    protocol: SocketProtocol
    address: int
    port: int

    def __str__(self) -> str:
        """Print as ``10.96.0.1:80/tcp``, a NodePort as ``*:30080/tcp``."""
        return f"{'*' if self.address == NODE_PORT else end_text(self.family, self.address)}:{self.port}/{self.protocol}"


class SocketService(msgspec.Struct, frozen=True, gc=False):
    """What becomes of it. ``pool`` 0: nobody serves, and with ``refuses`` who may ask is refused at once."""

    pool: int
    who: Who
    refuses: bool = False
    affinity: int = 0
    """Seconds for which a client comes back to the same endpoint; 0: it does not."""


class Pool(msgspec.Struct, frozen=True):
    """Endpoints, each as likely as the others. ``remembers``: who had one before gets it again, as long as it is one."""

    family: Family
    protocol: SocketProtocol
    endpoints: tuple[Endpoint, ...]
    """Not none."""
    remembers: bool = False
    pods_only: bool = False
    """Every endpoint is an address of the pod network: who asks from a pod keeps its source."""


class SocketTables(msgspec.Struct, frozen=True):
    """Everything the programs know. The mappings may be updated in place by whoever made them."""

    frontends: dict[SocketFrontend, SocketService] = {}
    pools: dict[int, Pool] = {}
    own: dict[tuple[Family, int], Who] = {}
    """Addresses on which NodePorts answer, and to whom."""


class SocketChange(msgspec.Struct, frozen=True):
    """What may differ from the tables before. Frontends of a pool that changed are among the frontends."""

    frontends: frozenset[SocketFrontend] = frozenset()
    pools: frozenset[int] = frozenset()


def end_text(family: Family, address: int) -> str:
    """Print an address as it stands before a port."""
    text = address_text(family, address)
    return text if family == 4 else f"[{text}]"
