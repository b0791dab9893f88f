"""What a process meets that asks for a Service: the programs at sockets first, then, with what they leave, the node's packet rules.

    connect, sendmsg --> frontends, or own and frontends --> for me? --> slots: an endpoint          the packet goes straight there
                                 | not found, not for me                 none: refused, or left
                                 '---> the packet goes out as it was asked for --> nftables

Reads the bytes of the maps as packetpath/bpf/services_sock.bpf.c does, so what was laid out wrongly is judged wrongly. A packet that
does not come from a socket of this node (``Packet.by_socket``) meets the rules alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from ipaddress import IPv4Address, IPv6Address

from kernelstate import service_maps as codec
from kernelstate.objects.address import Family, IPAddress
from kernelstate.objects.ebpf import NODE_PORT, SocketFrontend, Who, end_text
from kernelstate.objects.nftables import Table
from kernelstate.service_layout import Contents
from kernelstate.service_maps import Placed
from kernelstate.simulate import OtherStep, Packet, Path
from kernelstate.simulate_nftables import NftablesSimulator

_LOOPBACK4 = int(IPv4Address("127.0.0.1"))


class EbpfSimulator(NftablesSimulator):
    """Walks what sockets ask for over maps and tables; they must not change meanwhile."""

    def __init__(self, contents: Contents, tables: Mapping[Family, Table], local_addresses: Collection[IPAddress] = ()) -> None:
        super().__init__(tables, local_addresses)
        self._contents = contents

    def walk(self, packet: Packet) -> tuple[Path, ...]:
        """Return what may happen, most likely first as far as the programs decide."""
        if not packet.by_socket or packet.protocol not in {"tcp", "udp"}:
            return super().walk(packet)
        who = Who.NODE if packet.from_local else Who.PODS
        asked = SocketFrontend(packet.destination.version, packet.protocol, int(packet.destination), packet.destination_port)
        found = self._service(asked, who)
        if found is None:
            return super().walk(packet)
        frontend, placed = found
        title = f"socket {frontend} pool {placed.service.pool:016x}"
        if not placed.service.who & who:
            return self._left(packet, OtherStep(title, f"is not for {_name(who)}: left to the rules"))
        if not placed.size:
            if not placed.service.refuses:
                return self._left(packet, OtherStep(title, "nobody serves: left to the rules"))
            return (Path(1.0, "reject", None, masquerade=False, mark=0, steps=(OtherStep(title, "nobody serves: refused"),)),)
        return self._to_pool(title, placed)

    def _service(self, asked: SocketFrontend, who: Who) -> tuple[SocketFrontend, Placed] | None:
        """Return the service at an address, else that of a NodePort."""
        value = self._contents.frontends.get(codec.pack_frontend(asked))
        if value is not None:
            return asked, codec.read_service(value)
        address = _LOOPBACK4 if asked.family == 4 and asked.address >> 24 == 127 else asked.address
        allowed = self._contents.own.get(codec.pack_address(asked.family, address))
        if allowed is None or not codec.read_who(allowed) & who:
            return None
        node_port = asked._replace(address=NODE_PORT)
        value = self._contents.frontends.get(codec.pack_frontend(node_port))
        return (node_port, codec.read_service(value)) if value is not None else None

    def _left(self, packet: Packet, step: OtherStep) -> tuple[Path, ...]:
        return tuple(
            Path(p.probability, p.verdict, p.dnat, p.masquerade, p.mark, (step, *p.steps)) for p in super().walk(packet)
        )

    def _to_pool(self, title: str, placed: Placed) -> tuple[Path, ...]:
        paths = []
        for slot in range(placed.first, placed.first + placed.size):
            end = codec.read_frontend(self._contents.slots[codec.pack_index(slot)])
            address = IPv4Address(end.address) if end.family == 4 else IPv6Address(end.address)
            step = OtherStep(title, f"slot {slot}: speaks to {end_text(end.family, end.address)}:{end.port}")
            paths.append(Path(1 / placed.size, "accept", (address, end.port), masquerade=False, mark=0, steps=(step,)))
        return tuple(paths)


def _name(who: Who) -> str:
    return "processes of the node" if who is Who.NODE else "pods"
