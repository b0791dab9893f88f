"""A wire with hardware on it that promises to finish checksums and does not, as some network cards do inside tunnels.

    node A eth0 --veth-- [ AF_PACKET: which checksum is left to do? ] --veth-- node B eth0
                             the outer UDP's: done.  One of a packet inside: left as it is

A packet between two veths keeps the mark "checksum still to be done", and everybody believes it. Here each passes through a
process as bytes, as over a wire, so what was left undone is wrong when it arrives.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct

from kernelstate.linux import netns
from kernelstate.linux.offload_probe import NEEDS_CSUM, PACKET_VNET_HDR, SOL_PACKET, internet_sum

ETH_P_ALL, PACKET_OUTGOING = 3, 4
VNET = struct.Struct("=BBHHHH")
OUTER = 14 + 20
"""Where the checksum of the outermost packet begins to count: behind Ethernet and IPv4."""


def through_the_hardware(frame: bytes) -> bytes:
    """Return a frame as it goes onto the wire, with a header that says: this is complete."""
    flags, _, _, _, start, offset = VNET.unpack_from(frame)
    wire = bytearray(frame[VNET.size :])
    if flags & NEEDS_CSUM and start == OUTER:
        data = bytes(wire[start:]) + bytes(len(wire) - start & 1)
        struct.pack_into("!H", wire, start + offset, ~internet_sum(data) & 0xFFFF or 0xFFFF)
    return bytes(VNET.size) + bytes(wire)


class FalseHardware:
    """Carries frames between two links of a namespace until it is closed."""

    def __init__(self, space: str, links: tuple[str, str]) -> None:
        with netns.inside(space):
            self._sockets = [self._open(link) for link in links]
        self.pid = os.fork()
        if not self.pid:
            self._carry()

    def _open(self, link: str) -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        sock.bind((link, ETH_P_ALL))
        return sock

    def _carry(self) -> None:
        """Pass on every frame that came in, with a header that says: this is complete."""
        try:
            a, b = self._sockets
            while True:
                for ready in select.select([a, b], [], [])[0]:
                    frame, address = ready.recvfrom(1 << 17)
                    if address[2] != PACKET_OUTGOING:
                        (b if ready is a else a).send(through_the_hardware(frame))
        finally:
            os._exit(1)

    def close(self) -> None:
        """Take it off the wire."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        for sock in self._sockets:
            sock.close()
