"""One ICMP echo and its answer, for machines without ping: prints who answered and the TTL the answer arrived with.

ping.py ADDRESS
"""

from __future__ import annotations

import socket
import struct
import sys

ECHO_REQUEST, ECHO_REPLY = 8, 0
PAYLOAD = b"nodeplane"


def checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def main(address: str) -> int:
    """Send one echo request; return 0 if it was answered within two seconds."""
    body = struct.pack("!BBHHH", ECHO_REQUEST, 0, 0, 1, 1) + PAYLOAD
    request = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        sock.settimeout(2)
        sock.sendto(request, (address, 0))
        try:
            packet, (peer, _) = sock.recvfrom(2048)
        except TimeoutError:
            print(f"{address} does not answer")
            return 1
    header = 4 * (packet[0] & 0xF)
    if packet[header] != ECHO_REPLY:
        print(f"{peer} answers with ICMP type {packet[header]}")
        return 1
    print(f"{peer} answers, ttl={packet[8]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
