"""IPVS as Linux holds it: virtual servers, and the real servers behind each.

    ServerKey   family, protocol, address, port       what packets are sent to
      VirtualServer  scheduler, persistence, flags     how one is chosen
        RealServer   address, port, weight             who may be chosen; weight 0: nobody new

Source of the forms: ipvsadm(8), kernel include/uapi/linux/ip_vs.h.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import msgspec

from kernelstate.objects.address import Family

IpvsProtocol: TypeAlias = Literal["tcp", "udp", "sctp"]


class ServerKey(NamedTuple):
    """What identifies a virtual server. ``address`` is a number."""

    family: Family
    protocol: IpvsProtocol
    address: int
    port: int


class RealServer(NamedTuple):
    """One backend. IPVS forwards to it by masquerading (NAT), as kube-proxy has it."""

    address: int
    port: int
    weight: int = 1


class VirtualServer(msgspec.Struct, frozen=True, gc=False):
    """One virtual server. ``timeout`` in seconds is the persistence of a client; 0: every connection is a new choice.

    ``by_port`` gives schedulers that hash (``sh``, ``mh``) the source port too; ``real_servers`` sorted by (address, port).
    """

    scheduler: str
    real_servers: tuple[RealServer, ...]
    timeout: int = 0
    by_port: bool = False


IpvsState: TypeAlias = dict[ServerKey, VirtualServer]
"""Everything of ours. Never changed by whoever receives it."""
