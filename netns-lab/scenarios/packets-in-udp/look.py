"""Prints the first datagram to UDP port 8285 that passes a link: the outer header, and the packet that is its payload."""

import socket
import struct
import sys

ETH_P_ALL, ETHERNET, UDP = 3, 14, 8


def header(packet: bytes) -> str:
    """Say what an IPv4 header says."""
    ttl, protocol = packet[8], {1: "ICMP", 6: "TCP", 17: "UDP"}.get(packet[9], packet[9])
    return f"{socket.inet_ntoa(packet[12:16])} -> {socket.inet_ntoa(packet[16:20])}  TTL {ttl}  {protocol}"


with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as wire:
    wire.bind((sys.argv[1], ETH_P_ALL))
    wire.settimeout(10)
    while True:
        outer = wire.recv(65535)[ETHERNET:]
        if outer[0] != 0x45 or outer[9] != socket.IPPROTO_UDP:
            continue
        source, destination, length = struct.unpack("!HHH", outer[20:26])
        if destination == 8285:
            break
print(f"outer  {header(outer)}, port {source} -> {destination}, {length - UDP} bytes of payload, which are:")
print(f"inner  {header(outer[20 + UDP :])}")
