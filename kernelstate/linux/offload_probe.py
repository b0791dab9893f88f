"""Finds out whether packets whose checksum is left to the hardware arrive on the far side of a tunnel.

A link may say that it finishes checksums, and what carries the tunnel then does it wrong, for the packet inside sits deeper than it
looks: ping works, connections hang. One end alone cannot see that, but it can ask the other without its help: the same UDP datagram
to a closed port, once complete and once with its checksum left to be done, and see which of them is refused.

                                          ICMP for the complete one    ICMP for the unfinished one
    this node --flannel.1--> other node             yes                          yes                  good
                                                    yes                          no                   bad
                                                    no                           ...                  unknown: nobody answers

Of the kernel's refusals an ICMP message is complete when it is sent, in both families (a TCP RST is not, for IPv6), so the other
node's own hardware cannot spoil the answer. Source: packet(7) PACKET_VNET_HDR, include/uapi/linux/virtio_net.h, RFC 792, RFC 4443.
"""

from __future__ import annotations

import contextlib
import secrets
import select
import socket
import struct
import time
from typing import Literal, NamedTuple, TypeAlias

from kernelstate.objects.address import IPAddress

Verdict: TypeAlias = Literal["good", "bad", "unknown"]

SOL_PACKET, PACKET_VNET_HDR = 263, 15
NEEDS_CSUM = 1
_VNET = struct.Struct("=BBHHHH")  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
ETHER_TYPE = {4: 0x0800, 6: 0x86DD}
ROUNDS, SECONDS = 4, 0.25
"""So many times each is sent, so long each answer is waited for: as long as a bad one is told from one that was lost."""
ENOUGH = 3
"""Of the complete ones so many must be refused for the silence about the others to mean something."""
PORT = 9
"""discard (RFC 863): closed wherever nobody opened it, and then the refusal comes from the kernel."""
_UDP_CHECKSUM = 6
_UNREACHABLE = {4: (socket.IPPROTO_ICMP, 3), 6: (socket.IPPROTO_ICMPV6, 1)}
"""Next header and type of the message."""


class End(NamedTuple):
    """One end of the tunnel: its MAC and its address inside."""

    mac: str
    address: IPAddress


def probe(link: str, own: End, peer: End) -> Verdict:
    """Ask one peer through a link of the current network namespace. Raises OSError where the link cannot be used."""
    family = own.address.version
    base = 1024 + secrets.randbelow(30000)
    refused: dict[bool, set[int]] = {True: set(), False: set()}
    with contextlib.closing(socket.socket(socket.AF_PACKET, socket.SOCK_RAW)) as sender:
        sender.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        sender.bind((link, 0))
        with contextlib.closing(socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETHER_TYPE[family]))) as ear:
            ear.bind((link, ETHER_TYPE[family]))
            for number in range(ROUNDS):
                ports = {base + 2 * number: True, base + 2 * number + 1: False}
                for port, complete in ports.items():
                    sender.send(_frame(own, peer, port, complete=complete))
                for port in _refusals(ear, own, peer, set(ports)):
                    refused[ports[port]].add(port)
                if refused[False]:
                    return "good"
    return "bad" if len(refused[True]) >= ENOUGH else "unknown"


def _frame(own: End, peer: End, port: int, *, complete: bool) -> bytes:
    """Return a datagram with its frame, and before it what the kernel is told of the checksum."""
    udp = bytearray(struct.pack("!HHHH", port, PORT, 16, 0) + b"nodplane")
    pseudo = own.address.packed + peer.address.packed + struct.pack("!II", len(udp), socket.IPPROTO_UDP)
    total = (~internet_sum(pseudo + udp) & 0xFFFF or 0xFFFF) if complete else internet_sum(pseudo)
    udp[_UDP_CHECKSUM : _UDP_CHECKSUM + 2] = struct.pack("!H", total)
    if own.address.version == 4:
        ip = bytearray(struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0x4000, 64, socket.IPPROTO_UDP, 0))
        ip += own.address.packed + peer.address.packed
        ip[10:12] = struct.pack("!H", ~internet_sum(bytes(ip)) & 0xFFFF)
    else:
        ip = bytearray(struct.pack("!IHBB", 6 << 28, len(udp), socket.IPPROTO_UDP, 64))
        ip += own.address.packed + peer.address.packed
    ether = bytes.fromhex((peer.mac + own.mac).replace(":", "")) + struct.pack("!H", ETHER_TYPE[own.address.version])
    start = len(ether) + len(ip)
    vnet = _VNET.pack(0, 0, 0, 0, 0, 0) if complete else _VNET.pack(NEEDS_CSUM, 0, 0, 0, start, _UDP_CHECKSUM)
    return vnet + ether + bytes(ip) + bytes(udp)


def internet_sum(data: bytes) -> int:
    """Return the Internet checksum before it is inverted (RFC 1071); an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def _refusals(ear: socket.socket, own: End, peer: End, ports: set[int]) -> set[int]:
    """Return which of our ports the peer answered, waiting for all of them but not for long."""
    found: set[int] = set()
    end = time.monotonic() + SECONDS
    while found != ports and (left := end - time.monotonic()) > 0:
        if select.select([ear], [], [], left)[0]:
            port = _answered(ear.recv(256), own, peer)
            if port in ports:
                found.add(port)
    return found


def _answered(packet: bytes, own: End, peer: End) -> int:
    """Return the port of the datagram that a message refuses; 0 for any other packet."""
    family = own.address.version
    size = (packet[0] & 15) * 4 if family == 4 else 40
    if len(packet) < 2 * size + 16:
        return 0
    quoted = packet[size + 8 :]
    ends = slice(12, 20) if family == 4 else slice(8, 40)
    protocol = 9 if family == 4 else 6
    if (packet[protocol], packet[size]) != _UNREACHABLE[family] or quoted[protocol] != socket.IPPROTO_UDP:
        return 0
    if quoted[ends] != own.address.packed + peer.address.packed:
        return 0
    start = (quoted[0] & 15) * 4 if family == 4 else 40
    source, destination = struct.unpack("!HH", quoted[start : start + 4])
    return int(source) if destination == PORT else 0
